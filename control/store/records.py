"""Call detail records of record: how they are written, and read back for the APIs.

They are written with their events, see control.store.events; each is there once, by its call_id.
"""

import sqlite3
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import orjson
import structlog

from control.pbx.records import (
    CallDirection,
    CallId,
    CallRecord,
    LegName,
    LegRecord,
    Reason,
    Result,
    StreamRecord,
    Termination,
)
from control.store.database import Database, Statement

_COLUMNS = (
    "call_id", "direction", "caller", "callee", "invited_at", "ringing_at", "answered_at", "ended_at", "setup_s",
    "duration_s", "result", "reason", "sip_status", "ended_by", "detail", "media_complete", "legs", "streams",
    "media_interruptions", "media_gap_s",
)  # fmt: skip
_INSERT = (
    f"INSERT INTO call_records ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"  # noqa: S608 - constants
    " ON CONFLICT (call_id) DO NOTHING"
)
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM call_records"  # noqa: S608 - made of constants
_AFTER = f"SELECT id, {', '.join(_COLUMNS)} FROM call_records WHERE id > ? ORDER BY id LIMIT ?"  # noqa: S608 - as above

_log = structlog.get_logger(__name__)


class RecordStore:
    """Reads records; those that wait for their commit are found by their call_id, too."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._uncommitted: dict[CallId, CallRecord] = {}

    def statement_for(self, record: CallRecord) -> Statement:
        """Writes the record, unless there is one of its call.

        Raises:
            UnicodeEncodeError: its text has lone surrogates.
        """
        return _INSERT, record_values(record)

    def queued(self, record: CallRecord) -> None:
        """Notes a record that is on its way to the disk."""
        self._uncommitted[record.call_id] = record

    def settled(self, record: CallRecord) -> None:
        """Notes that it is there, or was given up."""
        self._uncommitted.pop(record.call_id, None)

    async def get(self, call_id: CallId) -> CallRecord | None:
        """The record of a call that has ended.

        Raises:
            StoreError: the store cannot be read.
        """
        if call_id in self._uncommitted:
            return self._uncommitted[call_id]

        def query(connection: sqlite3.Connection) -> list[Any]:
            return connection.execute(f"{_SELECT} WHERE call_id = ?", (call_id,)).fetchall()

        return next((record_from_values(row) for row in await self._database.read(query)), None)

    async def newest(self, limit: int = 100, before: CallId | None = None) -> list[CallRecord]:
        """The records committed last, newest first; `before` continues behind the last one of a page.

        Raises:
            StoreError: the store cannot be read.
        """
        where = "" if before is None else " WHERE id < (SELECT id FROM call_records WHERE call_id = ?)"
        arguments = (limit,) if before is None else (before, limit)

        def query(connection: sqlite3.Connection) -> list[Any]:
            return connection.execute(f"{_SELECT}{where} ORDER BY id DESC LIMIT ?", arguments).fetchall()

        return [record_from_values(row) for row in await self._database.read(query)]

    async def after(self, record_id: int, limit: int) -> list[tuple[int, CallRecord | None]]:
        """The records committed behind the one of this id, with their ids, oldest first; 0 is before the first.

        None stands for a record that cannot be read, which is logged: it must not bar the way to those behind it.

        Raises:
            StoreError: the store cannot be read.
        """

        def query(connection: sqlite3.Connection) -> list[tuple[int, CallRecord | None]]:
            rows = connection.execute(_AFTER, (record_id, limit)).fetchall()
            return [(row[0], _from_row_if_sound(row)) for row in rows]

        return await self._database.read(query)


def _from_row_if_sound(row: Sequence[Any]) -> CallRecord | None:
    record_id, *values = row
    try:
        return record_from_values(values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        _log.error("store.record_unreadable", id=record_id, call_id=values[0], error=repr(error))
        return None


def record_values(record: CallRecord) -> tuple[Any, ...]:
    """The record as the values of a row.

    Raises:
        UnicodeEncodeError: its text has lone surrogates.
    """
    end = record.termination
    row = (
        record.call_id,
        record.direction.value,
        record.caller,
        record.callee,
        _time_text(record.invited_at),
        None if record.ringing_at is None else _time_text(record.ringing_at),
        None if record.answered_at is None else _time_text(record.answered_at),
        _time_text(record.ended_at),
        record.setup_s,
        record.duration_s,
        end.result.value,
        end.reason.value,
        end.sip_status,
        None if end.ended_by is None else end.ended_by.value,
        end.detail,
        int(record.media_complete),
        orjson.dumps(record.legs).decode(),
        orjson.dumps(record.streams).decode(),
        record.media_interruptions,
        record.media_gap_s,
    )
    for text in (record.call_id, record.caller, record.callee, end.detail):
        text.encode()
    return row


def record_from_values(row: Sequence[Any]) -> CallRecord:
    """The record of such values."""
    values = dict(zip(_COLUMNS, row, strict=True))
    lists = {name: orjson.loads(values[name]) for name in ("legs", "streams")}
    return record_from_plain({**values, **lists})


def record_from_plain(values: Mapping[str, Any]) -> CallRecord:
    """The record of plain values by name, those of its termination among them; what is newer than they are, is zero.

    Raises:
        KeyError, ValueError, TypeError: they are none of ours.
    """
    return CallRecord(
        call_id=CallId(values["call_id"]),
        direction=CallDirection(values["direction"]),
        caller=values["caller"],
        callee=values["callee"],
        invited_at=datetime.fromisoformat(values["invited_at"]),
        ringing_at=_time(values["ringing_at"]),
        answered_at=_time(values["answered_at"]),
        ended_at=datetime.fromisoformat(values["ended_at"]),
        setup_s=values["setup_s"],
        duration_s=values["duration_s"],
        termination=Termination(
            Result(values["result"]),
            Reason(values["reason"]),
            values["sip_status"],
            None if values["ended_by"] is None else LegName(values["ended_by"]),
            values["detail"],
        ),
        legs=tuple(LegRecord(**{**leg, "name": LegName(leg["name"])}) for leg in values["legs"]),
        streams=tuple(_stream(stream) for stream in values["streams"]),
        media_complete=bool(values["media_complete"]),
        media_interruptions=values.get("media_interruptions", 0),
        media_gap_s=values.get("media_gap_s", 0.0),
    )


def _stream(values: dict[str, Any]) -> StreamRecord:
    first, last = _time(values["first_packet_at"]), _time(values["last_packet_at"])
    return StreamRecord(**{**values, "leg": LegName(values["leg"]), "first_packet_at": first, "last_packet_at": last})


def _time_text(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="microseconds")


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)
