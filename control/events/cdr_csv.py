"""Call detail records as CSV (RFC 4180): a header line, then a line for each call, in the order of their commits.

    call_id, direction, caller, callee
    invited_at, ringing_at, answered_at, ended_at
                   RFC 3339, UTC, with microseconds
    setup_s, duration_s
                   seconds
    result, reason, sip_status, ended_by, detail
                   the termination
    media_complete true or false
    media_interruptions, media_gap_s
    caller_sip_call_id, caller_from_uri, caller_to_uri, caller_remote, caller_trunk, caller_user, caller_user_agent
                   the leg of the caller
    caller_packets, caller_lost, caller_jitter_ms
                   what arrived from the caller: sums over its lines, and the largest jitter of them
    callee_...     the same of the callee

Values mean what they mean in JSON lines (control.events.cdr); what is null there is empty here. Columns may be added at
the end. A file whose header is another one is renamed as if it were full.

Text comes from the network, and spreadsheets take it for a formula when it begins with = + - or @: an apostrophe is put
in front of it, also in front of a number like +8225550100. Control characters, line breaks among them, become spaces,
so that a record is a line.
"""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Final

from control.pbx.records import CallRecord, LegName, StreamRecord

_CALL: Final = (
    "call_id", "direction", "caller", "callee", "invited_at", "ringing_at", "answered_at", "ended_at", "setup_s",
    "duration_s", "result", "reason", "sip_status", "ended_by", "detail", "media_complete", "media_interruptions",
    "media_gap_s",
)  # fmt: skip
_LEG: Final = ("sip_call_id", "from_uri", "to_uri", "remote", "trunk", "user", "user_agent")
_STREAM: Final = ("packets", "lost", "jitter_ms")

COLUMNS: Final = (*_CALL, *(f"{leg}_{column}" for leg in LegName for column in (*_LEG, *_STREAM)))

_CONTROLS: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_FORMULA: Final = ("=", "+", "-", "@")

Cell = str | int | float | bool | datetime | None


class CsvLines:
    """The form of a CSV file."""

    name: Final = "csv"

    @property
    def header(self) -> bytes:
        """Its first line."""
        return _line(COLUMNS)

    def line(self, record: CallRecord) -> bytes:
        """The record as one line, its end included."""
        return _line(map(_text, _cells(record)))

    def key(self, line: bytes) -> str | None:
        """What tells a record's line from another's; None when this is no line of a record."""
        try:
            (row,) = csv.reader([line.decode()], strict=True)
        except (ValueError, csv.Error):
            return None
        return row[0] if len(row) == len(COLUMNS) else None


def _cells(record: CallRecord) -> Iterable[Cell]:
    end = record.termination
    yield from (record.call_id, record.direction, record.caller, record.callee)
    yield from (record.invited_at, record.ringing_at, record.answered_at, record.ended_at)
    yield from (round(record.setup_s, 6), round(record.duration_s, 6))
    yield from (end.result, end.reason, end.sip_status, end.ended_by, end.detail)
    yield from (record.media_complete, record.media_interruptions, round(record.media_gap_s, 6))
    legs = {leg.name: leg for leg in record.legs}
    for name in LegName:
        leg = legs.get(name)
        yield from (None if leg is None else getattr(leg, column) for column in _LEG)
        yield from _received([stream for stream in record.streams if stream.leg is name])


def _received(streams: Sequence[StreamRecord]) -> tuple[Cell, ...]:
    if not streams:
        return None, None, None
    jitter = max((stream.jitter_ms for stream in streams if stream.jitter_ms is not None), default=None)
    return sum(stream.packets for stream in streams), sum(stream.lost for stream in streams), jitter


def _text(cell: Cell) -> str:
    match cell:
        case None:
            return ""
        case bool():
            return "true" if cell else "false"
        case datetime():
            return f"{cell.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%f}Z"
        case str():
            plain = _CONTROLS.sub(" ", cell)
            return f"'{plain}" if plain.startswith(_FORMULA) else plain
        case _:
            return str(cell)


def _line(cells: Iterable[str]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\r\n").writerow(cells)
    return text.getvalue().encode()
