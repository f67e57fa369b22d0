"""What must hold after a round of kills: every way in which it does not is a sentence.

The evidence is what both far ends of each call noted, the packets counted one by one at both ends, the records as lines
and as rows, the events, and the journal.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from bench.rtpload import INTERVAL_S, RtpReport, StreamReport
from tests.harness.kill_phones import Delay, Side
from tests.harness.kill_plans import SHORT, Manner, Moment, Plan

# The data plane writes its statistics down about once a second: what came since is not counted after its death.
UNCOUNTED_S: Final = 2.0
# How far the told gap may be from that between two packets.
TOLD_S: Final = 0.5
# From a plane's word that it is ready until the last session relays again, on a busy machine.
RESTORED_S: Final = 2.0


@dataclass(slots=True)
class Result:
    """What came of a round."""

    plan: Plan
    wrong: list[str] = field(default_factory=list)
    sent: int = 0
    lost: int = 0
    gaps_s: list[float] = field(default_factory=list)
    told_gaps_s: list[float] = field(default_factory=list)
    back_s: list[float] = field(default_factory=list)
    away_s: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def __str__(self) -> str:
        gaps, told, back = (
            f"{max(values, default=0.0):.2f} s" for values in (self.gaps_s, self.told_gaps_s, self.back_s)
        )
        verdict = "ok" if not self.wrong else f"{len(self.wrong)} WRONG"
        return (
            f"{verdict}: {self.plan}: {self.lost} of {self.sent} packets lost, longest gap {gaps} (told: {told}),"
            f" back after {back}, {dict(self.reasons)}, {self.seconds:.1f} s"
        )


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of a round.

    By the numbers of the calls: `sides` are the caller's and the callee's, None where the call did not get there;
    `streams` are pairs of the report; `answers` are the final statuses of what was asked in the dialog. `lines` are the
    records as JSON lines; `rows` and `endings` count records and `call.ended` events in the store by call_id, and
    `left` the rows of the journal.
    """

    sides: Mapping[int, tuple[Side, Side | None]]
    streams: Mapping[int, int]
    answers: Mapping[int, Sequence[int]]
    report: RtpReport
    lines: Sequence[dict[str, Any]]
    rows: Mapping[str, int]
    endings: Mapping[str, int]
    left: int


class Judge:
    """Enters what is wrong into a result."""

    def __init__(self, result: Result, evidence: Evidence) -> None:
        self._result, self._plan, self._evidence = result, result.plan, evidence

    def judge(self) -> None:
        """Look at everything."""
        for number, (side, far) in self._evidence.sides.items():
            if side.status == 200 and far is not None:
                self._judge_established(number, side, far)
            else:
                self._judge_refused(number, side, far)
        self._judge_media()
        self._judge_records()

    def _judge_established(self, number: int, side: Side, far: Side) -> None:
        own, other = (side, far) if side.hung_up else (far, side)
        answers = self._evidence.answers.get(number, [])
        if (own.hung_up, other.hung_up) != (True, False) or set(answers) != {200}:
            self._wrong(number, f"requests in the dialog, the last of them BYE, were answered {answers}")
        if own.byes or len(other.byes) != 1 or side.cancelled or far.cancelled:
            self._wrong(number, f"BYEs that came: {own.byes} at who hung up, {other.byes} at the other")
        if (len(side.changes), len(far.changes)) != (far.asked, side.asked):
            self._wrong(number, f"offers that came: {side.changes}, {far.changes}; asked: {far.asked}, {side.asked}")

    def _judge_refused(self, number: int, side: Side, far: Side | None) -> None:
        may_fail = self._plan.planes and (self._plan.moment is Moment.ANY or self._plan.delay(number) is Delay.ANSWER)
        if not may_fail or side.status != 503:
            self._wrong(number, f"INVITE was answered {side.status}")
        if far is not None and not far.cancelled and len(far.byes) != 1:
            self._wrong(number, "the callee was not told of the end")
        if side.byes or side.changes or (far is not None and far.changes):
            self._wrong(number, "requests came in a call that never was")

    def _judge_media(self) -> None:
        result, report = self._result, self._evidence.report
        result.sent, result.lost = report.total("sent"), report.total("lost")
        result.gaps_s = [stream.longest_gap_s for stream in report.streams]
        if report.foreign or report.total("duplicates") or report.send_errors:
            result.wrong.append(f"{report.foreign} foreign packets, {report.total('duplicates')} repeated")
        if not self._plan.kills_dataplane and result.lost:
            where = [(stream.pair, stream.lost, stream.missing) for stream in report.streams if stream.lost]
            result.wrong.append(f"{result.lost} packets lost: {where}")
        for stream in report.streams if self._plan.kills_dataplane else ():
            # What is lost is lost in one gap, after which media flows; streams that began or ended in it show none.
            whole = self._plan.moment not in SHORT
            lost_s, longest_s = stream.lost * INTERVAL_S, stream.longest_gap_s if whole else result.away_s + RESTORED_S
            if lost_s > longest_s + 0.2:
                result.wrong.append(f"stream of pair {stream.pair}: lost {lost_s:.2f} s, gap {longest_s:.2f} s")

    def _judge_records(self) -> None:
        evidence, wrong = self._evidence, self._result.wrong
        by_leg: dict[str, list[dict[str, Any]]] = {}
        for line in evidence.lines:
            by_leg.setdefault(line["legs"][0]["sip_call_id"], []).append(line)
            call_id = line["call_id"]
            counts = evidence.rows.get(call_id, 0), evidence.endings.get(call_id, 0)
            if counts != (1, 1):
                wrong.append(f"{call_id}: {counts[0]} records, {counts[1]} call.ended events")
        if evidence.left:
            wrong.append(f"{evidence.left} calls are left in the journal")
        for number, (side, _) in evidence.sides.items():
            found = by_leg.pop(side.sip_call_id, [])
            if len(found) != 1:
                self._wrong(number, f"{len(found)} records")
            for record in found:
                self._judge_record(number, side, record)
        if by_leg:
            wrong.append(f"records of calls that nobody placed: {by_leg}")

    def _judge_record(self, number: int, side: Side, record: dict[str, Any]) -> None:
        end = record["termination"]
        self._result.reasons[end["reason"]] += 1
        if side.status == 200:
            if (end["result"], end["reason"], end["sip_status"]) != ("answered", "hangup", 200):
                self._wrong(number, f"ended as {end}")
            self._judge_statistics(number, record)
        elif end["sip_status"] != 503 or end["reason"] not in self._plan.refusals:
            self._wrong(number, f"ended as {end}")

    def _judge_statistics(self, number: int, record: dict[str, Any]) -> None:
        counted = [stream["packets"] for stream in record["streams"]]
        pair = self._evidence.streams[number]
        streams = [stream for stream in self._evidence.report.streams if stream.pair == pair]
        interrupted = self._plan.kills_dataplane and self._plan.manner is not Manner.STOP
        if not record["media_complete"] and self._plan.moment in SHORT and self._may_lose_statistics():
            return
        if not record["media_complete"] or len(counted) != len(streams):
            self._wrong(number, f"statistics: {record['streams']}")
        elif not interrupted:
            if counted != [stream.received for stream in streams] and not self._plan.kills_dataplane:
                self._wrong(number, f"counted {counted}, {[stream.received for stream in streams]} arrived")
            if record["media_interruptions"]:
                self._wrong(number, f"{record['media_interruptions']} interruptions told")
        elif self._plan.moment not in SHORT:
            self._judge_interruption(number, record, counted, streams)

    def _may_lose_statistics(self) -> bool:
        """A call may begin after its figures were last noted, and end while there is no data plane.

        A plane that was stopped may find the time over in which it would have had them.
        """
        return self._plan.kills_dataplane or self._plan.manner is Manner.STOP

    def _judge_interruption(
        self, number: int, record: dict[str, Any], counted: Sequence[int], streams: Sequence[StreamReport]
    ) -> None:
        gap_s = record["media_gap_s"]
        self._result.told_gaps_s.append(gap_s)
        if record["media_interruptions"] != 1 or gap_s <= 0:
            self._wrong(number, f"{record['media_interruptions']} interruptions of {gap_s} s told")
        longest_s = max(stream.longest_gap_s for stream in streams)
        # A data plane that dies alone is missed at once; who comes back with it knows of its absence since then only.
        if not (longest_s - TOLD_S if self._plan.planes == ("dataplane",) else 0) <= gap_s <= longest_s + TOLD_S:
            self._wrong(number, f"a gap of {gap_s} s told, it was {longest_s:.2f} s")
        for count, stream in zip(counted, streams, strict=True):
            if not stream.received - UNCOUNTED_S / INTERVAL_S <= count <= stream.sent:
                self._wrong(number, f"counted {count}, {stream.received} of {stream.sent} arrived")

    def _wrong(self, number: int, what: str) -> None:
        self._result.wrong.append(f"call {number} (delayed: {self._plan.delay(number).value}): {what}")
