"""The journal: what this node must know to take its calls up again after a crash.

One row for each call, replaced as a whole with each change that a far end may rely on, and gone in the transaction that
writes the call's record. Rows carry a version and the time; those that cannot be read are set aside, never in the way.
"""

import json
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import orjson

from control.pbx.records import CallEventKind, CallId, CallRecord
from control.store.database import Database, Statement
from control.store.events import StoredEvent
from control.store.records import record_from_values, record_values

VERSION: Final = 1

_SAVE: Final = (
    "INSERT INTO calls (call_id, version, saved_at, saved_now, boot_id, record, snapshot) VALUES (?, ?, ?, ?, ?, ?, ?)"
    " ON CONFLICT (call_id) DO UPDATE SET version = excluded.version, saved_at = excluded.saved_at,"
    " saved_now = excluded.saved_now, boot_id = excluded.boot_id, record = excluded.record,"
    " snapshot = excluded.snapshot"
)
_FORGET: Final = "DELETE FROM calls WHERE call_id = ?"
_SET_ASIDE: Final = (
    "INSERT INTO calls_set_aside SELECT call_id, version, saved_at, ?, ?, snapshot FROM calls WHERE call_id = ?"
)
_ALL: Final = "SELECT call_id, version, saved_at, saved_now, boot_id, record, snapshot FROM calls ORDER BY rowid"


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """A call as it was saved. `snapshot` is plain data, None when it cannot be read, and `trouble` then says why.

    `saved_now` is monotonic seconds since the boot `boot_id`; `record` is what to keep of the call if it is lost, None
    when its record is written already.
    """

    call_id: CallId
    saved_at: datetime
    saved_now: float
    boot_id: str
    record: CallRecord | None
    snapshot: Any
    trouble: str = ""


class Journal:
    """Saves calls. `boot_id` names the boot whose monotonic clock is used."""

    def __init__(self, database: Database, *, boot_id: str, clock: Callable[[], float]) -> None:
        self._database = database
        self._boot_id = boot_id
        self._clock = clock
        # What goes with the event of a call that is appended next, by the call and the kind of event.
        self._with_event: dict[tuple[str | None, str], tuple[Statement, ...]] = {}

    def begin(self, record: CallRecord, snapshot: Any) -> None:
        """The event that is appended next tells of a new call: its row comes with it."""
        row = self._saving(record.call_id, _record_text(record), snapshot)
        self._with_event[record.call_id, CallEventKind.STARTED] = (row,)

    def save(
        self,
        call_id: CallId,
        record: CallRecord | None,
        snapshot: Any,
        *,
        committed: Callable[[], None],
        given_up: Callable[[str], None],
    ) -> None:
        """Queue the state of a call; `record` is what would be kept of it now, None when that is written."""
        row = self._saving(call_id, "" if record is None else _record_text(record), snapshot)
        self._database.submit([row], committed=committed, given_up=given_up)

    def forget(self, call_id: CallId) -> None:
        """Nothing of a call needs to be taken up any more."""
        self._database.submit([_forgetting(call_id)])

    def end(self, record: CallRecord, snapshot: Any | None) -> None:
        """The event that is appended next ends a call: its row goes with it, or keeps what is left to be done."""
        call_id = record.call_id
        row = _forgetting(call_id) if snapshot is None else self._saving(call_id, "", snapshot)
        self._with_event[call_id, CallEventKind.ENDED] = (row,)

    def set_aside(self, entry: JournalEntry, reason: str) -> None:
        """Move a row that cannot be used out of the way.

        It goes with the event that is appended next and has the call's record, or now when that is written already.
        """
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        statements = ((_SET_ASIDE, (now, reason, entry.call_id)), _forgetting(entry.call_id))
        if entry.record is None:
            self._database.submit(statements)
        else:
            self._with_event[entry.call_id, CallEventKind.ENDED] = statements

    def statements_for(self, event: StoredEvent) -> Sequence[Statement]:
        """What belongs into the transaction of an event."""
        return self._with_event.pop((event.call_id, event.type), ())

    async def load(self) -> list[JournalEntry]:
        """All calls, the oldest first.

        Raises:
            StoreError: the store cannot be read.
        """
        return [
            _entry(row) for row in await self._database.read(lambda connection: connection.execute(_ALL).fetchall())
        ]

    def _saving(self, call_id: CallId, record: str, snapshot: Any) -> Statement:
        saved_at = datetime.now(UTC).isoformat(timespec="microseconds")
        values = (
            call_id,
            VERSION,
            saved_at,
            self._clock(),
            self._boot_id,
            record,
            written_plain(snapshot),
        )
        return _SAVE, values


def _entry(row: sqlite3.Row | tuple[Any, ...]) -> JournalEntry:
    call_id, version, saved_at, saved_now, boot_id, record, data = row
    snapshot, kept, trouble, at = None, None, "", datetime.now(UTC)
    if version > VERSION:
        trouble = f"it is of version {version}, this program knows {VERSION}"
    else:
        try:
            snapshot = read_plain(data)
        except ValueError as error:
            trouble = f"it is no JSON: {error}"
    try:
        at = datetime.fromisoformat(saved_at)
    except ValueError as error:
        trouble = trouble or f"when it was saved: {error}"
    try:
        kept = record_from_values(orjson.loads(record)) if record else None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        # A call that can be taken up makes its record itself.
        trouble = trouble and f"{trouble}; nor can its record be read: {error!r}"
    return JournalEntry(CallId(call_id), at, saved_now, boot_id, kept, snapshot, trouble)


def _forgetting(call_id: CallId) -> Statement:
    return _FORGET, (call_id,)


def _record_text(record: CallRecord) -> str:
    return orjson.dumps(record_values(record)).decode()


def written_plain(snapshot: Any) -> bytes:
    """Plain data as JSON.

    Octets from the wire that were not UTF-8 are lone surrogates (PEP 383), which orjson refuses to write.
    """
    try:
        return orjson.dumps(snapshot)
    except TypeError:
        return json.dumps(snapshot).encode()


def read_plain(data: bytes) -> Any:
    """What `written_plain` wrote.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return json.loads(data)
