"""What happened on this node, in one order that survives restarts.

An event gets its place in the order when it is appended, and is told once it is committed, with its record, if it has
one, and with whatever else belongs into the same transaction. Readers have cursors, not queues: one that is slow costs
nothing. Events are kept for a while; a reader that was away for longer is told so.
"""

import asyncio
import contextlib
import sqlite3
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import takewhile
from typing import Any, Final

import orjson
import structlog

from control.metrics import ControlMetrics
from control.pbx.records import CallRecord
from control.store.database import Database, Statement, StoreError
from control.store.records import RecordStore

RETENTION_INTERVAL_S: Final = 60.0

_RING: Final = 256
_DELETED_AT_ONCE: Final = 500
_INSERT: Final = "INSERT INTO events (sequence, id, type, at, call_id, data) VALUES (?, ?, ?, ?, ?, ?)"
_AFTER: Final = "SELECT sequence, id, type, at, call_id, data FROM events WHERE sequence > ? ORDER BY sequence LIMIT ?"
# The last column: whether a webhook awaits it.
_OLDEST_AFTER: Final = (
    "SELECT sequence, at, EXISTS (SELECT 1 FROM webhook_deliveries AS awaited WHERE awaited.sequence = events.sequence)"
    " FROM events WHERE sequence > ? ORDER BY sequence LIMIT ?"
)

_log = structlog.get_logger(__name__)


class EventsGoneError(Exception):
    """The events behind the one that was named are no longer kept, or it is of the future; the message says which."""


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An event as it is kept. `data` is a JSON object in UTF-8, `at` is UTC."""

    sequence: int
    id: str
    type: str
    at: datetime
    call_id: str | None
    data: bytes


def _no_statements(_: StoredEvent) -> Sequence[Statement]:
    return ()


class EventStore:
    """Appends events and lets others follow them.

    `also` gives statements for the transaction of an event; `committed` is told of each event, in order, with its
    record.
    """

    def __init__(
        self,
        database: Database,
        records: RecordStore,
        last_sequence: int,
        *,
        metrics: ControlMetrics,
        keep: timedelta,
        keep_events: int,
        also: Callable[[StoredEvent], Sequence[Statement]],
        committed: Callable[[StoredEvent, CallRecord | None], None],
    ) -> None:
        self._database = database
        self._records = records
        self._metrics = metrics
        self._keep = keep
        self._keep_events = keep_events
        self._also = also
        self._committed = committed
        self._given = self._last_sequence = self._ring_floor = last_sequence
        self._ring: list[StoredEvent] = []
        self._advanced = asyncio.Event()
        self._retention = asyncio.create_task(self._retain(), name="event-retention")

    @classmethod
    async def open(
        cls,
        database: Database,
        records: RecordStore,
        *,
        metrics: ControlMetrics,
        keep: timedelta,
        keep_events: int,
        also: Callable[[StoredEvent], Sequence[Statement]] = _no_statements,
        committed: Callable[[StoredEvent, CallRecord | None], None],
    ) -> "EventStore":
        """Continue where the file ends; `keep` and `keep_events` bound what is kept.

        Raises:
            StoreError: the store cannot be read.
        """

        def query(connection: sqlite3.Connection) -> int:
            sql = "SELECT max(through, (SELECT coalesce(max(sequence), 0) FROM events)) FROM events_deleted"
            return int(connection.execute(sql).fetchone()[0])

        last = await database.read(query)
        return cls(
            database,
            records,
            last,
            metrics=metrics,
            keep=keep,
            keep_events=keep_events,
            also=also,
            committed=committed,
        )

    @property
    def last_sequence(self) -> int:
        """Of the newest event that is committed; 0 before the first."""
        return self._last_sequence

    def append(
        self,
        *,
        id: str,  # noqa: A002 - the field's name
        type: str,  # noqa: A002
        at: datetime,
        call_id: str | None,
        data: bytes,
        record: CallRecord | None = None,
    ) -> None:
        """Give an event the next place and queue it, with its record, as one write. An id that is known adds nothing.

        Raises:
            UnicodeEncodeError: the record's text has lone surrogates.
        """
        self._given += 1
        event = StoredEvent(self._given, id, type, at.astimezone(UTC), call_id, data)
        statements: list[Statement] = [(_INSERT, (event.sequence, id, type, _time_text(event.at), call_id, data))]
        if record is not None:
            statements.append(self._records.statement_for(record))
        statements += self._also(event)
        if record is not None:
            self._records.queued(record)
        self._database.submit(
            statements,
            committed=lambda: self._is_committed(event, record),
            given_up=lambda reason: self._is_given_up(event, record, reason),
        )

    async def read_after(self, sequence: int, limit: int = 256) -> list[StoredEvent]:
        """The events behind `sequence` in order, at most `limit`; none when there are no later ones.

        Raises:
            EventsGoneError: some of them are no longer kept, or `sequence` is of the future.
            StoreError: the store cannot be read.
        """
        if sequence > self._last_sequence:
            raise EventsGoneError(f"event {sequence} has not happened; the last one is {self._last_sequence}")
        if sequence >= self._ring_floor:
            start = bisect_right(self._ring, sequence, key=_sequence_of)
            return self._ring[start : start + limit]

        def query(connection: sqlite3.Connection) -> tuple[int, list[Any]]:
            (through,) = connection.execute("SELECT through FROM events_deleted").fetchone()
            return through, connection.execute(_AFTER, (sequence, limit)).fetchall()

        through, rows = await self._database.read(query)
        if sequence < through:
            raise EventsGoneError(f"events up to {through} are no longer kept")
        # What was committed since this was asked for is told to be committed before it is told to others.
        return [event for event in map(_from_row, rows) if event.sequence <= self._last_sequence]

    async def wait_beyond(self, sequence: int) -> None:
        """Return once an event later than this one is committed."""
        while self._last_sequence <= sequence:
            await self._advanced.wait()

    async def close(self) -> None:
        """Stop the retention; what was appended is the database's to write."""
        self._retention.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._retention

    def _is_committed(self, event: StoredEvent, record: CallRecord | None) -> None:
        self._last_sequence = event.sequence
        self._ring.append(event)
        if len(self._ring) > 2 * _RING:
            self._ring_floor = self._ring[-_RING - 1].sequence
            del self._ring[:-_RING]
        if record is not None:
            self._records.settled(record)
            self._metrics.cdrs_written("sqlite", 1)
        self._metrics.event_stored(event.type)
        advanced, self._advanced = self._advanced, asyncio.Event()
        advanced.set()
        self._committed(event, record)

    def _is_given_up(self, event: StoredEvent, record: CallRecord | None, reason: str) -> None:
        if record is not None:
            self._records.settled(record)
            self._metrics.cdr_failed("sqlite")
            _log.error("store.record_unsaved", call_id=record.call_id, record=orjson.dumps(record).decode())
        self._metrics.error("store", "event_unsaved")
        _log.error("store.event_unsaved", id=event.id, type=event.type, reason=reason)

    async def _retain(self) -> None:
        """Delete what need not be kept, again and again."""
        while True:
            try:
                await self._delete_outdated()
            except StoreError as error:
                self._metrics.error("store", "retention_failed")
                _log.warning("store.retention_failed", error=str(error))
            await asyncio.sleep(RETENTION_INTERVAL_S)

    async def _delete_outdated(self) -> int:
        """Walk from the oldest event to the first that is neither old nor too much, a little at a time.

        What a webhook awaits is passed over. The walk costs what is deleted, not what is kept: there may be millions.
        """
        before = _time_text(datetime.now(UTC) - self._keep)
        through = self._last_sequence - self._keep_events
        position = deleted = 0
        while True:
            oldest = await self._database.read(partial(_oldest_after, position))
            outdated = list(takewhile(lambda row: row[1] < before or row[0] <= through, oldest))
            if unawaited := [sequence for sequence, _, awaited in outdated if not awaited]:
                statements: list[Statement] = [("DELETE FROM events WHERE sequence = ?", (one,)) for one in unawaited]
                statements.append(("UPDATE events_deleted SET through = max(through, ?)", (unawaited[-1],)))
                await self._database.write(statements)
                _log.debug("store.events_deleted", events=len(unawaited), through=unawaited[-1])
                deleted += len(unawaited)
            if len(outdated) < _DELETED_AT_ONCE:
                return deleted
            position = outdated[-1][0]


def _sequence_of(event: StoredEvent) -> int:
    return event.sequence


def _oldest_after(sequence: int, connection: sqlite3.Connection) -> list[tuple[int, str, int]]:
    return connection.execute(_OLDEST_AFTER, (sequence, _DELETED_AT_ONCE)).fetchall()


def _from_row(row: Sequence[Any]) -> StoredEvent:
    sequence, event_id, event_type, at, call_id, data = row
    return StoredEvent(sequence, event_id, event_type, datetime.fromisoformat(at), call_id, data)


def _time_text(time: datetime) -> str:
    return time.isoformat(timespec="microseconds")
