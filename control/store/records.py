"""Call detail records of record: written in groups by one task, read back for the API and for tests.

`add` only queues. The writer commits whatever has gathered while the disk was busy with the commit before, so that the
price of one `fsync` is shared by a burst. A disk that fails is tried again for as long as the process lives and the
queue holds.
"""

import asyncio
import contextlib
import sqlite3
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiosqlite
import orjson
import structlog

from control.metrics import ControlMetrics
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
from control.store.database import open_database

MAX_PENDING = 100_000

_MAX_BATCH = 256
_RETRY_FIRST_S = 0.1
_RETRY_MOST_S = 5.0

_COLUMNS = (
    "call_id", "direction", "caller", "callee", "invited_at", "ringing_at", "answered_at", "ended_at", "setup_s",
    "duration_s", "result", "reason", "sip_status", "ended_by", "detail", "media_complete", "legs", "streams",
)  # fmt: skip
_ROW = f"({', '.join('?' * len(_COLUMNS))})"
_INSERT = f"INSERT INTO call_records ({', '.join(_COLUMNS)}) VALUES"
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM call_records"  # noqa: S608 - made of constants

_log = structlog.get_logger(__name__)


class RecordStore:
    """Keeps call records, each exactly once by its call_id.

    `committed` is called after each commit with the records that it made durable, in order.
    """

    def __init__(
        self,
        connection: aiosqlite.Connection,
        *,
        metrics: ControlMetrics,
        committed: Callable[[Sequence[CallRecord]], None],
        max_pending: int,
    ) -> None:
        self._connection = connection
        self._metrics = metrics
        self._committed = committed
        self._max_pending = max_pending
        self._pending: deque[tuple[CallRecord, tuple[Any, ...]]] = deque()
        self._wake = asyncio.Event()
        self._closing = False
        self._writer = asyncio.create_task(self._write(), name="record-store-writer")

    @classmethod
    async def open(
        cls,
        path: Path,
        *,
        metrics: ControlMetrics,
        committed: Callable[[Sequence[CallRecord]], None],
        max_pending: int = MAX_PENDING,
    ) -> "RecordStore":
        """Open the file, creating it and its folder when they are not there.

        Raises: StoreError.
        """
        connection = await open_database(path)
        return cls(connection, metrics=metrics, committed=committed, max_pending=max_pending)

    @property
    def pending(self) -> int:
        """Records that are not on the disk yet."""
        return len(self._pending)

    def add(self, record: CallRecord) -> None:
        """Queue a record. When the queue is full, because the disk has failed for long, it goes to the log instead.

        Raises: ValueError, TypeError when its text is not Unicode (lone surrogates).
        """
        row = _to_row(record)
        if len(self._pending) >= self._max_pending or self._writer.done():
            self._give_up(record)
            return
        self._pending.append((record, row))
        self._wake.set()

    async def get(self, call_id: CallId) -> CallRecord | None:
        """Read one record back.

        Raises: sqlite3.Error.
        """
        rows = await self._connection.execute_fetchall(f"{_SELECT} WHERE call_id = ?", (call_id,))
        return next((_from_row(row) for row in rows), None)

    async def newest(self, limit: int = 100, before: CallId | None = None) -> list[CallRecord]:
        """Read the records committed last, newest first; `before` continues behind the last one of a page.

        Raises: sqlite3.Error.
        """
        where = ""
        arguments: tuple[object, ...] = (limit,)
        if before is not None:
            where, arguments = " WHERE id < (SELECT id FROM call_records WHERE call_id = ?)", (before, limit)
        rows = await self._connection.execute_fetchall(f"{_SELECT}{where} ORDER BY id DESC LIMIT ?", arguments)
        return [_from_row(row) for row in rows]

    async def close(self, timeout_s: float = 10.0) -> None:
        """Commit what is queued, for at most `timeout_s`, and close the file; what is left goes to the log."""
        self._closing = True
        self._wake.set()
        done, _ = await asyncio.wait({self._writer}, timeout=timeout_s)
        if not done:
            self._writer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._writer
        while self._pending:
            self._give_up(self._pending.popleft()[0])
        try:
            await asyncio.wait_for(self._connection.close(), timeout_s)
        except (TimeoutError, sqlite3.Error) as error:
            _log.error("store.close_failed", error=str(error))

    async def _write(self) -> None:
        retry_s = _RETRY_FIRST_S
        while True:
            if not self._pending:
                if self._closing:
                    return
                self._wake.clear()
                await self._wake.wait()
                continue
            batch = [self._pending[index] for index in range(min(len(self._pending), _MAX_BATCH))]
            try:
                inserted = await self._insert([row for _, row in batch])
            except sqlite3.Error as error:
                self._metrics.error("store", "write_failed")
                _log.error("store.write_failed", error=str(error), pending=len(self._pending), retry_s=retry_s)
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, _RETRY_MOST_S)
                continue
            except Exception:  # noqa: BLE001 - the boundary
                # The boundary of the writer's task: records must not wait for ever behind one that trips over a bug.
                self._metrics.error("store", "internal")
                _log.exception("store.batch_failed")
                for _ in batch:
                    self._give_up(self._pending.popleft()[0])
                continue
            retry_s = _RETRY_FIRST_S
            for _ in batch:
                self._pending.popleft()
            written = []
            for record, _ in batch:
                if record.call_id in inserted:
                    inserted.remove(record.call_id)
                    written.append(record)
            self._metrics.cdrs_written("sqlite", len(written))
            self._committed(written)

    async def _insert(self, rows: list[tuple[Any, ...]]) -> set[str]:
        """Insert in one transaction; return the call_ids that were new."""
        statement = f"{_INSERT} {', '.join([_ROW] * len(rows))} ON CONFLICT (call_id) DO NOTHING RETURNING call_id"
        inserted = await self._connection.execute_fetchall(statement, [value for row in rows for value in row])
        return {row[0] for row in inserted}

    def _give_up(self, record: CallRecord) -> None:
        self._metrics.cdr_failed("sqlite")
        _log.error("store.record_unsaved", call_id=record.call_id, record=orjson.dumps(record).decode())


def _to_row(record: CallRecord) -> tuple[Any, ...]:
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
    )
    for text in (record.call_id, record.caller, record.callee, end.detail):
        text.encode()
    return row


def _from_row(row: Sequence[Any]) -> CallRecord:
    values = dict(zip(_COLUMNS, row, strict=True))
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
        legs=tuple(LegRecord(**{**leg, "name": LegName(leg["name"])}) for leg in orjson.loads(values["legs"])),
        streams=tuple(_stream(stream) for stream in orjson.loads(values["streams"])),
        media_complete=bool(values["media_complete"]),
    )


def _stream(values: dict[str, Any]) -> StreamRecord:
    first, last = _time(values["first_packet_at"]), _time(values["last_packet_at"])
    return StreamRecord(**{**values, "leg": LegName(values["leg"]), "first_packet_at": first, "last_packet_at": last})


def _time_text(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="microseconds")


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)
