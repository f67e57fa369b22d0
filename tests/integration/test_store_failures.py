"""control.store when the disk is full, a query is slow, or a write is a bug."""

import asyncio
import resource
import sqlite3
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from control.metrics import ControlMetrics
from control.store import database as database_module
from control.store import events as events_module
from control.store.database import Database, Statement, StoreError
from control.store.events import EventsGoneError, EventStore
from control.store.records import RecordStore

pytestmark = pytest.mark.integration

ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


def event(sequence: int, at: datetime | None = None, data: bytes = b"{}") -> Statement:
    values = (sequence, f"evt_{sequence}", "node.error", (at or datetime.now(UTC)).isoformat("T", "microseconds"), data)
    return "INSERT INTO events (sequence, id, type, at, data) VALUES (?, ?, ?, ?, ?)", values


def sequences(connection: sqlite3.Connection) -> list[int]:
    return [row[0] for row in connection.execute("SELECT sequence FROM events ORDER BY sequence")]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.sqlite"


@pytest.fixture
def metrics() -> ControlMetrics:
    return ControlMetrics()


@pytest.fixture
async def database(path: Path, metrics: ControlMetrics) -> AsyncIterator[Database]:
    opened = await Database.open(path, metrics=metrics)
    yield opened
    await opened.close()


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """To a process, files that may not grow look like a disk that is full (setrlimit(2), RLIMIT_FSIZE)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def until_error(metrics: ControlMetrics, kind: str) -> None:
    labels = {"component": "store", "kind": kind}
    async with asyncio.timeout(10):
        while not metrics.registry.get_sample_value("sip_pbx_errors_total", labels):
            await asyncio.sleep(0.01)


# Writes


async def test_a_full_disk_delays_writes_and_loses_none(
    database: Database, metrics: ControlMetrics, path: Path
) -> None:
    await database.write([event(1)])
    told: list[int] = []
    with files_no_larger_than(path.with_name(f"{path.name}-wal").stat().st_size):
        for sequence in (2, 3, 4):
            database.submit(
                [event(sequence, data=b"x" * 10_000)],
                committed=lambda sequence=sequence: told.append(sequence),  # type: ignore[misc]
            )
        await until_error(metrics, "write_failed")
        assert told == []
        assert await database.read(sequences) == [1], "reading goes on"
    await database.write([event(5)])
    assert told == [2, 3, 4]
    assert await database.read(sequences) == [1, 2, 3, 4, 5]


async def test_two_statements_in_one_are_dropped_alone(database: Database) -> None:
    with pytest.raises(StoreError, match="one statement at a time"):
        await database.write([("DELETE FROM events; DELETE FROM events", ())])
    await database.write([event(1)])


async def test_a_bug_of_the_writer_gives_its_group_up_and_no_other(
    database: Database, metrics: ControlMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(database_module, "_commit", fails)
        with pytest.raises(StoreError, match="a bug of the store"):
            await database.write([event(1)])
    await database.write([event(2)])
    assert await database.read(sequences) == [2]
    assert metrics.registry.get_sample_value("sip_pbx_errors_total", {"component": "store", "kind": "internal"}) == 1


# Reads


async def test_a_query_sees_one_state_although_there_are_commits_between_its_statements(database: Database) -> None:
    await database.write([event(1)])
    has_begun, may_go_on = threading.Event(), threading.Event()

    def query(connection: sqlite3.Connection) -> tuple[list[int], list[int]]:
        first = sequences(connection)
        has_begun.set()
        assert may_go_on.wait(10)
        return first, sequences(connection)

    reading = asyncio.create_task(database.read(query, timeout_s=20))
    assert await asyncio.to_thread(has_begun.wait, 10)
    await database.write([event(2)])
    may_go_on.set()
    assert await reading == ([1], [1])
    assert await database.read(sequences) == [1, 2]


async def test_who_gives_up_waiting_in_the_queue_breaks_off_no_other_query(database: Database) -> None:
    may_go_on = threading.Event()

    def slow(connection: sqlite3.Connection) -> int:
        assert may_go_on.wait(10)
        return len(connection.execute("SELECT 1").fetchall())

    reading = asyncio.create_task(database.read(slow, timeout_s=20))
    await asyncio.sleep(0)
    with pytest.raises(StoreError, match="did not answer"):
        await database.read(sequences, timeout_s=0.05)
    may_go_on.set()
    assert await reading == 1


async def test_a_query_that_nobody_waits_for_any_more_ends_with_its_deadline(database: Database) -> None:
    endless = asyncio.create_task(database.read(lambda reader: reader.execute(ENDLESS).fetchone(), timeout_s=0.3))
    await asyncio.sleep(0.05)
    endless.cancel()
    assert await database.read(sequences, timeout_s=10) == []


async def test_a_cancellation_that_comes_together_with_the_answer_is_not_lost(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[list[int]] = loop.create_future()
    with monkeypatch.context() as patched:
        patched.setattr(loop, "run_in_executor", lambda *_: answer)
        reading = asyncio.create_task(database.read(sequences))
        await asyncio.sleep(0)
        answer.set_result([])
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading


# Retention


async def test_retention_reads_no_further_than_it_deletes(
    database: Database, metrics: ControlMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be millions of events that are kept; looking through them once a minute would starve other readers."""
    monkeypatch.setattr(events_module, "_DELETED_AT_ONCE", 10)
    old = datetime.now(UTC) - timedelta(days=2)
    await database.write([event(sequence, at=old) for sequence in range(1, 36)])
    await database.write([event(sequence) for sequence in range(36, 1001)])
    awaited = "INSERT INTO webhook_deliveries (endpoint, sequence, queued_at, next_attempt_at) VALUES ('a', ?, '', '')"
    await database.write([(awaited, (sequence,)) for sequence in range(1, 21)])
    looked: list[list[tuple[int, str, int]]] = []
    look = events_module._oldest_after

    def spy(position: int, connection: sqlite3.Connection) -> list[tuple[int, str, int]]:
        looked.append(look(position, connection))
        return looked[-1]

    monkeypatch.setattr(events_module, "_oldest_after", spy)
    store = await EventStore.open(
        database,
        RecordStore(database),
        metrics=metrics,
        keep=timedelta(days=1),
        keep_events=1_000_000,
        committed=lambda event, record: None,
    )
    async with asyncio.timeout(10):
        while (found := await database.read(sequences))[20] != 36:
            await asyncio.sleep(0.01)
    assert found == [*range(1, 21), *range(36, 1001)], "what a webhook awaits stays"
    assert sum(map(len, looked)) <= 40
    with pytest.raises(EventsGoneError, match="up to 35"):
        await store.read_after(34)
    await store.close()
