"""The userspace engine with its worker process and real UDP."""

import asyncio
import errno
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from dataplane.engine.engine import BindFailedError, EngineChanged, EngineEvent, SessionLost
from dataplane.engine.userspace import UserspaceEngine
from dataplane.ports import PortBlock
from dataplane.session.relay import DropReason, FirstPacket, Resumed, Silence, SourceLatched, StreamSnapshot
from dataplane.session.spec import (
    Direction,
    Endpoint,
    LatchPolicy,
    Leg,
    MediaKind,
    MediaMode,
    PayloadType,
    SessionSpec,
    plan,
)

pytestmark = pytest.mark.integration

FIRST_PORT = 21_000
WAIT_S = 5.0


def rtp(sequence: int, payload: bytes = b"\xd5" * 160) -> bytes:
    return b"\x80\x00" + sequence.to_bytes(2, "big") + (160 * sequence).to_bytes(4, "big") + b"\0\0\0\x01" + payload


def rtcp(marker: int = 0) -> bytes:
    return b"\x80\xc8\x00\x06\0\0\0\x01" + marker.to_bytes(4, "big") + bytes(16)


class FarEnd:
    """A phone's pair of media sockets, on consecutive ports."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.address = address
        for port in range(21_800, 22_000, 2):
            self.rtp, self.rtcp = (socket.socket(family, socket.SOCK_DGRAM) for _ in range(2))
            try:
                self.rtp.bind((address, port))
                self.rtcp.bind((address, port + 1))
            except OSError:
                self.close()
            else:
                break
        for bound in (self.rtp, self.rtcp):
            bound.setblocking(False)
        self.port = port

    def close(self) -> None:
        self.rtp.close()
        self.rtcp.close()

    def endpoint(self, leg: Leg, line: int = 0) -> Endpoint:
        return Endpoint(
            leg=leg,
            line=line,
            branch="",
            kind=MediaKind.AUDIO if line == 0 else MediaKind.VIDEO,
            local_address=self.address,
            remote_rtp=(self.address, self.port),
            remote_rtcp=None,
            rtcp_mux=False,
            direction=Direction.SENDRECV,
            latch_policy=LatchPolicy.NAT_AWARE,
            signalling_address="",
            payload_types=(PayloadType(0, "PCMU", 8000),),
        )


async def receive(bound: socket.socket) -> bytes:
    async with asyncio.timeout(WAIT_S):
        return await asyncio.get_running_loop().sock_recv(bound, 4096)


async def nothing_comes(bound: socket.socket) -> bool:
    try:
        async with asyncio.timeout(0.1):
            await asyncio.get_running_loop().sock_recv(bound, 4096)
    except TimeoutError:
        return True
    return False


class Bench:
    """An engine, what it reported, and far ends."""

    def __init__(self) -> None:
        self.events: list[EngineEvent] = []
        self.engine = UserspaceEngine(
            self.events.append, silence_s=1.0, receive_buffer_bytes=262_144, clock=time.monotonic
        )
        self.ends: list[FarEnd] = []

    def far_end(self, address: str = "127.0.0.1") -> FarEnd:
        self.ends.append(FarEnd(address))
        return self.ends[-1]

    async def call(self, *endpoints: Endpoint, name: str = "s", generation: int = 1, block: int = 0) -> int:
        """Puts a session in force; its first port."""
        first = FIRST_PORT + 8 * block
        spec = SessionSpec(name, generation, MediaMode.BYPASS, endpoints, "")
        await self.engine.apply(plan(spec, PortBlock(first, 8)))
        return first

    async def audio_call(self) -> tuple[FarEnd, FarEnd, int]:
        caller, callee = self.far_end(), self.far_end()
        first = await self.call(caller.endpoint(Leg.CALLER), callee.endpoint(Leg.CALLEE))
        return caller, callee, first

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                await asyncio.sleep(0.01)

    async def stream(self, leg: Leg, name: str = "s") -> StreamSnapshot:
        streams = (await self.engine.collect([name]))[name]
        return next(stream for stream in streams if stream.leg is leg)

    def descriptors(self) -> int:
        assert self.engine.worker_pid is not None
        return len(list(Path(f"/proc/{self.engine.worker_pid}/fd").iterdir()))


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    await made.engine.start()
    yield made
    await made.engine.close()
    for end in made.ends:
        end.close()


async def test_rtp_and_rtcp_are_relayed_both_ways_unchanged(bench: Bench) -> None:
    caller, callee, first = await bench.audio_call()
    caller.rtp.sendto(rtp(1, b"from the caller"), ("127.0.0.1", first))
    assert await receive(callee.rtp) == rtp(1, b"from the caller")
    callee.rtp.sendto(rtp(9, b"from the callee"), ("127.0.0.1", first + 4))
    assert await receive(caller.rtp) == rtp(9, b"from the callee")
    caller.rtcp.sendto(rtcp(1), ("127.0.0.1", first + 1))
    assert await receive(callee.rtcp) == rtcp(1)
    callee.rtcp.sendto(rtcp(2), ("127.0.0.1", first + 5))
    assert await receive(caller.rtcp) == rtcp(2)
    stream = await bench.stream(Leg.CALLER)
    assert (stream.packets, stream.relayed_rtp, stream.rtcp_packets, stream.relayed_rtcp) == (1, 1, 1, 1)


async def test_packets_leave_from_the_port_that_the_far_end_sends_to(bench: Bench) -> None:
    caller, callee, first = await bench.audio_call()
    caller.rtp.sendto(rtp(1), ("127.0.0.1", first))
    async with asyncio.timeout(WAIT_S):
        _, source = await asyncio.get_running_loop().sock_recvfrom(callee.rtp, 4096)
    assert source == ("127.0.0.1", first + 4)


@pytest.mark.parametrize("addresses", [("::1", "::1"), ("127.0.0.1", "::1")], ids=["IPv6", "IPv4 to IPv6"])
async def test_ipv6_is_relayed_and_joined_to_ipv4(bench: Bench, addresses: tuple[str, str]) -> None:
    caller, callee = (bench.far_end(address) for address in addresses)
    first = await bench.call(caller.endpoint(Leg.CALLER), callee.endpoint(Leg.CALLEE))
    for sequence in (1, 2):
        caller.rtp.sendto(rtp(sequence), (caller.address, first))
        assert await receive(callee.rtp) == rtp(sequence)
        callee.rtp.sendto(rtp(sequence), (callee.address, first + 4))
        assert await receive(caller.rtp) == rtp(sequence)


async def test_video_is_relayed_beside_audio_and_only_negotiated_lines_are_bound(bench: Bench) -> None:
    before = bench.descriptors()
    caller, callee, first = await bench.audio_call()
    assert bench.descriptors() == before + 4
    video_caller, video_callee = bench.far_end(), bench.far_end()
    endpoints = (
        caller.endpoint(Leg.CALLER),
        callee.endpoint(Leg.CALLEE),
        video_caller.endpoint(Leg.CALLER, 1),
        video_callee.endpoint(Leg.CALLEE, 1),
    )
    await bench.call(*endpoints, generation=2)
    assert bench.descriptors() == before + 8
    video_caller.rtp.sendto(rtp(1, b"picture"), ("127.0.0.1", first + 2))
    assert await receive(video_callee.rtp) == rtp(1, b"picture")
    caller.rtp.sendto(rtp(1, b"sound"), ("127.0.0.1", first))
    assert await receive(callee.rtp) == rtp(1, b"sound")
    await bench.call(*endpoints[:2], generation=3)
    assert bench.descriptors() == before + 4
    assert [stream.packets for stream in await bench.engine.remove("s")] == [1, 0, 1, 0]
    assert bench.descriptors() == before


async def test_a_half_bound_block_is_rolled_back_whole(bench: Bench) -> None:
    before = bench.descriptors()
    caller, callee = bench.far_end(), bench.far_end()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as squatter:
        squatter.bind(("127.0.0.1", FIRST_PORT + 5))
        with pytest.raises(BindFailedError) as caught:
            await bench.call(caller.endpoint(Leg.CALLER), callee.endpoint(Leg.CALLEE))
        assert (caught.value.port, caught.value.errno) == (FIRST_PORT + 5, errno.EADDRINUSE)
        assert bench.descriptors() == before
    await bench.call(caller.endpoint(Leg.CALLER), callee.endpoint(Leg.CALLEE))


async def test_a_line_that_cannot_be_bound_leaves_the_call_as_it_was(bench: Bench) -> None:
    caller, callee, first = await bench.audio_call()
    before = bench.descriptors()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as squatter:
        squatter.bind(("127.0.0.1", FIRST_PORT + 7))
        with pytest.raises(BindFailedError):
            await bench.call(
                caller.endpoint(Leg.CALLER),
                callee.endpoint(Leg.CALLEE),
                caller.endpoint(Leg.CALLER, 1),
                generation=2,
            )
    assert bench.descriptors() == before
    caller.rtp.sendto(rtp(1), ("127.0.0.1", first))
    assert await receive(callee.rtp) == rtp(1)


async def test_an_address_of_another_host_is_told_by_its_error(bench: Bench) -> None:
    endpoint = replace(bench.far_end().endpoint(Leg.CALLER), local_address="192.0.2.1")
    with pytest.raises(BindFailedError) as caught:
        await bench.call(endpoint)
    assert caught.value.errno == errno.EADDRNOTAVAIL


async def test_a_stranger_is_counted_and_never_relayed(bench: Bench) -> None:
    caller, callee, first = await bench.audio_call()
    attacker = bench.far_end("127.0.0.66")
    caller.rtp.sendto(rtp(1), ("127.0.0.1", first))
    await receive(callee.rtp)
    attacker.rtp.sendto(rtp(2, b"injected"), ("127.0.0.1", first))
    attacker.rtcp.sendto(rtcp(), ("127.0.0.1", first + 1))
    assert await nothing_comes(callee.rtp)
    assert await nothing_comes(callee.rtcp)
    callee.rtp.sendto(rtp(1), ("127.0.0.1", first + 4))
    assert await receive(caller.rtp) == rtp(1)
    assert await nothing_comes(attacker.rtp)
    assert dict((await bench.stream(Leg.CALLER)).drops) == {DropReason.UNKNOWN_SOURCE: 2}


async def test_a_packet_that_is_too_big_is_counted_and_not_cut(bench: Bench) -> None:
    caller, callee, first = await bench.audio_call()
    caller.rtp.sendto(rtp(1, bytes(3000)), ("127.0.0.1", first))
    caller.rtp.sendto(rtp(2), ("127.0.0.1", first))
    assert await receive(callee.rtp) == rtp(2)
    assert dict((await bench.stream(Leg.CALLER)).drops) == {DropReason.TOO_BIG: 1}


async def test_a_call_is_reported_from_its_first_packet_to_silence_and_back(bench: Bench) -> None:
    caller, callee = bench.far_end(), bench.far_end()
    listening = replace(callee.endpoint(Leg.CALLEE), direction=Direction.RECVONLY)
    first = await bench.call(caller.endpoint(Leg.CALLER), listening)
    caller.rtp.sendto(rtp(1), ("127.0.0.1", first))
    await bench.until(lambda: any(isinstance(event, Silence) for event in bench.events))
    caller.rtp.sendto(rtp(2), ("127.0.0.1", first))
    await bench.until(lambda: any(isinstance(event, Resumed) for event in bench.events))
    told = [event for event in bench.events if not isinstance(event, EngineChanged)]
    assert [type(event) for event in told] == [FirstPacket, SourceLatched, Silence, Resumed]


async def test_a_dead_worker_is_replaced_and_calls_go_on_where_they_were(bench: Bench) -> None:
    caller, callee = bench.far_end(), bench.far_end()
    behind_nat = replace(caller.endpoint(Leg.CALLER), remote_rtp=("127.0.0.1", 9), payload_types=())
    first = await bench.call(behind_nat, callee.endpoint(Leg.CALLEE))
    for sequence in (1, 2, 3):
        caller.rtp.sendto(rtp(sequence), ("127.0.0.1", first))
        await receive(callee.rtp)
    assert (await bench.stream(Leg.CALLER)).packets == 3
    killed = bench.engine.worker_pid
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    await bench.until(lambda: not bench.engine.ready)
    await bench.until(lambda: bench.engine.ready)
    assert bench.engine.restarts == 1
    callee.rtp.sendto(rtp(1), ("127.0.0.1", first + 4))
    assert await receive(caller.rtp) == rtp(1), "to the source that was learned, before it sends again"
    caller.rtp.sendto(rtp(4), ("127.0.0.1", first))
    assert await receive(callee.rtp) == rtp(4)
    assert (await bench.stream(Leg.CALLER)).packets == 4, "figures go on from where they were last heard"
    assert len([event for event in bench.events if isinstance(event, FirstPacket) and event.leg is Leg.CALLER]) == 1


async def test_a_request_that_a_worker_died_under_is_carried_out_by_the_next(bench: Bench) -> None:
    caller, callee = bench.far_end(), bench.far_end()
    killed = bench.engine.worker_pid
    assert killed is not None
    os.kill(killed, signal.SIGSTOP)
    request = asyncio.create_task(bench.call(caller.endpoint(Leg.CALLER), callee.endpoint(Leg.CALLEE)))
    await asyncio.sleep(0.05)
    os.kill(killed, signal.SIGKILL)
    first = await request
    caller.rtp.sendto(rtp(1), ("127.0.0.1", first))
    assert await receive(callee.rtp) == rtp(1)


async def test_a_session_whose_ports_are_taken_meanwhile_is_reported_lost(bench: Bench) -> None:
    caller, callee, first = await bench.audio_call()
    caller.rtp.sendto(rtp(1), ("127.0.0.1", first))
    await receive(callee.rtp)
    await bench.engine.collect()
    killed = bench.engine.worker_pid
    assert killed is not None
    squatter = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    os.kill(killed, signal.SIGKILL)
    with squatter:
        while True:  # the ports are free from the worker's end to the next one's first breath
            try:
                squatter.bind(("127.0.0.1", first + 1))
                break
            except OSError:
                time.sleep(0.001)  # noqa: ASYNC251 (the event loop must not start the next worker yet)
        await bench.until(lambda: any(isinstance(event, SessionLost) for event in bench.events))
    (lost,) = (event for event in bench.events if isinstance(event, SessionLost))
    assert lost.session_id == "s"
    assert str(first + 1) in lost.problem
    assert lost.streams[0].packets == 1


async def test_a_worker_ends_with_its_engine(bench: Bench) -> None:
    assert bench.engine.worker_pid is not None
    worker = psutil.Process(bench.engine.worker_pid)
    await bench.engine.close()
    assert not psutil.pid_exists(worker.pid)


async def test_many_commands_at_once_do_not_hold_up_packets(bench: Bench) -> None:
    caller, callee, first = await bench.audio_call()
    caller.rtp.sendto(rtp(0), ("127.0.0.1", first))
    await receive(callee.rtp)
    others = [caller.endpoint(Leg.CALLER), callee.endpoint(Leg.CALLEE)]
    storm = asyncio.gather(*(bench.call(*others, name=f"s{i}", block=1 + i) for i in range(90)))
    slowest = 0.0
    for sequence in range(1, 40):
        sent_at = time.monotonic()
        caller.rtp.sendto(rtp(sequence), ("127.0.0.1", first))
        assert await receive(callee.rtp) == rtp(sequence)
        slowest = max(slowest, time.monotonic() - sent_at)
    await storm
    assert slowest < 0.5
    assert len(await bench.engine.collect()) == 91


async def test_nothing_is_left_of_sessions_that_are_gone(bench: Bench) -> None:
    caller, callee = bench.far_end(), bench.far_end()
    before = bench.descriptors()
    for _ in range(5):
        names = [f"s{i}" for i in range(20)]
        endpoints = caller.endpoint(Leg.CALLER), callee.endpoint(Leg.CALLEE)
        await asyncio.gather(*(bench.call(*endpoints, name=name, block=i) for i, name in enumerate(names)))
        await asyncio.gather(*(bench.engine.remove(name) for name in names))
    assert bench.descriptors() == before
    assert await bench.engine.collect() == {}
    assert await bench.engine.remove("s1") == ()
