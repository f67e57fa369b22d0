"""control.store.events and control.store.records on a real SQLite file."""

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from control.metrics import ControlMetrics
from control.pbx.records import CallDirection, CallId, CallRecord, Reason, Result, Termination
from control.store import events as events_module
from control.store.database import Database, Statement
from control.store.events import EventsGoneError, EventStore, StoredEvent
from control.store.records import RecordStore
from tests.harness.records import INVITED_AT, call_record

pytestmark = pytest.mark.integration

UNANSWERED = call_record(
    "call-2",
    direction=CallDirection.INBOUND,
    callee="4711 \N{SNOWMAN}",
    ringing_at=None,
    answered_at=None,
    ended_at=INVITED_AT + timedelta(microseconds=1),
    duration_s=0.0,
    termination=Termination(Result.REJECTED, Reason.UNKNOWN_NUMBER, 404, None, "no route for '4711'"),
    legs=(),
    streams=(),
    media_complete=False,
)


class Store:
    """An event store over a file, and what it told."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = ControlMetrics()
        self.told: list[tuple[StoredEvent, CallRecord | None]] = []

    async def open(
        self, *, keep_events: int = 1000, also: Callable[[StoredEvent], Sequence[Statement]] = lambda _: ()
    ) -> "Store":
        self.database = await Database.open(self.path, metrics=self.metrics)
        self.records = RecordStore(self.database)
        self.events = await EventStore.open(
            self.database,
            self.records,
            metrics=self.metrics,
            keep=timedelta(days=1),
            keep_events=keep_events,
            also=also,
            committed=lambda event, record: self.told.append((event, record)),
        )
        return self

    async def close(self) -> None:
        await self.events.close()
        await self.database.close()

    def append(self, number: int, *, record: CallRecord | None = None, at: datetime | None = None) -> None:
        data = json.dumps({"number": number}).encode()
        at = at or datetime.now(UTC)
        self.events.append(id=f"evt_{number}", type="node.error", at=at, call_id=None, data=data, record=record)

    async def committed(self, sequence: int) -> None:
        await asyncio.wait_for(self.events.wait_beyond(sequence - 1), 10)

    async def until_kept(self, sequences: list[int]) -> None:
        """Wait for the retention, which begins when the store is opened."""
        sql = "SELECT sequence FROM events ORDER BY sequence"
        async with asyncio.timeout(10):
            while await self.database.read(lambda reader: [row[0] for row in reader.execute(sql)]) != sequences:
                await asyncio.sleep(0.01)

    async def numbers_after(self, sequence: int, limit: int = 1000) -> list[int]:
        return [json.loads(event.data)["number"] for event in await self.events.read_after(sequence, limit)]


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    made = await Store(tmp_path / "store.sqlite").open()
    yield made
    await made.close()


# Events


async def test_events_are_told_and_read_in_the_order_of_their_sequence(store: Store) -> None:
    for number in range(1, 301):
        store.append(number)
    assert store.events.last_sequence == 0, "nothing is told before it is on the disk"
    await store.committed(300)
    assert [event.sequence for event, _ in store.told] == list(range(1, 301))
    assert await store.numbers_after(0) == list(range(1, 301))
    assert await store.numbers_after(298) == [299, 300]
    assert await store.numbers_after(300) == []
    assert await store.numbers_after(10, limit=3) == [11, 12, 13]


async def test_an_event_is_read_back_as_it_was_appended(store: Store) -> None:
    at = datetime.now(UTC).replace(microsecond=123_456)
    store.events.append(id="evt_x", type="call.started", at=at, call_id="call-1", data=b'{"a":1}')
    await store.committed(1)
    wanted = StoredEvent(1, "evt_x", "call.started", at, "call-1", b'{"a":1}')
    assert await store.events.read_after(0) == [wanted]
    await store.close()
    await store.open()
    assert await store.events.read_after(0) == [wanted]


async def test_the_sequence_goes_on_after_a_restart(store: Store) -> None:
    for number in (1, 2):
        store.append(number)
    await store.committed(2)
    await store.close()
    await store.open()
    assert store.events.last_sequence == 2
    store.append(3)
    await store.committed(3)
    assert await store.numbers_after(1) == [2, 3], "from the file and from memory"


async def test_a_reader_far_behind_reads_from_the_file(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "_RING", 10)
    for number in range(1, 101):
        store.append(number)
    await store.committed(100)
    assert len(store.events._ring) < 21
    assert await store.numbers_after(3) == list(range(4, 101))


async def test_waiting_ends_with_the_next_event(store: Store) -> None:
    waiting = asyncio.create_task(store.events.wait_beyond(0))
    await asyncio.sleep(0)
    assert not waiting.done()
    store.append(1)
    await asyncio.wait_for(waiting, 10)


async def test_an_event_of_the_future_is_not_waited_for(store: Store) -> None:
    with pytest.raises(EventsGoneError, match="event 5 has not happened; the last one is 0"):
        await store.events.read_after(5)


async def test_the_same_id_twice_is_stored_once(store: Store) -> None:
    store.append(1)
    store.append(1)
    store.append(2)
    await store.committed(3)
    assert await store.numbers_after(0) == [1, 2]


async def test_what_belongs_to_an_event_is_in_its_transaction(tmp_path: Path) -> None:
    def deliveries(event: StoredEvent) -> Sequence[Statement]:
        sql = "INSERT INTO webhook_deliveries (endpoint, sequence, queued_at, next_attempt_at) VALUES ('a', ?, '', '')"
        return [(sql, (event.sequence,))] if event.sequence == 1 else [("INSERT INTO nowhere VALUES (1)", ())]

    store = await Store(tmp_path / "store.sqlite").open(also=deliveries)
    store.append(1)
    store.append(2)
    await store.committed(1)
    await store.close()
    with sqlite3.connect(store.path) as connection:
        assert connection.execute("SELECT sequence FROM webhook_deliveries").fetchall() == [(1,)]
        assert connection.execute("SELECT sequence FROM events").fetchall() == [(1,)]
    connection.close()


# Retention


async def test_what_is_too_much_is_deleted_and_who_missed_it_is_told(tmp_path: Path) -> None:
    store = await Store(tmp_path / "store.sqlite").open()
    for number in range(1, 1501):
        store.append(number)
    await store.committed(1500)
    await store.close()
    await store.open(keep_events=100)
    await store.until_kept(list(range(1401, 1501)))
    with pytest.raises(EventsGoneError, match="up to 1400"):
        await store.events.read_after(1399)
    assert await store.numbers_after(1400) == list(range(1401, 1501))
    await store.close()


async def test_what_is_old_is_deleted_but_not_what_a_webhook_waits_for(tmp_path: Path) -> None:
    def deliveries(event: StoredEvent) -> Sequence[Statement]:
        sql = "INSERT INTO webhook_deliveries (endpoint, sequence, queued_at, next_attempt_at) VALUES ('a', ?, '', '')"
        return [(sql, (event.sequence,))] if event.sequence == 2 else []

    store = await Store(tmp_path / "store.sqlite").open(also=deliveries)
    for number in (1, 2, 3):
        store.append(number, at=datetime.now(UTC) - timedelta(days=2))
    store.append(4)
    await store.committed(4)
    await store.close()
    await store.open()
    await store.until_kept([2, 4])
    with pytest.raises(EventsGoneError, match="up to 3"):
        await store.events.read_after(1)
    await store.close()


async def test_the_sequence_goes_on_when_every_event_was_deleted(tmp_path: Path) -> None:
    store = await Store(tmp_path / "store.sqlite").open()
    store.append(1, at=datetime.now(UTC) - timedelta(days=2))
    await store.committed(1)
    await store.close()
    await store.open()
    await store.until_kept([])
    await store.close()
    await store.open()
    assert store.events.last_sequence == 1
    await store.close()


# Records


@pytest.mark.parametrize("record", [call_record(), UNANSWERED], ids=["answered", "unanswered"])
async def test_a_record_is_read_back_as_it_was_added(store: Store, record: CallRecord) -> None:
    store.append(1, record=record)
    assert await store.records.get(record.call_id) == record, "on its way to the disk"
    await store.committed(1)
    assert await store.records.get(record.call_id) == record
    assert await store.records.get(CallId("another")) is None
    assert [told for _, told in store.told] == [record]


async def test_newest_records_come_in_pages(store: Store) -> None:
    for number in range(1, 6):
        store.append(number, record=call_record(f"call-{number}"))
    await store.committed(5)
    first = await store.records.newest(2)
    second = await store.records.newest(2, before=first[-1].call_id)
    assert [record.call_id for record in first + second] == ["call-5", "call-4", "call-3", "call-2"]


async def test_the_first_record_of_a_call_stays(store: Store) -> None:
    store.append(1, record=call_record("call-1", caller="first"))
    store.append(2, record=call_record("call-1", caller="second"))
    await store.committed(2)
    assert [record.caller for record in await store.records.newest()] == ["first"]


async def test_a_record_that_cannot_be_kept_goes_to_the_log(tmp_path: Path) -> None:
    store = await Store(tmp_path / "store.sqlite").open(also=lambda _: [("INSERT INTO nowhere VALUES (1)", ())])
    with capture_logs() as lines:
        store.append(1, record=call_record("unlucky"))
        await store.close()
    assert store.metrics.registry.get_sample_value("sip_pbx_cdr_failures_total", {"backend": "sqlite"}) == 1
    [line] = [line for line in lines if line["event"] == "store.record_unsaved"]
    assert json.loads(line["record"])["call_id"] == "unlucky"


async def test_text_that_is_not_unicode_is_refused_and_harms_no_other_record(store: Store) -> None:
    with pytest.raises(ValueError, match="surrogates"):
        store.append(1, record=call_record(caller="\udcff"))
    store.append(2, record=call_record())
    await store.committed(2)
    assert [record.call_id for record in await store.records.newest()] == ["call-1"]
