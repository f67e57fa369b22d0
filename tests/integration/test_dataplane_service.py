"""The data plane as a process: MediaService over a Unix socket, real UDP, metrics, drain and exit codes."""

import asyncio
import itertools
import os
import signal
import socket
import stat
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Self

import grpc
import grpc.aio
import psutil
import pytest
import yaml
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from sippbx.media.v1 import event_pb2, media_service_pb2, media_service_pb2_grpc, node_pb2, session_pb2

pytestmark = pytest.mark.integration

WAIT_S = 10.0
FIRST_PORT = 21_400
BLOCKS = 4
Reason = node_pb2.ErrorReason


def free_tcp_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Plane:
    """A data plane process and a client of it."""

    def __init__(self, folder: Path, **sections: Mapping[str, Any]) -> None:
        self.socket = folder / "run" / "media.sock"
        self.metrics_port = free_tcp_port()
        settings: dict[str, Any] = {
            "grpc": {"listen": f"unix://{self.socket}"},
            "media": {"port_range": [FIRST_PORT, FIRST_PORT + 8 * BLOCKS - 1], "rest_s": 0},
            "metrics": {"bind": "127.0.0.1", "port": self.metrics_port},
            "lease": {},
        }
        for section, values in sections.items():
            settings[section] |= values
        self.config = folder / "dataplane.yaml"
        self.config.write_text(yaml.safe_dump(settings))
        self.log = folder / "dataplane.log"
        self.process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    async def spawn(self, **environment: str) -> asyncio.subprocess.Process:
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "dataplane",
                "--config",
                str(self.config),
                stderr=log,
                env=os.environ | environment,
            )
        return self.process

    async def start(self) -> None:
        await self.spawn()
        self.channel = grpc.aio.insecure_channel(f"unix://{self.socket}")
        self.stub: media_service_pb2_grpc.MediaServiceAsyncStub = media_service_pb2_grpc.MediaServiceStub(self.channel)
        await self.until_ready()

    async def until_ready(self) -> None:
        async with asyncio.timeout(WAIT_S):
            while await self.get("/readyz") != (200, "ok\n"):
                await asyncio.sleep(0.05)

    async def get(self, path: str) -> tuple[int, str]:
        def fetch() -> tuple[int, str]:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}{path}", timeout=WAIT_S) as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.read().decode()
            except OSError:
                return 0, ""

        return await asyncio.to_thread(fetch)

    async def metrics(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        _, text = await self.get("/metrics")
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    async def acquire(self, owner_id: str = "test") -> int:
        granted = await self.stub.Acquire(media_service_pb2.AcquireRequest(owner_id=owner_id), timeout=WAIT_S)
        return granted.epoch

    async def terminate(self) -> None:
        """Sends SIGTERM and waits until it has been taken in."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(WAIT_S):
            while await self.get("/readyz") != (503, "draining\n"):
                await asyncio.sleep(0.02)

    async def exit_code(self) -> int:
        assert self.process is not None
        async with asyncio.timeout(WAIT_S):
            return await self.process.wait()


class Commands:
    """A command stream. `await commands.create(...)` and so on give the outcome of one command."""

    def __init__(self, plane: Plane, epoch: int) -> None:
        self._epoch = epoch
        self._ids = 0
        self.call: grpc.aio.StreamStreamCall[media_service_pb2.CommandRequest, media_service_pb2.CommandResponse] = (
            plane.stub.Command(timeout=60.0)
        )

    async def send(self, *commands: media_service_pb2.Command) -> list[media_service_pb2.CommandResult]:
        """Sends commands in one message; their results in the order of the commands."""
        for command in commands:
            self._ids += 1
            command.command_id = self._ids
        await self.call.write(media_service_pb2.CommandRequest(epoch=self._epoch, commands=commands))
        results: dict[int, media_service_pb2.CommandResult] = {}
        async with asyncio.timeout(WAIT_S):
            while len(results) < len(commands):
                response = await self.call.read()
                assert isinstance(response, media_service_pb2.CommandResponse)
                results |= {result.command_id: result for result in response.results}
        return [results[command.command_id] for command in commands]

    async def create(self, spec: session_pb2.SessionSpec, first_port: int = 0) -> media_service_pb2.CommandResult:
        return (await self.send(creation(spec, first_port)))[0]

    async def update(self, spec: session_pb2.SessionSpec) -> media_service_pb2.CommandResult:
        update = media_service_pb2.UpdateSession(spec=spec)
        return (await self.send(media_service_pb2.Command(update=update)))[0]

    async def delete(self, session_id: str) -> media_service_pb2.CommandResult:
        return (await self.send(deletion(session_id)))[0]


async def refused_while_draining(commands: Commands) -> None:
    """Waits until new sessions are refused, which a draining data plane begins with after a moment."""
    async with asyncio.timeout(WAIT_S):
        for number in itertools.count():
            result = await commands.create(spec(f"new-{number}"))
            if result.HasField("error"):
                assert result.error.reason == node_pb2.ERROR_REASON_DRAINING
                return
            await commands.delete(f"new-{number}")
            await asyncio.sleep(0.05)


def creation(spec: session_pb2.SessionSpec, first_port: int = 0) -> media_service_pb2.Command:
    return media_service_pb2.Command(create=media_service_pb2.CreateSession(spec=spec, first_port=first_port))


def deletion(session_id: str) -> media_service_pb2.Command:
    return media_service_pb2.Command(delete=media_service_pb2.DeleteSession(session_id=session_id))


def spec(
    session_id: str = "s", generation: int = 1, caller: int = 21_901, callee: int = 21_903, local: str = "127.0.0.1"
) -> session_pb2.SessionSpec:
    return session_pb2.SessionSpec(
        session_id=session_id,
        generation=generation,
        mode=session_pb2.MEDIA_MODE_BYPASS,
        endpoints=[
            session_pb2.Endpoint(
                leg=leg,
                kind=session_pb2.MEDIA_KIND_AUDIO,
                local_address=local,
                remote_rtp=session_pb2.SocketAddress(address="127.0.0.1", port=port),
                payload_types=[session_pb2.PayloadType(number=0, encoding_name="PCMU", clock_rate=8000)],
            )
            for leg, port in ((session_pb2.LEG_CALLER, caller), (session_pb2.LEG_CALLEE, callee))
        ],
    )


def rtp(sequence: int) -> bytes:
    return b"\x80\x00" + sequence.to_bytes(2, "big") + (160 * sequence).to_bytes(4, "big") + b"\0\0\0\x01" + bytes(160)


def bound() -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind(("127.0.0.1", 0))
    made.setblocking(False)
    return made


async def receive(end: socket.socket) -> bytes:
    async with asyncio.timeout(WAIT_S):
        return await asyncio.get_running_loop().sock_recv(end, 4096)


async def events_of(
    plane: Plane, epoch: int, until: Callable[[event_pb2.MediaEvent], bool], resume_after: int = 0
) -> list[event_pb2.MediaEvent]:
    """Watches until an event fulfils a condition; all events up to it."""
    watch = plane.stub.Watch(media_service_pb2.WatchRequest(epoch=epoch, resume_after=resume_after))
    seen: list[event_pb2.MediaEvent] = []
    async with asyncio.timeout(WAIT_S):
        async for response in watch:
            seen.extend(response.events)
            if any(until(event) for event in response.events):
                break
    watch.cancel()
    return seen


async def read_to_the_end(call: Any) -> None:
    async with asyncio.timeout(2.0):
        while await call.read() is not grpc.aio.EOF:
            pass


async def listed(plane: Plane) -> list[str]:
    answer = await plane.stub.ListSessions(media_service_pb2.ListSessionsRequest(), timeout=WAIT_S)
    return [session.session_id for session in answer.sessions]


def is_closed(event: event_pb2.MediaEvent) -> bool:
    return event.WhichOneof("event") == "session_closed"


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[Plane]:
    async with Plane(tmp_path) as started:
        yield started


async def test_a_session_lives_from_create_to_its_final_statistics(plane: Plane) -> None:
    epoch = await plane.acquire()
    commands = Commands(plane, epoch)
    with bound() as caller, bound() as callee:
        wanted = spec(caller=caller.getsockname()[1], callee=callee.getsockname()[1])
        session = (await commands.create(wanted)).session
        assert session.first_port == FIRST_PORT
        assert [(e.leg, e.rtp_port, e.rtcp_port) for e in session.local_endpoints] == [
            (session_pb2.LEG_CALLER, FIRST_PORT, FIRST_PORT + 1),
            (session_pb2.LEG_CALLEE, FIRST_PORT + 4, FIRST_PORT + 5),
        ]
        for sequence in (1, 2, 4):
            caller.sendto(rtp(sequence), ("127.0.0.1", FIRST_PORT))
            assert await receive(callee) == rtp(sequence)
        listed = await plane.stub.ListSessions(media_service_pb2.ListSessionsRequest(include_statistics=True))
        assert [(s.session_id, s.statistics[0].packets) for s in listed.sessions] == [("s", 3)]
        final = (await commands.delete("s")).session
    statistics = next(s for s in final.statistics if s.leg == session_pb2.LEG_CALLER)
    assert (statistics.packets, statistics.octets, statistics.lost) == (3, 3 * 172, 1)
    assert statistics.relayed_packets == 3
    assert abs(statistics.first_packet_time.ToSeconds() - time.time()) < WAIT_S
    assert (await commands.delete("s")).session == final
    events = await events_of(plane, epoch, is_closed)
    kinds = [event.WhichOneof("event") for event in events if event.session_id]
    assert kinds == ["first_packet", "source_latched", "session_closed"]
    assert list(events[-1].session_closed.statistics) == list(final.statistics)


async def test_commands_may_be_repeated(plane: Plane) -> None:
    commands = Commands(plane, await plane.acquire())
    assert (await commands.create(spec())).session == (await commands.create(spec())).session
    changed = spec(generation=2, callee=21_905)
    assert (await commands.update(changed)).session == (await commands.update(changed)).session


async def test_refusals_name_their_reason_and_field(plane: Plane) -> None:
    commands = Commands(plane, await plane.acquire())
    await commands.create(spec())
    bad_address, bad_port, no_mode, bad_line = spec("x"), spec("x"), spec("x"), spec("x")
    bad_address.endpoints[1].remote_rtp.address = "example.org"
    bad_port.endpoints[0].remote_rtp.port = 65_536
    no_mode.mode = session_pb2.MEDIA_MODE_UNSPECIFIED
    bad_line.endpoints[0].line = 2
    for result, reason, words in (
        (await commands.create(spec(generation=2)), "STALE_GENERATION", "generation 1"),
        (await commands.update(spec(callee=1000)), "STALE_GENERATION", "generation 1"),
        (await commands.update(spec("y")), "UNKNOWN_SESSION", "y"),
        (await commands.delete("y"), "UNKNOWN_SESSION", "y"),
        (await commands.create(spec("x"), FIRST_PORT), "BLOCK_UNAVAILABLE", str(FIRST_PORT)),
        (await commands.create(spec("x", local="192.0.2.1")), "ADDRESS_NOT_LOCAL", "192.0.2.1"),
        (await commands.create(spec("")), "INVALID_ARGUMENT", "session_id"),
        (await commands.create(bad_address), "INVALID_ARGUMENT", "endpoints[1].remote_rtp.address"),
        (await commands.create(bad_port), "INVALID_ARGUMENT", "remote_rtp.port"),
        (await commands.create(no_mode), "INVALID_ARGUMENT", "mode"),
        (await commands.create(bad_line), "INVALID_ARGUMENT", "line"),
        ((await commands.send(media_service_pb2.Command()))[0], "INVALID_ARGUMENT", "action"),
    ):
        assert (Reason.Name(result.error.reason), words) == (f"ERROR_REASON_{reason}", words)
        assert words in result.error.message
    node = (await plane.stub.GetNode(media_service_pb2.GetNodeRequest())).node
    assert (node.capacity.blocks_in_use, node.capacity.blocks_free) == (1, BLOCKS - 1)


async def test_a_batch_is_carried_out_in_order_within_a_session(plane: Plane) -> None:
    commands = Commands(plane, await plane.acquire())
    batch = [
        command
        for name in ("a", "b", "c")
        for command in (
            creation(spec(name)),
            media_service_pb2.Command(update=media_service_pb2.UpdateSession(spec=spec(name, 2))),
            deletion(name),
            creation(spec(name)),
        )
    ]
    results = await commands.send(*batch)
    assert [result.session.generation for result in results] == [1, 2, 2, 0] * 3
    assert all(result.error.reason == node_pb2.ERROR_REASON_SESSION_DELETED for result in results[3::4])


async def test_more_calls_than_blocks_are_refused_and_watchers_are_told(plane: Plane) -> None:
    epoch = await plane.acquire()
    commands = Commands(plane, epoch)
    results = await commands.send(*(creation(spec(f"s{i}")) for i in range(BLOCKS + 1)))
    assert [result.error.reason for result in results] == [0] * BLOCKS + [node_pb2.ERROR_REASON_PORTS_EXHAUSTED]

    def full(event: event_pb2.MediaEvent) -> bool:
        return event.WhichOneof("event") == "capacity_changed" and not event.capacity_changed.capacity.accepting

    (*_, last) = await events_of(plane, epoch, full)
    assert "no port block is free" in last.capacity_changed.capacity.not_accepting_reason
    assert (await plane.get("/readyz"))[0] == 503


async def test_a_command_that_comes_too_late_is_told(plane: Plane) -> None:
    commands = Commands(plane, await plane.acquire())
    command = creation(spec())
    command.timeout.CopyFrom(Duration())
    (result,) = await commands.send(command)
    assert result.error.reason == node_pb2.ERROR_REASON_DEADLINE_EXCEEDED


async def test_a_new_owner_ends_the_streams_of_the_old_at_once(plane: Plane) -> None:
    old = await plane.acquire("old")
    commands = Commands(plane, old)
    await commands.create(spec())
    watch = plane.stub.Watch(media_service_pb2.WatchRequest(epoch=old))
    await watch.read()
    new = await plane.acquire("new")
    assert new > old
    for ended in (commands.call, watch):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_to_the_end(ended)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        details = dict(caught.value.trailing_metadata() or ())
        error = node_pb2.Error.FromString(bytes(details["sippbx-error-bin"]))
        assert error.reason == node_pb2.ERROR_REASON_FENCED
    for late in (
        Commands(plane, old).send(deletion("s")),
        plane.stub.Shutdown(media_service_pb2.ShutdownRequest(epoch=old)),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match="is not in force"):
            await late
    assert (await Commands(plane, new).delete("s")).session.session_id == "s"


async def test_nothing_that_the_old_owner_began_ends_after_the_new_one_has_acquired(plane: Plane) -> None:
    old = Commands(plane, await plane.acquire("old"))
    await old.create(spec("a"))
    batch = [deletion("a"), creation(spec("b")), creation(spec("c"))]
    for command_id, command in enumerate(batch, start=100):
        command.command_id = command_id
    await old.call.write(media_service_pb2.CommandRequest(epoch=old._epoch, commands=batch))
    await plane.acquire("new")
    found = await listed(plane)
    await asyncio.sleep(0.2)
    assert await listed(plane) == found


async def test_an_older_incarnation_is_refused_while_a_later_one_is_there(plane: Plane) -> None:
    granted = await plane.stub.Acquire(media_service_pb2.AcquireRequest(owner_id="new", incarnation=2), timeout=WAIT_S)
    commands = Commands(plane, granted.epoch)
    await commands.create(spec())
    with pytest.raises(grpc.aio.AioRpcError, match="incarnation 2 owns") as caught:
        await plane.stub.Acquire(media_service_pb2.AcquireRequest(owner_id="old", incarnation=1), timeout=WAIT_S)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert (await commands.delete("s")).session.session_id == "s"


async def test_a_session_is_made_again_with_the_source_that_was_learned(plane: Plane) -> None:
    far_ends = [bound() for _ in range(3)]
    try:
        caller, callee, learned = far_ends
        port = learned.getsockname()[1]
        wanted = spec(caller=caller.getsockname()[1], callee=callee.getsockname()[1])
        command = creation(wanted, FIRST_PORT)
        command.create.learned_sources.add(
            leg=session_pb2.LEG_CALLER,
            signalled=session_pb2.SocketAddress(address="127.0.0.1", port=caller.getsockname()[1]),
            rtp=session_pb2.SocketAddress(address="127.0.0.1", port=port),
        )
        commands = Commands(plane, await plane.acquire())
        [result] = await commands.send(command)
        caller.sendto(rtp(1), ("127.0.0.1", result.session.first_port))
        learned.sendto(rtp(2), ("127.0.0.1", result.session.first_port))
        loop = asyncio.get_running_loop()
        assert await asyncio.wait_for(loop.sock_recv(callee, 2048), WAIT_S) == rtp(2)
        deleted = await commands.delete("s")
        [statistics] = [each for each in deleted.session.statistics if each.leg == session_pb2.LEG_CALLER]
        assert (statistics.packets, [drop.packets for drop in statistics.drops]) == (1, [1])
    finally:
        for far_end in far_ends:
            far_end.close()


async def test_a_watch_resumes_without_a_gap_and_tells_of_one(plane: Plane) -> None:
    epoch = await plane.acquire()
    commands = Commands(plane, epoch)
    await commands.send(creation(spec("a")), deletion("a"), creation(spec("b")), deletion("b"))
    seen = await events_of(plane, epoch, lambda event: is_closed(event) and event.session_id == "b")
    assert [event.sequence for event in seen] == list(range(1, len(seen) + 1))
    resumed = await events_of(plane, epoch, is_closed, resume_after=seen[-2].sequence)
    assert resumed == seen[-1:]
    of_another_instance = await events_of(plane, epoch, is_closed, resume_after=10_000)
    assert of_another_instance[0].events_lost.next_sequence == 1
    assert of_another_instance[1:] == seen[: len(of_another_instance) - 1]


async def test_an_idle_watch_is_kept_alive(plane: Plane) -> None:
    epoch = await plane.acquire()
    watch = plane.stub.Watch(media_service_pb2.WatchRequest(epoch=epoch))
    await watch.read()
    async with asyncio.timeout(WAIT_S):
        heartbeat = await watch.read()
    assert heartbeat == media_service_pb2.WatchResponse()
    watch.cancel()


async def test_sessions_without_an_owner_are_closed_after_the_grace_time(tmp_path: Path) -> None:
    async with Plane(tmp_path, lease={"owner_grace_s": 1}) as plane:
        commands = Commands(plane, await plane.acquire())
        await commands.create(spec())
        commands.call.cancel()
        async with asyncio.timeout(WAIT_S):
            while (await plane.stub.GetNode(media_service_pb2.GetNodeRequest())).node.capacity.blocks_in_use:
                await asyncio.sleep(0.1)
        (*_, closed) = await events_of(plane, await plane.acquire(), is_closed)
        assert closed.session_closed.reason == event_pb2.CLOSE_REASON_OWNER_LOST


async def test_sessions_are_listed_in_pages(plane: Plane) -> None:
    commands = Commands(plane, await plane.acquire())
    await commands.send(*(creation(spec(name)) for name in ("c", "a", "b")))
    names, token = [], ""
    while True:
        request = media_service_pb2.ListSessionsRequest(page_size=2, page_token=token)
        page = await plane.stub.ListSessions(request)
        names += [session.session_id for session in page.sessions]
        if not (token := page.next_page_token):
            break
    assert names == ["a", "b", "c"]


async def test_health_is_served_and_the_socket_is_for_the_group_alone(plane: Plane) -> None:
    stub: Any = health_pb2_grpc.HealthStub(plane.channel)
    for service in ("", "sippbx.media.v1.MediaService"):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert stat.S_IMODE(plane.socket.stat().st_mode) == 0o660
    assert await plane.get("/livez") == (200, "ok\n")


async def test_metrics_count_sessions_packets_and_drops(plane: Plane) -> None:
    commands = Commands(plane, await plane.acquire())
    with bound() as caller, bound() as callee, bound() as stranger:
        await commands.create(spec(caller=caller.getsockname()[1], callee=callee.getsockname()[1]))
        caller.sendto(rtp(1), ("127.0.0.1", FIRST_PORT))
        await receive(callee)
        stranger.sendto(rtp(1), ("127.0.0.1", FIRST_PORT))
    received = ("sip_pbx_rtp_packets_total", (("direction", "rx"), ("kind", "rtp"), ("leg", "caller")))
    async with asyncio.timeout(WAIT_S):
        while (metrics := await plane.metrics())[received] == 0:
            await asyncio.sleep(0.2)
    assert metrics["sip_pbx_rtp_packets_total", (("direction", "tx"), ("kind", "rtp"), ("leg", "callee"))] == 1
    assert metrics["sip_pbx_rtp_packets_total", (("direction", "tx"), ("kind", "rtcp"), ("leg", "callee"))] == 0
    assert metrics["sip_pbx_rtp_bytes_total", received[1]] == 172
    assert metrics["sip_pbx_rtp_dropped_total", (("reason", "unknown_source"),)] == 1
    assert metrics["sip_pbx_media_sessions", ()] == 1
    assert metrics["sip_pbx_media_ports_in_use", ()] == 8
    assert metrics["sip_pbx_media_ports_capacity", ()] == 8 * BLOCKS
    assert metrics["sip_pbx_media_control_connected", ()] == 1
    await commands.delete("s")
    await asyncio.sleep(1.5)
    metrics = await plane.metrics()
    assert metrics[received] == 1, "what ended sessions received stays in the sum"
    assert metrics["sip_pbx_media_sessions_closed_total", (("reason", "deleted"),)] == 1


async def test_the_first_signal_drains_and_running_calls_go_on(plane: Plane) -> None:
    commands = Commands(plane, await plane.acquire())
    with bound() as caller, bound() as callee:
        await commands.create(spec(caller=caller.getsockname()[1], callee=callee.getsockname()[1]))
        await plane.terminate()
        await refused_while_draining(commands)
        caller.sendto(rtp(1), ("127.0.0.1", FIRST_PORT))
        assert await receive(callee) == rtp(1)
    assert (await commands.delete("s")).session.session_id == "s"
    commands.call.cancel()
    assert await plane.exit_code() == 0
    assert not plane.socket.exists()


async def test_a_call_that_was_let_in_just_before_the_signal_gets_its_session(plane: Plane) -> None:
    commands = Commands(plane, await plane.acquire())
    await commands.delete("s")  # the stream is open
    await plane.terminate()
    with bound() as caller, bound() as callee:
        created = await commands.create(spec(caller=caller.getsockname()[1], callee=callee.getsockname()[1]))
        assert created.session.session_id == "s"
        await refused_while_draining(commands)
        callee.sendto(rtp(1), ("127.0.0.1", FIRST_PORT + 4))
        assert await receive(caller) == rtp(1)


async def test_a_draining_data_plane_without_sessions_leaves_behind_its_owner(plane: Plane) -> None:
    commands = Commands(plane, await plane.acquire())
    await commands.delete("s")
    await plane.terminate()
    await asyncio.sleep(1.0)
    assert plane.process is not None
    assert plane.process.returncode is None, "its owner is still there"
    commands.call.cancel()
    assert await plane.exit_code() == 0
    assert "process.sessions_cut" not in plane.log.read_text()


async def test_a_draining_data_plane_without_sessions_does_not_wait_for_an_owner_that_stays(plane: Plane) -> None:
    commands = Commands(plane, await plane.acquire())
    await commands.delete("s")
    await plane.terminate()
    assert await plane.exit_code() == 0


async def test_a_draining_data_plane_does_not_wait_for_sessions_of_an_owner_that_is_gone(plane: Plane) -> None:
    commands = Commands(plane, await plane.acquire())
    await commands.create(spec())
    await plane.terminate()
    commands.call.cancel()
    assert await plane.exit_code() == 0
    assert "process.sessions_cut" in plane.log.read_text()


async def test_a_drain_has_an_end(tmp_path: Path) -> None:
    async with Plane(tmp_path, lease={"drain_timeout_s": 0.5}) as plane:
        commands = Commands(plane, await plane.acquire())
        await commands.create(spec())
        await plane.terminate()
        assert await plane.exit_code() == 0
        assert "process.sessions_cut" in plane.log.read_text()


async def test_the_second_signal_does_not_wait(plane: Plane) -> None:
    commands = Commands(plane, await plane.acquire())
    await commands.create(spec())
    await plane.terminate()
    assert plane.process is not None
    assert plane.process.returncode is None
    plane.process.send_signal(signal.SIGTERM)
    assert await plane.exit_code() == 0


async def test_a_shutdown_waits_for_the_last_session(plane: Plane) -> None:
    epoch = await plane.acquire()
    commands = Commands(plane, epoch)
    await commands.create(spec())
    await plane.stub.Shutdown(media_service_pb2.ShutdownRequest(epoch=epoch))
    await asyncio.sleep(0.3)
    assert plane.process is not None
    assert plane.process.returncode is None
    await commands.delete("s")
    assert await plane.exit_code() == 0


async def test_a_killed_data_plane_leaves_ports_and_socket_to_the_next(plane: Plane) -> None:
    commands = Commands(plane, await plane.acquire())
    await commands.create(spec())
    first = (await plane.stub.GetNode(media_service_pb2.GetNodeRequest())).node
    assert plane.process is not None
    (worker,) = psutil.Process(plane.process.pid).children()
    plane.process.kill()
    await plane.process.wait()
    await asyncio.to_thread(worker.wait, WAIT_S)
    await plane.channel.close()
    await plane.start()
    second = (await plane.stub.GetNode(media_service_pb2.GetNodeRequest())).node
    assert second.instance_id != first.instance_id
    commands = Commands(plane, await plane.acquire())
    assert (await commands.create(spec(), FIRST_PORT)).session.first_port == FIRST_PORT


async def test_a_session_counts_on_over_a_restart_and_metrics_count_each_packet_once(plane: Plane) -> None:
    kept = plane.socket.parent / "media-statistics.jsonl"
    received = ("sip_pbx_rtp_packets_total", (("direction", "rx"), ("kind", "rtp"), ("leg", "caller")))

    async def counted() -> float:
        async with asyncio.timeout(WAIT_S):
            while (metrics := await plane.metrics())[received] == 0:
                await asyncio.sleep(0.1)
        return metrics[received]

    with bound() as caller, bound() as callee:
        wanted = spec(caller=caller.getsockname()[1], callee=callee.getsockname()[1])
        await Commands(plane, await plane.acquire()).create(wanted)
        for sequence in range(3):
            caller.sendto(rtp(sequence), ("127.0.0.1", FIRST_PORT))
            await receive(callee)
        assert await counted() == 3
        async with asyncio.timeout(WAIT_S):
            while not kept.exists() or b'[["caller",0,3,' not in kept.read_bytes():
                await asyncio.sleep(0.1)
        assert plane.process is not None
        plane.process.kill()
        await plane.process.wait()
        await plane.channel.close()
        await plane.start()
        commands = Commands(plane, await plane.acquire())
        created = await commands.create(wanted)
        caller.sendto(rtp(3), ("127.0.0.1", created.session.first_port))
        await receive(callee)
        assert await counted() == 1
        deleted = await commands.delete("s")
        await asyncio.sleep(1.5)
        assert await counted() == 1
    assert [statistics.packets for statistics in deleted.session.statistics] == [4, 0]


async def test_settings_that_cannot_work_are_refused_by_the_name_of_their_key(tmp_path: Path) -> None:
    plane = Plane(tmp_path, media={"block_size": 6})
    await plane.spawn(SIPPBX_DATAPLANE_MEDIA__RST_S="1")
    assert await plane.exit_code() == 2
    text = plane.log.read_text()
    assert "media.block_size" in text
    assert "SIPPBX_DATAPLANE_MEDIA__RST_S" in text


async def test_a_taken_port_is_told_by_its_own_exit_code(tmp_path: Path) -> None:
    plane = Plane(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", plane.metrics_port))
        taken.listen()
        await plane.spawn()
        assert await plane.exit_code() == 3
    assert str(plane.metrics_port) in plane.log.read_text()


async def test_something_that_is_no_socket_is_not_removed(tmp_path: Path) -> None:
    plane = Plane(tmp_path)
    plane.socket.parent.mkdir()
    plane.socket.write_text("precious")
    await plane.spawn()
    assert await plane.exit_code() == 3
    assert plane.socket.read_text() == "precious"
    assert "grpc.listen" in plane.log.read_text()
