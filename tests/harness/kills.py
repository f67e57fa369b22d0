"""Rounds of calls through the pair whose processes are killed or stopped meanwhile, and what must hold afterwards.

A round places calls both ways between two phones, with media in each. At a moment drawn from a seed a blow falls on one
plane or on both; then the calls go on, some offer the session again, and each is ended by one of its parties. What went
wrong is a list of sentences, empty when nothing did: the far ends' own notes, packets counted one by one at both ends,
the records, the events, the journal, and what the processes hold.
"""

import asyncio
import contextlib
import random
import signal
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import psutil

from bench.processes import usage
from bench.rtpload import Pair as RtpPair
from bench.rtpload import RtpLoad, RtpReport
from bench.sipmessage import HostPort
from tests.harness.kill_phones import Delay, Phone
from tests.harness.kill_plans import Manner, Moment, Plan
from tests.harness.kill_verdicts import Evidence, Judge, Result
from tests.harness.pair import NETWORK, Pair

EAST: Final[HostPort] = (f"{NETWORK}.81", 26800)
WEST: Final[HostPort] = (f"{NETWORK}.82", 26800)
RTP_PORTS: Final = range(26810, 27090, 2)
SETTINGS: Final[dict[str, Any]] = {
    "control": {
        "sip": {"timers": {"t1_s": 0.25, "t2_s": 1.0, "t4_s": 1.0}, "ring_timeout_s": 120},
        "trunks": [
            {"name": "east", "destination": f"{EAST[0]}:{EAST[1]}"},
            {"name": "west", "destination": f"{WEST[0]}:{WEST[1]}"},
        ],
        "routes": [
            {"prefix": "8", "trunk": "west", "from": ["east"]},
            {"prefix": "7", "trunk": "east", "from": ["west"]},
        ],
        "users": [],
        "limits": {"max_calls": 1000, "calls_per_second": 1000},
        "media": {"lost_timeout_s": 60, "command_timeout_s": 2},
    },
    "dataplane": {"media": {"port_range": [16000, 19999], "rest_s": 1}, "lease": {"owner_grace_s": 120}},
}

UP_S: Final = 30.0
QUIET_S: Final = 90.0
# A supervisor bears ten deaths within a minute.
MAX_DEATHS: Final = 6
# The scrape that counts the tasks, and its connection, are among them.
SCRAPE_TASKS: Final = 2


@dataclass(frozen=True, slots=True)
class Held:
    """What a quiet pair holds, by plane."""

    descriptors: dict[str, int]
    tasks: dict[str, float]


class Striker:
    """Kills and stops planes of a pair, over many rounds."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self._deaths: Counter[str] = Counter()

    def rest(self) -> None:
        """Between rounds: a supervisor that has seen many deaths is replaced before it gives up."""
        for plane, deaths in self._deaths.items():
            if deaths > MAX_DEATHS:
                self.pair.kill(plane)
                self.pair.start(plane)
                self.pair.wait_until_ready(plane)
                self._deaths[plane] = 0

    async def strike(self, plan: Plan, chance: random.Random) -> float:
        """One blow; returns the seconds from the (last) start of a process until both planes are ready."""
        apart_s, gone_s = 10 ** chance.uniform(-2.5, 0), chance.uniform(0.1, 0.5)
        for number, plane in enumerate(plan.planes):
            if number:
                await asyncio.sleep(apart_s)
            match plan.manner:
                case Manner.PROCESS:
                    await self._kill_process(plane)
                case Manner.GROUP:
                    self.pair.kill(plane)
                case Manner.STOP:
                    self.pair.freeze(plane)
        if plan.manner is Manner.STOP:
            await asyncio.sleep(plan.stop_s)
            for plane in plan.planes:
                self.pair.thaw(plane)
        if plan.manner is Manner.GROUP:
            await asyncio.sleep(gone_s)
            for plane in plan.planes:
                self.pair.start(plane)
                self._deaths[plane] = 0
        started_at = time.monotonic()
        for plane in plan.planes:
            await asyncio.to_thread(self.pair.wait_until_ready, plane)
        await asyncio.to_thread(self.pair.wait_until_ready, "control")
        return time.monotonic() - started_at

    async def _kill_process(self, plane: str) -> None:
        """Kill the plane's own process, its supervisor staying; wait until that one has seen it."""
        while len(pids := self.pair.pids(plane)) < 2:
            await asyncio.sleep(0.005)
        self._deaths[plane] += 1
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pids[1])
            process.send_signal(signal.SIGKILL)
            await asyncio.to_thread(process.wait, UP_S)


class Round:
    """One round on a pair."""

    def __init__(self, striker: Striker, plan: Plan) -> None:
        self._striker, self._pair, self.plan = striker, striker.pair, plan
        self._chance = random.Random(plan.seed)
        self._gate, self._recovered, self._place = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._phones = tuple(
            Phone(
                local,
                self._pair.sip,
                self._gate,
                delay_of=lambda name: plan.delay(int(name)),
                rtp_of=lambda name, host=local[0]: (host, RTP_PORTS[int(name) % len(RTP_PORTS)]),  # type: ignore[misc]
            )
            for local in (EAST, WEST)
        )
        self._rtp = RtpLoad()
        self._streams: dict[int, int] = {}
        self._answers: defaultdict[int, list[int]] = defaultdict(list)
        self._pauses = [(self._chance.uniform(0.2, 1.0), self._chance.uniform(0.2, 1.0)) for _ in range(plan.calls)]
        self.result = Result(plan)

    async def run(self) -> Result:
        """Place the calls, strike, let them end, and judge."""
        started_at, old = time.monotonic(), len(self._pair.cdrs())
        await asyncio.to_thread(self._striker.rest)
        before = await self._held()
        async with self._rtp, self._phones[0], self._phones[1]:
            async with asyncio.TaskGroup() as group:
                blows = group.create_task(self._strike_anywhere()) if self.plan.moment is Moment.ANY else None
                for number in range(self.plan.calls):
                    group.create_task(self._live(number))
                    await asyncio.sleep(1 / self.plan.calls_per_s)
                if blows is None:
                    await self._strike_in_place()
            report = await self._rtp.finish()
            await self._until(lambda: len(self._pair.cdrs()) - old >= self.plan.calls, "each call has a line")
            await self._held_again(before)
            Judge(self.result, self._evidence(self._pair.cdrs()[old:], report)).judge()
        self.result.seconds = time.monotonic() - started_at
        return self.result

    # ---- what happens ----------------------------------------------------------------------------------------------

    async def _live(self, number: int) -> None:
        """One call from its INVITE to its BYE."""
        caller, callee = self._sides(number)
        before_s, after_s = self._pauses[number]
        side = await caller.call(f"{8 if number % 2 else 7}{number}", str(number))
        if side.status != 200:
            return
        far = callee.sides[str(number)]
        assert side.remote_rtp is not None
        assert far.remote_rtp is not None
        (self._streams[number],) = await self._rtp.add([RtpPair(side.rtp, side.remote_rtp, far.rtp, far.remote_rtp)])
        phone, own = (caller, side) if number // 4 % 2 else (callee, far)
        delay = self.plan.delay(number)
        if delay in {Delay.CHANGE, Delay.BYE}:
            await self._place.wait()
        if delay is Delay.CHANGE:
            self._answers[number].append(await phone.change(own))
        if delay is not Delay.BYE:
            if self.plan.moment is not Moment.ANY:
                await self._recovered.wait()
            await asyncio.sleep(before_s)
            match number % 3:
                case 0 if delay is not Delay.CHANGE:
                    self._answers[number].append(await phone.change(own))
                case 1:
                    self._answers[number] += [await phone.ask(own, "OPTIONS"), await phone.ask(own, "UPDATE")]
                case _:
                    pass
            await asyncio.sleep(after_s)
        await self._rtp.silence([self._streams[number]])
        await asyncio.sleep(0.1)
        self._answers[number].append(await phone.hang_up(own))

    async def _strike_in_place(self) -> None:
        """Strike when every call is where it shall be, and open the gate soon after."""
        plan, chance = self.plan, self._chance
        placed = [number for number in range(plan.calls) if plan.delay(number) not in {Delay.ACK, Delay.ANSWER}]
        await self._until(lambda: all(number in self._streams for number in placed), "all calls are up")
        self._place.set()
        await self._until(lambda: all(self._is_placed(number) for number in range(plan.calls)), "all are in place")
        await asyncio.sleep(chance.uniform(1.0, 2.0) if plan.kills_dataplane else chance.uniform(0.0, 1.0))
        opening = asyncio.create_task(self._open_gate(chance.uniform(0.0, 1.5)))
        if plan.planes:
            await self._strike()
        await opening
        self._recovered.set()

    async def _open_gate(self, after_s: float) -> None:
        await asyncio.sleep(after_s)
        self._gate.set()

    async def _strike_anywhere(self) -> None:
        """Strike while calls come and go."""
        plan, chance = self.plan, self._chance
        self._gate.set()
        span_s = plan.calls / plan.calls_per_s
        for _ in range(plan.blows if plan.planes else 0):
            await asyncio.sleep(chance.uniform(0.2, max(0.3, span_s / plan.blows - 1.0)))
            await self._strike()

    async def _strike(self) -> None:
        struck_at = time.monotonic()
        self.result.back_s.append(await self._striker.strike(self.plan, self._chance))
        self.result.away_s += time.monotonic() - struck_at
        shown = await asyncio.to_thread(self._pair.metric, "control", "sip_pbx_active_calls")
        if self.plan.moment is Moment.TALKING and shown != self.plan.calls:
            self.result.wrong.append(f"{shown:g} calls are shown afterwards")

    def _is_placed(self, number: int) -> bool:
        name, (caller, callee) = str(number), self._sides(number)
        match self.plan.delay(number):
            case Delay.ANSWER:
                return caller.sides[name].rang
            case Delay.ACK:
                return caller.sides[name].status == 200
            case Delay.CHANGE:
                return bool(caller.sides[name].changes or callee.sides[name].changes)
            case Delay.BYE:
                return bool(caller.sides[name].byes or callee.sides[name].byes)
            case Delay.NOTHING:
                return True

    # ---- building blocks -------------------------------------------------------------------------------------------

    def _sides(self, number: int) -> tuple[Phone, Phone]:
        """The phone that places this call, and the one that takes it."""
        east, west = self._phones
        return (east, west) if number % 2 else (west, east)

    def _evidence(self, lines: Sequence[dict[str, Any]], report: RtpReport) -> Evidence:
        rows, endings, left = self._stored([str(line["call_id"]) for line in lines])
        sides = {}
        for number in range(self.plan.calls):
            caller, callee = self._sides(number)
            sides[number] = caller.sides[str(number)], callee.sides.get(str(number))
        return Evidence(sides, self._streams, self._answers, report, lines, rows, endings, left)

    async def _until(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + UP_S
        while not condition():
            if time.monotonic() > end:
                raise AssertionError(f"not within {UP_S} s: {what}\n{self._pair.logs()}")
            await asyncio.sleep(0.02)

    async def _held(self) -> Held:
        """What the pair holds once nothing runs and every port has rested."""
        await asyncio.to_thread(self._pair.wait, self._is_quiet, QUIET_S, "all tables are empty")
        tasks = {
            "control": self._pair.metric("control", "sip_pbx_event_loop_tasks"),
            "dataplane": self._pair.metric("dataplane", "sip_pbx_media_event_loop_tasks"),
        }
        return Held({plane: usage(self._pair.pids(plane)).descriptors for plane in tasks}, tasks)

    async def _held_again(self, before: Held) -> None:
        """Back to the start level: soon, because connections and tasks take a moment to end."""
        end = time.monotonic() + UP_S
        while (wrong := self._grown(before, await self._held())) and time.monotonic() < end:
            await asyncio.sleep(0.2)
        self.result.wrong += wrong

    @staticmethod
    def _grown(before: Held, after: Held) -> list[str]:
        wrong = []
        if any(after.descriptors[plane] > before.descriptors[plane] for plane in after.descriptors):
            wrong.append(f"descriptors: {before.descriptors} -> {after.descriptors}")
        if any(after.tasks[plane] > before.tasks[plane] + SCRAPE_TASKS for plane in after.tasks):
            wrong.append(f"tasks: {before.tasks} -> {after.tasks}")
        return wrong

    def _is_quiet(self) -> bool:
        dataplane = ("sip_pbx_media_sessions", "sip_pbx_media_ports_in_use", "sip_pbx_media_ports_quarantined")
        return not (
            self._pair.metric("control", "sip_pbx_active_calls")
            or any(self._pair.metric("dataplane", name) for name in dataplane)
            or self._stored(())[2]
        )

    def _stored(self, call_ids: Sequence[str]) -> tuple[Counter[str], Counter[str], int]:
        """From the store: rows of records and `call.ended` events of these calls, and the rows of the journal."""
        with self._database() as database:
            records = database.execute("SELECT call_id FROM call_records").fetchall()
            events = database.execute("SELECT call_id FROM events WHERE type = 'call.ended'").fetchall()
            (left,) = database.execute("SELECT count(*) FROM calls").fetchone()
        wanted = set(call_ids)
        rows, ended = (Counter(call_id for (call_id,) in found if call_id in wanted) for found in (records, events))
        return rows, ended, int(left)

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        database = sqlite3.connect(f"file:{self._pair.store_path}?mode=ro", uri=True, timeout=10)
        try:
            yield database
        finally:
            database.close()
