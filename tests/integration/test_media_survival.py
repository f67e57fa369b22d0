"""Calls' media over kill -9 of either plane: the shipped data plane under its supervisor, real RTP, a real client."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Self, TypeVar

import psutil
import pytest
import yaml

from control.media.client import MediaClient
from control.metrics import ControlMetrics
from control.pbx.media import (
    LearnedSource,
    LocalPorts,
    MediaClosed,
    MediaEndpoint,
    MediaInput,
    MediaInterrupted,
    MediaKind,
    MediaLatched,
    MediaMode,
    MediaOpened,
    MediaSpec,
    MediaUpdated,
    RestoredSession,
    first_port_of,
)
from control.pbx.records import ErrorEvent, LegName, StreamRecord
from control.sip.address import Address
from control.sip.sdp import PayloadType
from dataplane.service.statistics import StatisticsFile
from sippbx.softphone.media import RtpEndpoint
from tests.harness.pair import NETWORK

pytestmark = pytest.mark.integration

T = TypeVar("T", bound=MediaInput)

RELAY, CALLER, CALLEE = f"{NETWORK}.71", f"{NETWORK}.72", f"{NETWORK}.73"
HOSTS = {LegName.CALLER: CALLER, LegName.CALLEE: CALLEE}
FIRST_PORT = 26_400
PHONE_PORT = 26_500
METRICS_PORT = 26_600
WAIT_S = 30.0
# A client that was stopped for so long finds its probe overdue when it wakes up, and its connection not to be trusted.
PROBED_S = 2.5


class Plane:
    """A supervised data plane."""

    def __init__(self, folder: Path) -> None:
        self.target = f"unix://{folder}/run/media.sock"
        self._statistics = StatisticsFile(
            folder / "run" / "media-statistics.jsonl", clock=time.monotonic, utc_now=lambda: datetime.now(UTC)
        )
        settings = {
            "grpc": {"listen": self.target},
            "media": {"port_range": [FIRST_PORT, FIRST_PORT + 63]},
            "metrics": {"bind": RELAY, "port": METRICS_PORT},
            "lease": {},
        }
        self._config = folder / "dataplane.yaml"
        self._config.write_text(yaml.safe_dump(settings))
        self._log = folder / "dataplane.log"
        self._supervisor: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            command = [sys.executable, "-m", "dataplane", "--supervise", "--config", str(self._config)]
            self._supervisor = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def stop(self) -> None:
        assert self._supervisor is not None
        for _ in range(3):  # to drain, not to wait for that, not to wait for anything
            self._supervisor.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._supervisor.wait(WAIT_S)
                return
        raise AssertionError(f"the data plane does not stop\n{self._log.read_text()}")

    def kept(self, session_id: str) -> dict[LegName, int]:
        """Packets by leg, as they would outlive the process."""
        views = [view for view in self._statistics.read() if view.spec.session_id == session_id]
        return {LegName(stream.leg.value): stream.packets for view in views for stream in view.streams}

    def main(self) -> psutil.Process:
        """The process that serves the contract."""
        assert self._supervisor is not None
        [main] = psutil.Process(self._supervisor.pid).children()
        return main

    def worker(self) -> psutil.Process:
        """The process that relays."""
        [worker] = [child for child in self.main().children() if "dataplane.engine.worker" in child.cmdline()]
        return worker


class Call:
    """Two phones that talk over a session."""

    def __init__(self, session_id: str = "s1", number: int = 0) -> None:
        self.session_id = session_id
        self.generation = 1
        self.phones = {
            leg: RtpEndpoint(host, PHONE_PORT + 4 * number, stream=1 + number) for leg, host in HOSTS.items()
        }
        self.ports: tuple[LocalPorts, ...] = ()
        self.learned: dict[LegName, LearnedSource] = {}
        self.settled_at = dict.fromkeys(LegName, 0)

    def spec(self) -> MediaSpec:
        return MediaSpec(
            self.session_id, self.generation, MediaMode.BYPASS, tuple(self._endpoint(leg) for leg in LegName)
        )

    def _endpoint(self, leg: LegName) -> MediaEndpoint:
        phone = self.phones[leg]
        return MediaEndpoint(
            leg,
            0,
            MediaKind.AUDIO,
            RELAY,
            # The caller says that it is somewhere else on its host, as one behind NAT does.
            remote_rtp=Address(HOSTS[leg], phone.port + (100 if leg is LegName.CALLER else 0)),
            signalling_address=HOSTS[leg],
            payload_types=(PayloadType(0, "PCMU", 8000),),
        )

    def connect(self) -> None:
        for pair in self.ports:
            self.phones[pair.leg].connect(RELAY, pair.rtp_port)

    def restorable(self) -> RestoredSession:
        return RestoredSession(self.spec(), first_port_of(self.ports), tuple(self.learned.values()))

    def start_talking(self) -> None:
        for phone in self.phones.values():
            phone.start_sending()

    async def stop_talking(self) -> None:
        for phone in self.phones.values():
            await phone.stop_sending()

    def received(self) -> dict[LegName, int]:
        return {leg: phone.report.received for leg, phone in self.phones.items()}

    async def hears_more(self) -> None:
        """Until each side has heard ten more packets."""
        before = self.received()
        for leg, phone in self.phones.items():
            await phone.wait_for(before[leg] + 10, WAIT_S)

    def missing(self) -> dict[LegName, int]:
        """Packets that a side sent and the other never received, since all sources were learned."""
        return {
            leg: sum(
                frame >= self.settled_at[leg]
                for frame in self.phones[leg.opposite].report.missing_of(phone.report.sent)
            )
            for leg, phone in self.phones.items()
        }

    async def close(self) -> None:
        for phone in self.phones.values():
            await phone.close()


class Owner:
    """A control plane as far as media goes."""

    def __init__(self, plane: Plane, *, incarnation: int = 1, restored: Sequence[RestoredSession] = ()) -> None:
        self.answers: asyncio.Queue[MediaInput] = asyncio.Queue()
        self.fenced = asyncio.Event()
        self.errors: list[ErrorEvent] = []
        self.client = MediaClient(
            target=plane.target,
            owner_id="test",
            command_timeout_s=WAIT_S,
            lost_timeout_s=WAIT_S,
            metrics=ControlMetrics(),
            fenced=self.fenced.set,
            publish=self.errors.append,
            incarnation=incarnation,
        )
        self.client.restore(restored)
        self.client.start(self.answers.put_nowait)

    async def __aenter__(self) -> Self:
        await until(lambda: self.client.trouble is None)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.stop()

    async def answer(self, kind: type[T]) -> T:
        """The next answer of a kind; others are passed over."""
        async with asyncio.timeout(WAIT_S):
            while not isinstance(answer := await self.answers.get(), kind):
                pass
        return answer

    async def open(self, call: Call) -> None:
        """Let a call talk, with what there is to learn of its far ends learned."""
        self.client.open(call.spec())
        call.ports = (await self.answer(MediaOpened)).ports
        call.connect()
        call.start_talking()
        await call.hears_more()
        while len(call.learned) < 2:
            source = (await self.answer(MediaLatched)).source
            if source.rtp is not None:
                call.learned[source.leg] = source
        call.settled_at = {leg: phone.report.sent for leg, phone in call.phones.items()}

    async def final(self, call: Call) -> MediaClosed:
        self.client.close(call.session_id)
        return await self.answer(MediaClosed)

    async def vanish(self) -> None:
        """Be gone as a process is that was killed: nothing is said, nothing is closed."""
        task = self.client._task
        assert task is not None
        task.cancel()
        await asyncio.wait([task])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.005)


def heard(closed: MediaClosed) -> dict[LegName, StreamRecord]:
    assert closed.streams is not None
    return {stream.leg: stream for stream in closed.streams}


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[Plane]:
    started = Plane(tmp_path)
    started.start()
    yield started
    started.stop()


@pytest.fixture
async def call() -> AsyncIterator[Call]:
    made = Call()
    yield made
    await made.close()


# ----------------------------------------------------------------------------------------------- the control plane dies


async def test_not_a_packet_is_lost_while_the_control_plane_is_gone_and_when_the_next_one_comes(
    plane: Plane, call: Call
) -> None:
    first = Owner(plane)
    async with first:
        await first.open(call)
        await first.vanish()
        await call.hears_more()
        async with Owner(plane, restored=[call.restorable()]) as second:
            await call.hears_more()
            await call.stop_talking()
            await until(lambda: call.missing() == {LegName.CALLER: 0, LegName.CALLEE: 0})
            closed = await second.final(call)
    assert (closed.interruptions, closed.gap_s) == (0, 0.0)
    assert {leg: stream.packets for leg, stream in heard(closed).items()} == {
        leg: phone.report.sent for leg, phone in call.phones.items()
    }


async def test_a_control_plane_that_wakes_up_late_is_fenced_and_changes_nothing(plane: Plane, call: Call) -> None:
    first = Owner(plane)
    async with first:
        await first.open(call)
        await first.vanish()
    old = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.harness.media_owner",
        plane.target,
        str(FIRST_PORT),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert old.stdout is not None
    try:
        async with asyncio.timeout(WAIT_S):
            assert (await old.stdout.readline(), await old.stdout.readline()) == (b"connected\n", b"changed\n")
        old.send_signal(signal.SIGSTOP)
        async with Owner(plane, incarnation=3, restored=[call.restorable()]) as new:
            await call.hears_more()
            await asyncio.sleep(PROBED_S)
            old.send_signal(signal.SIGCONT)
            async with asyncio.timeout(WAIT_S):
                told = (await old.stdout.read()).split()
            assert told[-1] == b"fenced"
            assert await old.wait() == 0
            assert not new.fenced.is_set()
            await call.hears_more()
            assert isinstance((await new.final(call)).streams, tuple)
    finally:
        if old.returncode is None:
            old.kill()
            await old.wait()


# -------------------------------------------------------------------------------------------------- the data plane dies


@pytest.mark.parametrize("kill", [os.kill, os.killpg], ids=["main process", "whole group"])
async def test_a_killed_data_plane_is_back_with_its_calls_where_they_were(
    plane: Plane, call: Call, kill: Callable[[int, int], None]
) -> None:
    loop = asyncio.get_running_loop()
    async with Owner(plane) as owner:
        await owner.open(call)
        await until(lambda: min(plane.kept(call.session_id).values(), default=0) >= 20)
        kept = plane.kept(call.session_id)
        killed_at = loop.time()
        kill(plane.main().pid, signal.SIGKILL)
        await until(lambda: owner.client.trouble is not None)
        interrupted = await owner.answer(MediaInterrupted)
        await call.hears_more()
        back_after_s = loop.time() - killed_at
        stranger = RtpEndpoint(CALLER, PHONE_PORT + 80, stream=99)
        try:
            stranger.connect(RELAY, call.ports[0].rtp_port)
            await stranger.send_frames(5)
        finally:
            await stranger.close()
        await call.hears_more()
        await call.stop_talking()
        closed = await owner.final(call)
    assert (closed.interruptions, closed.gap_s) == (1, interrupted.gap_s)
    assert 0 < closed.gap_s < back_after_s
    for leg, phone in call.phones.items():
        assert kept[leg] + 20 <= heard(closed)[leg].packets <= phone.report.sent
        assert phone.report.streams == {1}, "nobody but the learned source is heard"
        assert (phone.report.duplicates, phone.report.damaged) == (0, 0)
    assert heard(closed)[LegName.CALLER].dropped_packets == 5


async def test_a_data_plane_that_stands_still_for_a_while_goes_on_relaying_and_loses_no_call(
    plane: Plane, call: Call
) -> None:
    async with Owner(plane) as owner:
        await owner.open(call)
        main = plane.main()
        main.send_signal(signal.SIGSTOP)
        try:
            await until(lambda: owner.client.trouble is not None)
            await call.hears_more()
        finally:
            main.send_signal(signal.SIGCONT)
        await until(lambda: owner.client.trouble is None)
        await call.stop_talking()
        await until(lambda: call.missing() == {LegName.CALLER: 0, LegName.CALLEE: 0})
        closed = await owner.final(call)
    assert (closed.interruptions, closed.gap_s) == (0, 0.0)
    assert closed.streams is not None


async def test_a_killed_worker_is_an_interruption_that_the_calls_hear_of(plane: Plane, call: Call) -> None:
    async with Owner(plane) as owner:
        await owner.open(call)
        plane.worker().send_signal(signal.SIGKILL)
        interrupted = await owner.answer(MediaInterrupted)
        assert interrupted.interruptions == 1
        assert interrupted.gap_s > 0
        await call.hears_more()
        await call.stop_talking()
        closed = await owner.final(call)
        assert (closed.interruptions, closed.gap_s) == (1, interrupted.gap_s)
        assert not owner.errors


async def test_a_data_plane_that_dies_again_and_again_loses_no_call_and_no_count(plane: Plane, call: Call) -> None:
    async with Owner(plane) as owner:
        await owner.open(call)
        await until(lambda: min(plane.kept(call.session_id).values(), default=0) >= 20)
        kept = plane.kept(call.session_id)
        for number in range(1, 4):
            plane.main().send_signal(signal.SIGKILL)
            assert (await owner.answer(MediaInterrupted)).interruptions == number
        await call.hears_more()
        await call.stop_talking()
        closed = await owner.final(call)
    assert closed.interruptions == 3
    assert all(heard(closed)[leg].packets >= kept[leg] + 10 for leg in LegName)


async def test_both_planes_dead_one_after_the_other_cost_a_gap_and_no_call(plane: Plane, call: Call) -> None:
    first = Owner(plane)
    async with first:
        await first.open(call)
        await first.vanish()
    plane.main().send_signal(signal.SIGKILL)
    async with Owner(plane, restored=[call.restorable()]) as second:
        assert (await second.answer(MediaInterrupted)).interruptions == 1
        await call.hears_more()
        call.generation = 2
        second.client.update(call.spec())
        assert (await second.answer(MediaUpdated)).generation == 2
        await call.hears_more()
        await call.stop_talking()
        assert heard(await second.final(call))[LegName.CALLER].packets > 0


async def test_a_call_that_ends_while_there_is_no_data_plane_has_the_statistics_that_were_kept(
    plane: Plane, call: Call
) -> None:
    async with Owner(plane) as owner:
        await owner.open(call)
        await until(lambda: min(plane.kept(call.session_id).values(), default=0) >= 20)
        kept = plane.kept(call.session_id)
        await call.stop_talking()
        plane.main().send_signal(signal.SIGKILL)
        await until(lambda: owner.client.trouble is not None)
        closed = await owner.final(call)
    assert closed.interruptions == 1
    assert all(heard(closed)[leg].packets >= kept[leg] for leg in LegName)
