"""What a call costs in CPU: short calls at a fixed rate, every INVITE challenged, no RTP.

`python -m bench.signalling` prints the CPU time of a call on each plane (all its processes, supervisors included) and
the delay from the INVITE to the forwarded INVITE and to the 200, on the wire.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from bench.calls_with_media import CALLEE, CALLEE_SIP, CALLER, CALLER_SIP, HOST, RTP_RANGE, percentile
from bench.processes import usage
from bench.sipload import Behaviour, Callee, Caller, PlacedCall
from tests.harness.pair import Pair

HOLD_S = 0.5
WARM_UP_S = 2.0
REST_S = 0.5  # short, so that the range lasts for any rate
RTP = (HOST, 27000)


async def _measure(pair: Pair, calls_per_s: float, seconds: float) -> int:
    callee = Callee(CALLEE_SIP, pair.sip, {CALLEE.user: Behaviour.ANSWER}, lambda _: RTP)
    caller = Caller(CALLER_SIP, pair.sip, CALLER)

    async def one(number: int) -> tuple[PlacedCall, bool]:
        call = await caller.call(CALLEE.user, str(number), RTP)
        if call.status != 200:
            return call, False
        await asyncio.sleep(HOLD_S)
        return call, not call.ended_by_peer and await caller.hang_up(call) == 200

    async with callee, caller:
        await caller.register(CALLER)
        await callee.register(CALLEE)
        tasks: list[asyncio.Task[tuple[PlacedCall, bool]]] = []
        pids = {plane: pair.pids(plane) for plane in ("control", "dataplane")}
        before = {plane: usage(of_plane) for plane, of_plane in pids.items()}
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in range(round(calls_per_s * (WARM_UP_S + seconds))):
                if number == round(calls_per_s * WARM_UP_S):
                    before = {plane: usage(of_plane) for plane, of_plane in pids.items()}
                tasks.append(group.create_task(one(number)))
                await asyncio.sleep(max(0.0, began + (number + 1) / calls_per_s - time.monotonic()))
            after = {plane: usage(of_plane) for plane, of_plane in pids.items()}
    done = [task.result() for task in tasks[round(calls_per_s * WARM_UP_S) :]]
    failed = sum(not good for _, good in done)
    statuses = dict(Counter(call.status for call, _ in done))
    print(f"{len(done)} calls at {calls_per_s:g}/s, {failed} failed, by status {statuses}", end=", ")
    print(f"{caller.retransmissions + callee.retransmissions} retransmissions")
    for plane in pids:
        cpu_s = after[plane].cpu_s - before[plane].cpu_s
        print(f"{plane:<10} {1e6 * cpu_s / len(done):7.0f} us CPU a call, {100 * cpu_s / seconds:5.1f} % of a core")
    good = [call for call, worked in done if worked]
    forwarded = [1000 * (callee.calls[call.name].invited_at - call.invited_at) for call in good]
    answered = [1000 * ((call.final_at or 0.0) - call.invited_at) for call in good]
    for what, delays in (("forwarded", forwarded), ("answered", answered)):
        p50, p99 = percentile(delays, 0.5), percentile(delays, 0.99)
        print(f"{what:<10} p50 {p50:6.2f} ms, p99 {p99:6.2f} ms after the INVITE")
    return failed


def main() -> int:
    """Run once; the exit code tells whether all calls went well."""
    parser = argparse.ArgumentParser(description="CPU time and delay of call set-up")
    parser.add_argument("--rate", type=float, default=50.0, help="calls a second")
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    control = {"limits": {"max_calls": 10_000, "calls_per_second": 100_000}}
    with tempfile.TemporaryDirectory(prefix="sippbx-bench-") as folder:
        dataplane = {"media": {"port_range": list(RTP_RANGE), "rest_s": REST_S}}
        with Pair(Path(folder), control=control, dataplane=dataplane) as pair:
            return min(1, asyncio.run(_measure(pair, options.rate, options.seconds)))


if __name__ == "__main__":
    sys.exit(main())
