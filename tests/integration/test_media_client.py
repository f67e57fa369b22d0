"""control.media.client against a scripted data plane, over real gRPC."""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from control.media.client import MediaClient
from control.metrics import ControlMetrics
from control.pbx.media import (
    LearnedSource,
    LocalPorts,
    MediaClosed,
    MediaFailed,
    MediaFailure,
    MediaInput,
    MediaInterrupted,
    MediaLatched,
    MediaLost,
    MediaOpened,
    MediaSpec,
    MediaUpdated,
    RestoredSession,
)
from control.pbx.records import ErrorEvent, LegName
from control.sip.address import Address
from sippbx.media.v1 import event_pb2, node_pb2, session_pb2
from tests.harness.media_server import ScriptedMediaServer
from tests.harness.media_specs import media_spec

pytestmark = pytest.mark.integration

PORTS = (LocalPorts(LegName.CALLER, 0, 10_000, 10_001), LocalPorts(LegName.CALLEE, 0, 10_004, 10_005))


class Phone:
    """Whoever wishes for media: a client and its answers."""

    def __init__(
        self,
        target: str,
        *,
        command_timeout_s: float = 5.0,
        lost_timeout_s: float = 10.0,
        restored: Sequence[RestoredSession] = (),
    ) -> None:
        self.metrics = ControlMetrics()
        self.answers: asyncio.Queue[MediaInput] = asyncio.Queue()
        self.fenced = asyncio.Event()
        self.errors: list[ErrorEvent] = []
        self.client = MediaClient(
            target=target,
            owner_id="test",
            command_timeout_s=command_timeout_s,
            lost_timeout_s=lost_timeout_s,
            metrics=self.metrics,
            fenced=self.fenced.set,
            publish=self.errors.append,
        )
        self.client.restore(restored)
        self.client.start(self.answers.put_nowait)

    async def answer(self) -> MediaInput:
        return await asyncio.wait_for(self.answers.get(), 10)

    async def connected(self) -> None:
        await until(lambda: self.client.trouble is None)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ScriptedMediaServer]:
    scripted = ScriptedMediaServer(tmp_path / "media.sock")
    await scripted.start()
    yield scripted
    scripted.answering.set()
    await scripted.stop()


@pytest.fixture
async def phone(server: ScriptedMediaServer) -> AsyncIterator[Phone]:
    made = Phone(server.target)
    await made.connected()
    await until(lambda: len(server.watch_requests) == 1)
    yield made
    await made.client.stop()


async def test_a_session_is_opened_changed_and_closed_with_its_statistics(
    phone: Phone, server: ScriptedMediaServer
) -> None:
    phone.client.open(media_spec())
    assert await phone.answer() == MediaOpened("s1", PORTS)
    phone.client.update(media_spec(generation=2))
    assert await phone.answer() == MediaUpdated("s1", 2, PORTS)
    phone.client.close("s1")
    closed = await phone.answer()
    assert isinstance(closed, MediaClosed)
    assert closed.streams is not None
    assert [(stream.leg, stream.kind, stream.packets) for stream in closed.streams] == [(LegName.CALLER, "audio", 250)]
    assert server.commands() == ["create s1 1", "update s1 2", "delete s1"]
    count = phone.metrics.registry.get_sample_value(
        "sip_pbx_media_rpc_seconds_count", {"method": "create", "code": "ok"}
    )
    assert count == 1


async def test_what_is_wished_in_one_iteration_travels_in_one_message(
    phone: Phone, server: ScriptedMediaServer
) -> None:
    for number in range(300):
        phone.client.open(media_spec(f"s{number}"))
    for _ in range(300):
        await phone.answer()
    assert [len(batch) for batch in server.batches] == [256, 44]


async def test_an_answer_never_comes_from_within_the_wish(phone: Phone) -> None:
    phone.client.close("unknown")
    assert phone.answers.empty()
    assert await phone.answer() == MediaClosed("unknown", None)


async def test_exhausted_ports_are_told_and_remembered(phone: Phone, server: ScriptedMediaServer) -> None:
    server.blocks = 1
    phone.client.open(media_spec("s1"))
    await phone.answer()
    phone.client.open(media_spec("s2"))
    failed = await phone.answer()
    assert isinstance(failed, MediaFailed)
    assert failed.failure is MediaFailure.PORTS_EXHAUSTED
    assert phone.client.unavailable() is MediaFailure.PORTS_EXHAUSTED


async def test_room_is_known_again_soon_after_it_came_back(phone: Phone, server: ScriptedMediaServer) -> None:
    server.emit(capacity_changed=event_pb2.CapacityChanged(capacity=node_pb2.Capacity(accepting=True)))
    await until(lambda: phone.client.unavailable() is MediaFailure.PORTS_EXHAUSTED)
    await until(lambda: phone.client.unavailable() is None)


async def test_a_draining_data_plane_is_unavailable_with_its_reason(server: ScriptedMediaServer) -> None:
    server.accepting, server.not_accepting_reason = False, "draining"
    phone = Phone(server.target)
    await until(lambda: phone.client.trouble == "draining")
    assert phone.client.unavailable() is MediaFailure.UNAVAILABLE
    await phone.client.stop()


async def test_no_data_plane_is_unavailable_and_waited_for(tmp_path: Path) -> None:
    server = ScriptedMediaServer(tmp_path / "media.sock")
    phone = Phone(server.target)
    assert phone.client.unavailable() is MediaFailure.UNAVAILABLE
    phone.client.open(media_spec())
    await asyncio.sleep(0.1)
    await server.start()
    assert await phone.answer() == MediaOpened("s1", PORTS)
    assert phone.client.unavailable() is None
    await phone.client.stop()
    await server.stop()


async def test_after_a_cut_to_the_same_instance_what_has_no_result_is_sent_again(
    phone: Phone, server: ScriptedMediaServer
) -> None:
    phone.client.open(media_spec("s1"))
    await phone.answer()
    server.answering.clear()
    phone.client.update(media_spec("s1", 2))
    phone.client.open(media_spec("s2"))
    await until(lambda: len(server.commands()) == 3)
    await server.stop()
    server.answering.set()
    server.batches.clear()
    await server.start(new_instance=False)
    assert {type(await phone.answer()), type(await phone.answer())} == {MediaUpdated, MediaOpened}
    assert server.commands() == ["update s1 2", "create s2 1"]


async def test_a_new_instance_gets_every_session_again_on_its_ports(phone: Phone, server: ScriptedMediaServer) -> None:
    for session_id in ("s1", "s2", "s3"):
        phone.client.open(media_spec(session_id))
        await phone.answer()
    phone.client.close("s1")
    await phone.answer()
    phone.client.update(media_spec("s3", 2))
    await phone.answer()
    server.batches.clear()
    await server.restart()
    await until(lambda: len(server.sessions) == 2)
    assert sorted(server.commands()) == ["create s2 1 at 10008", "create s3 2 at 10016"]
    told = {await phone.answer(), await phone.answer()}
    assert {(answer.session_id, type(answer)) for answer in told} == {
        ("s2", MediaInterrupted),
        ("s3", MediaInterrupted),
    }
    phone.client.close("s3")
    closed = await phone.answer()
    assert isinstance(closed, MediaClosed)
    assert closed.interruptions == 1
    assert closed.gap_s > 0


async def test_ports_that_are_still_held_for_a_moment_are_tried_again(
    phone: Phone, server: ScriptedMediaServer
) -> None:
    phone.client.open(media_spec())
    await phone.answer()
    server.errors["create"] = [node_pb2.ERROR_REASON_BIND_FAILED] * 2
    await server.restart()
    await until(lambda: "s1" in server.sessions)
    await until(lambda: phone.metrics.registry.get_sample_value("sip_pbx_media_restores_total", {"result": "ok"}) == 1)
    assert isinstance(await phone.answer(), MediaInterrupted)
    assert phone.answers.empty()


async def test_a_data_plane_that_stays_away_costs_the_session_once(server: ScriptedMediaServer) -> None:
    phone = Phone(server.target, lost_timeout_s=0.2)
    await phone.connected()
    phone.client.open(media_spec())
    await phone.answer()
    await server.stop()
    lost = await phone.answer()
    assert isinstance(lost, MediaLost)
    assert lost.session_id == "s1"
    assert [(error.component, error.kind) for error in phone.errors] == [("media", "data-plane-lost")]
    phone.client.close("s1")
    closed = await phone.answer()
    assert isinstance(closed, MediaClosed)
    assert (closed.streams, closed.interruptions) == (None, 1)
    await asyncio.sleep(0.3)
    assert phone.answers.empty()
    await phone.client.stop()


async def test_a_data_plane_that_hangs_is_left_and_taken_again(server: ScriptedMediaServer) -> None:
    phone = Phone(server.target, command_timeout_s=0.2)
    await phone.connected()
    server.answering.clear()
    phone.client.open(media_spec())
    failed = await phone.answer()
    assert isinstance(failed, MediaFailed)
    assert failed.failure is MediaFailure.UNAVAILABLE
    await until(lambda: server.epoch == 2)
    server.answering.set()
    await phone.connected()
    phone.client.open(media_spec("s2"))
    assert isinstance(await phone.answer(), MediaOpened)
    await phone.client.stop()


async def test_connection_to_a_data_plane_that_hung_is_given_up_at_once(server: ScriptedMediaServer) -> None:
    phone = Phone(server.target, command_timeout_s=0.2)
    await phone.connected()
    await until(lambda: len(server.watch_requests) == 1)
    before = _open_sockets()
    gc.disable()
    try:
        for number in range(3):
            server.answering.clear()
            phone.client.open(media_spec(f"s{number}"))
            await phone.answer()
            await until(lambda epoch=2 + number: server.epoch == epoch)  # type: ignore[misc]
            server.answering.set()
            await phone.connected()
        await until(lambda: _open_sockets() == before)
    finally:
        gc.enable()
    await phone.client.stop()


def _open_sockets() -> int:
    """Of this process, which has both ends of each connection."""
    return sum(entry.is_socket() for entry in Path("/proc/self/fd").iterdir())


async def test_sessions_that_nobody_wants_are_deleted(server: ScriptedMediaServer) -> None:
    predecessor = Phone(server.target)
    await predecessor.connected()
    for session_id in ("old-1", "old-2"):
        predecessor.client.open(media_spec(session_id))
        await predecessor.answer()
    await predecessor.client.stop()
    phone = Phone(server.target)
    await until(lambda: not server.sessions)
    assert phone.answers.empty()
    await phone.client.stop()


async def test_a_session_that_the_data_plane_gave_up_is_lost_once(phone: Phone, server: ScriptedMediaServer) -> None:
    phone.client.open(media_spec())
    await phone.answer()
    for _ in range(2):
        server.emit("s1", session_closed=event_pb2.SessionClosed(reason=event_pb2.CLOSE_REASON_WORKER_LOST))
    lost = await phone.answer()
    assert isinstance(lost, MediaLost)
    assert "worker_lost" in lost.detail
    phone.client.close("s1")
    closed = await phone.answer()
    assert isinstance(closed, MediaClosed)
    assert closed.streams, "the statistics of the tombstone"


async def test_lost_events_are_made_up_for_by_the_list(phone: Phone, server: ScriptedMediaServer) -> None:
    for session_id in ("s1", "s2"):
        phone.client.open(media_spec(session_id))
        await phone.answer()
    del server.sessions["s1"]
    server.emit(events_lost=event_pb2.EventsLost(next_sequence=100))
    lost = await phone.answer()
    assert isinstance(lost, MediaLost)
    assert lost.session_id == "s1"
    assert phone.answers.empty()


async def test_events_resume_behind_the_last_one_seen(phone: Phone, server: ScriptedMediaServer) -> None:
    for _ in range(3):
        server.emit("s1", silence=event_pb2.Silence(leg=session_pb2.LEG_CALLER))
    server.emit("s1", resumed=event_pb2.Resumed(leg=session_pb2.LEG_CALLER))
    await until(lambda: phone.client._last_sequence == 4)
    await server.restart(new_instance=False)
    await until(lambda: len(server.watch_requests) == 2)
    await server.restart()
    await until(lambda: len(server.watch_requests) == 3)
    assert [request.resume_after for request in server.watch_requests] == [0, 4, 0]


FAR_END = Address("192.0.2.1", 4000)


def restorable(session_id: str, generation: int, first_port: int) -> RestoredSession:
    source = LearnedSource(LegName.CALLER, 0, FAR_END, Address("192.0.2.1", 4444), None)
    return RestoredSession(media_spec(session_id, generation, remote=FAR_END), first_port, (source,))


async def opened(server: ScriptedMediaServer, *specs: MediaSpec) -> None:
    """Sessions of a control plane that is no more."""
    predecessor = Phone(server.target)
    await predecessor.connected()
    for spec in specs:
        predecessor.client.open(spec)
        assert isinstance(await predecessor.answer(), MediaOpened)
    await predecessor.client.stop()
    server.batches.clear()


async def test_sessions_of_an_earlier_process_are_adopted_amended_and_made_again_as_needed(
    server: ScriptedMediaServer,
) -> None:
    as_wanted = media_spec("s1", 3, remote=FAR_END)
    await opened(server, as_wanted, media_spec("s2", 1), media_spec("s3"))
    phone = Phone(
        server.target, restored=[restorable("s1", 3, 10_000), restorable("s2", 2, 10_008), restorable("s4", 5, 10_400)]
    )
    interrupted = await phone.answer()
    assert isinstance(interrupted, MediaInterrupted)
    assert (interrupted.session_id, interrupted.interruptions) == ("s4", 1)
    await until(lambda: "s3" not in server.sessions and server.sessions["s2"].generation == 2)
    assert sorted(server.commands()) == ["create s4 5 at 10400", "delete s3", "update s2 2"]
    [create] = [command.create for batch in server.batches for command in batch if command.HasField("create")]
    assert [(source.leg, source.rtp.port) for source in create.learned_sources] == [(session_pb2.LEG_CALLER, 4444)]
    assert phone.answers.empty()
    await phone.client.stop()


async def test_a_restored_session_that_was_closed_before_the_connection_gives_its_statistics(
    server: ScriptedMediaServer,
) -> None:
    await opened(server, media_spec("s1"), media_spec("s2"))
    phone = Phone(server.target, restored=[restorable("s1", 1, 10_000), restorable("s2", 1, 10_008)])
    phone.client.update(media_spec("s2", 2))
    phone.client.close("s1")
    answers = [await phone.answer(), await phone.answer()]
    assert sorted(type(answer).__name__ for answer in answers) == ["MediaClosed", "MediaUpdated"]
    assert sorted(server.commands()) == ["delete s1", "update s2 2"]
    await phone.client.stop()


async def test_restored_sessions_are_lost_once_when_no_data_plane_comes(tmp_path: Path) -> None:
    restored = [restorable("s1", 1, 10_000), restorable("s2", 1, 10_008)]
    phone = Phone(f"unix://{tmp_path}/nobody.sock", lost_timeout_s=0.2, restored=restored)
    assert [type(await phone.answer()) for _ in restored] == [MediaLost, MediaLost]
    await asyncio.sleep(0.3)
    assert phone.answers.empty()
    await phone.client.stop()


async def test_a_latched_source_is_told_once_and_given_to_a_new_instance(
    phone: Phone, server: ScriptedMediaServer
) -> None:
    phone.client.open(media_spec("s1", remote=FAR_END))
    await phone.answer()
    signalled = session_pb2.SocketAddress(address="192.0.2.1", port=4000)
    latched = event_pb2.SourceLatched(
        leg=session_pb2.LEG_CALLER,
        signalled=signalled,
        source=session_pb2.SocketAddress(address="192.0.2.1", port=4444),
        differs_from_signalled=True,
    )
    for _ in range(2):
        server.emit("s1", source_latched=latched)
    source = LearnedSource(LegName.CALLER, 0, FAR_END, Address("192.0.2.1", 4444), None)
    assert await phone.answer() == MediaLatched("s1", source)
    server.batches.clear()
    await server.restart()
    assert isinstance(await phone.answer(), MediaInterrupted)
    [command] = server.batches[0]
    assert [learned.rtp.port for learned in command.create.learned_sources] == [4444]


async def test_an_interruption_within_the_data_plane_is_told_unless_it_was_before_this_process(
    server: ScriptedMediaServer,
) -> None:
    as_wanted = restorable("s1", 1, 10_000)
    await opened(server, as_wanted.spec)
    interruption = event_pb2.RelayInterrupted()
    interruption.gap.FromMilliseconds(250)
    server.emit(relay_interrupted=interruption)
    phone = Phone(server.target, restored=[as_wanted])
    await until(lambda: phone.client._last_sequence == 1)
    server.emit(relay_interrupted=interruption)
    assert await phone.answer() == MediaInterrupted("s1", 1, 0.25)
    await server.restart(new_instance=False)
    await until(lambda: len(server.watch_requests) == 3)
    server.emit(relay_interrupted=interruption)
    assert await phone.answer() == MediaInterrupted("s1", 2, 0.5)
    assert phone.answers.empty()
    await phone.client.stop()


async def test_a_fenced_client_says_so_and_never_comes_back(phone: Phone, server: ScriptedMediaServer) -> None:
    phone.client.open(media_spec())
    await phone.answer()
    server.epoch += 1
    phone.client.update(media_spec(generation=2))
    await asyncio.wait_for(phone.fenced.wait(), 10)
    epoch = server.epoch
    await asyncio.sleep(0.2)
    assert server.epoch == epoch
    assert phone.client.unavailable() is MediaFailure.UNAVAILABLE


async def test_a_bug_in_a_call_costs_nobody_the_data_plane(server: ScriptedMediaServer) -> None:
    phone = Phone(server.target)
    await phone.connected()

    def broken(answer: MediaInput) -> None:
        phone.answers.put_nowait(answer)
        raise RuntimeError("a bug")

    phone.client._take = broken
    for session_id in ("s1", "s2"):
        phone.client.open(media_spec(session_id))
        assert isinstance(await phone.answer(), MediaOpened)
    assert server.epoch == 1
    labels = {"component": "media", "kind": "answer_failed"}
    assert phone.metrics.registry.get_sample_value("sip_pbx_errors_total", labels) == 2
    await phone.client.stop()


async def test_stopping_answers_what_has_no_answer_yet(server: ScriptedMediaServer) -> None:
    phone = Phone(server.target)
    await phone.connected()
    server.answering.clear()
    phone.client.open(media_spec())
    await phone.client.stop()
    assert isinstance(await phone.answer(), MediaFailed)
