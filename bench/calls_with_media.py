"""A hundred calls with media held for a minute: what the pair does with them and what it costs.

`python -m bench.calls_with_media` starts a supervised pair, registers a caller and a callee, sets the calls up, runs
RTP both ways through each, and compares with the targets. Beside them, at the same time and from the same generator, a
few streams run with no relay between: their delay is subtracted. bench/README.md tells how each figure is measured.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median

from bench.metrics import quantile
from bench.processes import Usage, command_line, cpu_s_by_process, usage
from bench.rtpload import INTERVAL_S, Pair, RtpLoad, RtpReport, direct_pair
from bench.sipload import Behaviour, Callee, Caller, PlacedCall
from bench.sipmessage import Account, HostPort
from tests.harness.pair import USERS
from tests.harness.pair import Pair as PlanePair

CALLER, CALLEE = Account("1001", USERS["1001"]), Account("1002", USERS["1002"])
HOST = "127.0.0.21"
CALLER_SIP, CALLEE_SIP = (HOST, 26200), (HOST, 26210)
CALLER_RTP_FIRST, CALLEE_RTP_FIRST, DIRECT_RTP_FIRST = 27000, 28000, 29000
DIRECT_PAIRS = 10
SETTLE_S = 2.0
DEADLINE_S = 30.0
RTP_RANGE = (16000, 19999)


@dataclass(frozen=True, slots=True)
class Figures:
    """What one run gave; units are in the names. Added delay is relayed minus direct, percentile by percentile."""

    calls: float
    failed_calls: float
    sip_retransmissions: float
    sent_packets: float
    lost_packets: float
    duplicate_packets: float
    reordered_packets: float
    foreign_packets: float
    packets_per_s: float
    added_p50_ms: float
    added_p99_ms: float
    added_p999_ms: float
    relayed_p50_ms: float
    relayed_p99_ms: float
    relayed_p999_ms: float
    relayed_max_ms: float
    direct_p50_ms: float
    direct_p99_ms: float
    direct_p999_ms: float
    forwarded_p50_ms: float
    forwarded_p99_ms: float
    histogram_p50_ms: float
    histogram_p99_ms: float
    planes_cpu_percent: float
    generator_cpu_percent: float
    others_cpu_percent: float
    generator_late_slots: float
    planes_rss_mb: float
    planes_pss_mb: float


@dataclass(frozen=True, slots=True)
class Target:
    """A bound: the figure must be under it, or equal to it when `exact`."""

    field: str
    bound: float
    exact: bool = False

    def met(self, figures: Figures) -> bool:
        value = float(getattr(figures, self.field))
        return value == self.bound if self.exact else value < self.bound

    def __str__(self) -> str:
        return f"{'=' if self.exact else '<'} {self.bound:g}"


TARGETS = (
    Target("failed_calls", 0, exact=True),
    Target("lost_packets", 0, exact=True),
    Target("foreign_packets", 0, exact=True),
    Target("added_p99_ms", 5.0),
    Target("forwarded_p99_ms", 100.0),
    Target("planes_cpu_percent", 70.0),
    Target("planes_rss_mb", 300.0),
)


@dataclass(frozen=True, slots=True)
class Window:
    """What was used while the calls were held."""

    seconds: float
    before: Usage
    after: Usage
    generator_cpu_s: float
    others_cpu_s: float

    @property
    def planes_cpu_s(self) -> float:
        return self.after.cpu_s - self.before.cpu_s


def run(calls: int, seconds: float, calls_per_s: float, folder: Path) -> Figures:
    """One run on a pair of its own, with the timers of RFC 3261."""
    control = {
        "sip": {"timers": {"t1_s": 0.5, "t2_s": 4.0, "t4_s": 5.0}},
        "limits": {"max_calls": calls, "calls_per_second": 10 * calls_per_s},
    }
    with PlanePair(folder, control=control, dataplane={"media": {"port_range": list(RTP_RANGE)}}) as pair:
        return asyncio.run(_measure(pair, calls, seconds, calls_per_s))


async def _measure(pair: PlanePair, calls: int, seconds: float, calls_per_s: float) -> Figures:
    callee = Callee(CALLEE_SIP, pair.sip, {CALLEE.user: Behaviour.ANSWER}, lambda name: _callee_rtp(int(name)))
    caller = Caller(CALLER_SIP, pair.sip, CALLER)
    async with RtpLoad() as rtp, callee, caller:
        await caller.register(CALLER)
        await callee.register(CALLEE)
        await rtp.add([direct_pair(*_direct_rtp(number)) for number in range(DIRECT_PAIRS)])
        placed = await _place(caller, callee, rtp, calls, calls_per_s)
        await asyncio.sleep(SETTLE_S)
        window = await _hold(pair, rtp, seconds)
        report = await rtp.finish()
        failed = await _hang_up(caller, callee, placed, calls_per_s)
    metrics = await asyncio.to_thread(pair.metrics, "control")
    answered = [call for call in placed if call.status == 200]
    forwarded_ms = [1000 * (callee.calls[call.name].invited_at - call.invited_at) for call in answered]
    return _figures(
        window,
        report,
        failed=failed,
        retransmissions=caller.retransmissions + callee.retransmissions,
        forwarded_ms=forwarded_ms,
        histogram_ms=[1000 * quantile(metrics, "sip_pbx_call_setup_seconds", share) for share in (0.5, 0.99)],
    )


async def _place(caller: Caller, callee: Callee, rtp: RtpLoad, calls: int, calls_per_s: float) -> list[PlacedCall]:
    """Set the calls up at an even pace; the media of each runs as soon as it is answered."""

    async def one(number: int) -> PlacedCall:
        call = await caller.call(CALLEE.user, str(number), _caller_rtp(number), deadline_s=DEADLINE_S)
        if call.remote_rtp is not None:
            far = callee.calls[call.name]
            await rtp.add([Pair(_caller_rtp(number), call.remote_rtp, far.rtp, far.remote_rtp)])
        return call

    async with asyncio.TaskGroup() as group:
        tasks = []
        for number in range(calls):
            tasks.append(group.create_task(one(number)))
            await asyncio.sleep(1 / calls_per_s)
    return [task.result() for task in tasks]


async def _hold(pair: PlanePair, rtp: RtpLoad, seconds: float) -> Window:
    pids = pair.pids()
    await rtp.measure()
    started_at, before = time.monotonic(), usage(pids)
    all_before = cpu_s_by_process()
    await asyncio.sleep(seconds)
    all_after = cpu_s_by_process()
    used = {pid: cpu_s - all_before.get(pid, 0.0) for pid, cpu_s in all_after.items()}
    window = Window(
        time.monotonic() - started_at,
        before,
        usage(pids),
        generator_cpu_s=used[rtp.pid],
        others_cpu_s=sum(cpu_s for pid, cpu_s in used.items() if pid not in {rtp.pid, *pids}),
    )
    for pid in pids:
        each = usage([pid])
        print(f"  {pid:>7} {each.rss_bytes / 1e6:6.1f} MB  {command_line(pid)[:90]}", file=sys.stderr)
    return window


async def _hang_up(caller: Caller, callee: Callee, placed: Sequence[PlacedCall], calls_per_s: float) -> int:
    """End every call; returns how many failed: not answered or acknowledged, ended early or on one side alone."""

    async def one(call: PlacedCall) -> bool:
        if call.status != 200 or call.ended_by_peer or not callee.calls[call.name].acknowledged:
            return False
        return await caller.hang_up(call) == 200

    async with asyncio.TaskGroup() as group:
        tasks = []
        for call in placed:
            tasks.append(group.create_task(one(call)))
            await asyncio.sleep(1 / calls_per_s)
    await asyncio.sleep(1.0)
    return sum(not (task.result() and callee.calls[call.name].ended) for task, call in zip(tasks, placed, strict=True))


def _figures(
    window: Window,
    report: RtpReport,
    *,
    failed: int,
    retransmissions: int,
    forwarded_ms: Sequence[float],
    histogram_ms: Sequence[float],
) -> Figures:
    relayed, direct = report.relayed, report.direct
    return Figures(
        calls=sum(not stream.direct for stream in report.streams) / 2,
        failed_calls=failed,
        sip_retransmissions=retransmissions,
        sent_packets=report.total("sent"),
        lost_packets=report.total("lost"),
        duplicate_packets=report.total("duplicates"),
        reordered_packets=report.total("reordered"),
        foreign_packets=report.foreign,
        packets_per_s=relayed.count / window.seconds,
        added_p50_ms=(relayed.p50_us - direct.p50_us) / 1000,
        added_p99_ms=(relayed.p99_us - direct.p99_us) / 1000,
        added_p999_ms=(relayed.p999_us - direct.p999_us) / 1000,
        relayed_p50_ms=relayed.p50_us / 1000,
        relayed_p99_ms=relayed.p99_us / 1000,
        relayed_p999_ms=relayed.p999_us / 1000,
        relayed_max_ms=relayed.max_us / 1000,
        direct_p50_ms=direct.p50_us / 1000,
        direct_p99_ms=direct.p99_us / 1000,
        direct_p999_ms=direct.p999_us / 1000,
        forwarded_p50_ms=percentile(forwarded_ms, 0.5),
        forwarded_p99_ms=percentile(forwarded_ms, 0.99),
        histogram_p50_ms=histogram_ms[0],
        histogram_p99_ms=histogram_ms[1],
        planes_cpu_percent=100 * window.planes_cpu_s / window.seconds,
        generator_cpu_percent=100 * window.generator_cpu_s / window.seconds,
        others_cpu_percent=100 * window.others_cpu_s / window.seconds,
        generator_late_slots=report.late_slots,
        planes_rss_mb=window.after.rss_bytes / 1e6,
        planes_pss_mb=window.after.pss_bytes / 1e6,
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, NaN where there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")


def _caller_rtp(number: int) -> HostPort:
    return HOST, CALLER_RTP_FIRST + 4 * number


def _callee_rtp(number: int) -> HostPort:
    return HOST, CALLEE_RTP_FIRST + 4 * number


def _direct_rtp(number: int) -> tuple[HostPort, HostPort]:
    return (HOST, DIRECT_RTP_FIRST + 4 * number), (HOST, DIRECT_RTP_FIRST + 4 * number + 2)


def medians(runs: Sequence[Figures]) -> Figures:
    """The median of each figure."""
    return Figures(**{field.name: median(float(getattr(run, field.name)) for run in runs) for field in fields(Figures)})


def table(result: Figures, runs: Sequence[Figures]) -> str:
    """The figures with their targets, and their range where there were several runs."""
    targets = {target.field: target for target in TARGETS}
    lines = [f"{'figure':<24}{'median':>12}  {'target':<10}{'':<6}{'range' if len(runs) > 1 else ''}"]
    for field in fields(Figures):
        values = [float(getattr(run, field.name)) for run in runs]
        target = targets.get(field.name)
        verdict = "" if target is None else "pass" if target.met(result) else "FAIL"
        spread = f"{min(values):.3f} to {max(values):.3f}" if len(runs) > 1 else ""
        value = f"{getattr(result, field.name):.3f}".rstrip("0").rstrip(".")
        lines.append(f"{field.name:<24}{value:>12}  {'' if target is None else str(target):<10}{verdict:<6}{spread}")
    return "\n".join(line.rstrip() for line in lines)


def main() -> int:
    """Run, print, and tell by the exit code whether every target was met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the calls are held")
    parser.add_argument("--rate", type=float, default=20.0, help="calls set up a second")
    parser.add_argument("--repeat", type=int, default=1, help="runs; medians are judged")
    parser.add_argument("--json", type=Path, help="write the figures of all runs here")
    options = parser.parse_args()
    runs: list[Figures] = []
    for number in range(options.repeat):
        print(f"run {number + 1} of {options.repeat}: {options.calls} calls, {options.seconds:g} s", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix="sippbx-bench-") as folder:
            runs.append(run(options.calls, options.seconds, options.rate, Path(folder)))
    result = medians(runs)
    print(table(result, runs))
    expected_per_s = 2 * options.calls / INTERVAL_S
    if result.packets_per_s < 0.99 * expected_per_s:
        print(f"the load fell short: {result.packets_per_s:.0f} of {expected_per_s:.0f} packets/s")
        return 1
    if options.json:
        options.json.write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")
    return 0 if all(target.met(result) for target in TARGETS) else 1


if __name__ == "__main__":
    sys.exit(main())
