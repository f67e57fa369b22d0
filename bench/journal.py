"""What the journal costs: the same calls through a pair that keeps its calls and through one that does not.

`python -m bench.journal` starts both pairs, gives them load by turns, each INVITE challenged, no RTP, and prints the
medians of all turns: CPU time of a call on the control plane (all its processes), and the delay that it adds on the
wire from the INVITE to the forwarded INVITE, and from the callee's 200 to the caller's. Turns follow each other within
seconds, so that whatever else the machine does meets both sides alike.
"""

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median

from bench.calls_with_media import CALLEE, CALLER, HOST, percentile
from bench.processes import usage
from bench.sipload import Behaviour, Callee, Caller, PlacedCall
from tests.harness.pair import Metrics, Pair

HOLD_S = 0.5
PAUSE_S = 1.0
RTP = (HOST, 27000)
FIRST_SIP_PORT = 26300
PORT_RANGES = ([16000, 17999], [18000, 19999])
COMMITS = "sip_pbx_store_commit_seconds"


@dataclass(frozen=True, slots=True)
class Figures:
    """What one turn gave; units are in the names."""

    control_cpu_us_per_call: float
    forwarded_p50_ms: float
    forwarded_p99_ms: float
    answered_p50_ms: float
    answered_p99_ms: float
    commits_per_call: float
    commit_mean_ms: float
    failed_calls: float
    sip_retransmissions: float


@dataclass(frozen=True, slots=True)
class Side:
    """A pair and those who call through it."""

    pair: Pair
    caller: Caller
    callee: Callee

    async def turn(self, name: str, calls_per_s: float, seconds: float) -> Figures:
        """Load it for so long."""
        pids = self.pair.pids("control")
        repeated = self.caller.retransmissions + self.callee.retransmissions
        metrics, before = await asyncio.to_thread(self.pair.metrics, "control"), usage(pids)
        began = time.monotonic()
        tasks: list[asyncio.Task[tuple[PlacedCall, bool]]] = []
        async with asyncio.TaskGroup() as group:
            for number in range(round(calls_per_s * seconds)):
                tasks.append(group.create_task(self._one(f"{name}-{number}")))
                await asyncio.sleep(max(0.0, began + (number + 1) / calls_per_s - time.monotonic()))
        after = usage(pids)
        count, committing_s = _commits(metrics, await asyncio.to_thread(self.pair.metrics, "control"))
        done = [task.result() for task in tasks]
        good = [call for call, worked in done if worked]
        invited = [self.callee.calls[call.name].invited_at for call in good]
        forwarded = [1000 * (at - call.invited_at) for call, at in zip(good, invited, strict=True)]
        # The callee answers as soon as it is called.
        answered = [1000 * ((call.final_at or 0.0) - at) for call, at in zip(good, invited, strict=True)]
        return Figures(
            control_cpu_us_per_call=1e6 * (after.cpu_s - before.cpu_s) / len(done),
            forwarded_p50_ms=percentile(forwarded, 0.5),
            forwarded_p99_ms=percentile(forwarded, 0.99),
            answered_p50_ms=percentile(answered, 0.5),
            answered_p99_ms=percentile(answered, 0.99),
            commits_per_call=count / len(done),
            commit_mean_ms=1000 * committing_s / count if count else 0.0,
            failed_calls=len(done) - len(good),
            sip_retransmissions=self.caller.retransmissions + self.callee.retransmissions - repeated,
        )

    async def _one(self, name: str) -> tuple[PlacedCall, bool]:
        call = await self.caller.call(CALLEE.user, name, RTP)
        if call.status != 200:
            return call, False
        await asyncio.sleep(HOLD_S)
        return call, not call.ended_by_peer and await self.caller.hang_up(call) == 200


def _commits(before: Metrics, after: Metrics) -> tuple[float, float]:
    """Commits between two looks, and the seconds that they took."""
    names = (f"{COMMITS}_count", f"{COMMITS}_sum")
    count, seconds = (after.get((name, ()), 0.0) - before.get((name, ()), 0.0) for name in names)
    return count, seconds


def pair_of(folder: Path, number: int, *, journal: bool) -> Pair:
    """A pair with or without its journal, on ports of its own."""
    control = {"limits": {"max_calls": 10_000, "calls_per_second": 100_000}, "store": {"journal": journal}}
    return Pair(folder, control=control, dataplane={"media": {"port_range": PORT_RANGES[number], "rest_s": 0.5}})


async def measure(pairs: Sequence[Pair], calls_per_s: float, seconds: float, turns: int) -> list[list[Figures]]:
    """The figures of each pair in each turn; a first turn of each is thrown away."""
    async with contextlib.AsyncExitStack() as running:
        sides = []
        for number, pair in enumerate(pairs):
            callee_port, caller_port = FIRST_SIP_PORT + 10 * number, FIRST_SIP_PORT + 10 * number + 1
            behaviours = {CALLEE.user: Behaviour.ANSWER}
            callee = await running.enter_async_context(Callee((HOST, callee_port), pair.sip, behaviours, lambda _: RTP))
            caller = await running.enter_async_context(Caller((HOST, caller_port), pair.sip, CALLER))
            await caller.register(CALLER)
            await callee.register(CALLEE)
            sides.append(Side(pair, caller, callee))
        figures: list[list[Figures]] = [[] for _ in sides]
        for turn in range(turns + 1):
            for number, side in enumerate(sides):
                result = await side.turn(str(turn), calls_per_s, seconds)
                await asyncio.sleep(PAUSE_S)
                if turn:
                    figures[number].append(result)
                    print(f"turn {turn}, {_side(number)}: {result}", file=sys.stderr)
        return figures


def _side(number: int) -> str:
    return ("with journal", "without")[number]


def table(figures: Sequence[Sequence[Figures]]) -> str:
    """The medians side by side."""
    lines = [f"{'median of ' + str(len(figures[0])) + ' turns':<26}{_side(0):>14}{_side(1):>14}{'difference':>14}"]
    for field in fields(Figures):
        kept, lost = (median(float(getattr(turn, field.name)) for turn in side) for side in figures)
        lines.append(f"{field.name:<26}{kept:>14.3f}{lost:>14.3f}{kept - lost:>14.3f}")
    return "\n".join(lines)


def main() -> int:
    """Run, print, and tell by the exit code whether all calls went well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=50.0, help="calls a second")
    parser.add_argument("--seconds", type=float, default=6.0, help="how long a turn is")
    parser.add_argument("--turns", type=int, default=7, help="of each side")
    parser.add_argument("--folder", type=Path, help="where the stores are made")
    parser.add_argument("--json", type=Path, help="write the figures of all turns here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sippbx-bench-", dir=options.folder) as folder:
        kept, unkept = (pair_of(Path(folder) / str(number), number, journal=not number) for number in range(2))
        with kept, unkept:
            figures = asyncio.run(measure((kept, unkept), options.rate, options.seconds, options.turns))
    print(table(figures))
    if options.json:
        options.json.write_text(json.dumps([[asdict(turn) for turn in side] for side in figures], indent=1) + "\n")
    return min(1, sum(turn.failed_calls > 0 for side in figures for turn in side))


if __name__ == "__main__":
    sys.exit(main())
