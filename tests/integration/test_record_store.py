"""control.store on a real SQLite file."""

import asyncio
import json
import sqlite3
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from control.metrics import ControlMetrics
from control.pbx.records import CallDirection, CallId, CallRecord, Reason, Result, Termination
from control.store.database import StoreError, migrations
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


class Committed:
    """Remembers what a store made durable, and lets a test wait for it."""

    def __init__(self) -> None:
        self.records: list[CallRecord] = []
        self.groups: list[int] = []
        self._changed = asyncio.Event()

    def __call__(self, records: Sequence[CallRecord]) -> None:
        self.records += records
        self.groups.append(len(records))
        self._changed.set()

    async def wait_for(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.records) < count:
                self._changed.clear()
                await self._changed.wait()


async def opened(path: Path, committed: Committed | None = None) -> RecordStore:
    return await RecordStore.open(path, metrics=ControlMetrics(), committed=committed or Committed())


@pytest.mark.parametrize("record", [call_record(), UNANSWERED], ids=["answered", "unanswered"])
async def test_a_record_is_read_back_as_it_was_added(tmp_path: Path, record: CallRecord) -> None:
    committed = Committed()
    store = await opened(tmp_path / "cdr.sqlite", committed)
    store.add(record)
    await committed.wait_for(1)
    assert await store.get(record.call_id) == record
    assert await store.get(CallId("another")) is None
    await store.close()


async def test_records_outlive_the_store(tmp_path: Path) -> None:
    store = await opened(tmp_path / "new-folder" / "cdr.sqlite")
    for number in range(5):
        store.add(call_record(f"call-{number}"))
    await store.close()
    store = await opened(tmp_path / "new-folder" / "cdr.sqlite")
    assert [record.call_id for record in await store.newest()] == [f"call-{number}" for number in (4, 3, 2, 1, 0)]
    await store.close()


async def test_newest_records_come_in_pages(tmp_path: Path) -> None:
    committed = Committed()
    store = await opened(tmp_path / "cdr.sqlite", committed)
    for number in range(5):
        store.add(call_record(f"call-{number}"))
    await committed.wait_for(5)
    first = await store.newest(2)
    second = await store.newest(2, before=first[-1].call_id)
    assert [record.call_id for record in first + second] == ["call-4", "call-3", "call-2", "call-1"]
    await store.close()


async def test_a_burst_is_committed_in_groups(tmp_path: Path) -> None:
    committed = Committed()
    store = await opened(tmp_path / "cdr.sqlite", committed)
    for number in range(600):
        store.add(call_record(f"call-{number}"))
    await committed.wait_for(600)
    assert [record.call_id for record in committed.records] == [f"call-{number}" for number in range(600)]
    assert len(committed.groups) <= 4
    await store.close()


async def test_a_record_that_is_added_twice_is_kept_and_told_once(tmp_path: Path) -> None:
    committed = Committed()
    store = await opened(tmp_path / "cdr.sqlite", committed)
    store.add(call_record("call-1", caller="first"))
    store.add(call_record("call-1", caller="second"))
    store.add(call_record("call-2"))
    await committed.wait_for(2)
    assert [record.caller for record in committed.records if record.call_id == "call-1"] == ["first"]
    assert len(await store.newest()) == 2
    await store.close()


async def test_a_locked_file_delays_records_and_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("control.store.database.BUSY_TIMEOUT_MS", 10)
    path = tmp_path / "cdr.sqlite"
    committed = Committed()
    metrics = ControlMetrics()
    store = await RecordStore.open(path, metrics=metrics, committed=committed)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    store.add(call_record())
    labels = {"component": "store", "kind": "write_failed"}
    async with asyncio.timeout(10):
        while not metrics.registry.get_sample_value("sip_pbx_errors_total", labels):
            await asyncio.sleep(0.01)
    assert committed.records == []
    assert store.pending == 1
    other.execute("COMMIT")
    other.close()
    await committed.wait_for(1)
    assert store.pending == 0
    await store.close()


async def test_what_cannot_be_saved_before_the_end_goes_to_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("control.store.database.BUSY_TIMEOUT_MS", 10)
    path = tmp_path / "cdr.sqlite"
    metrics = ControlMetrics()
    store = await RecordStore.open(path, metrics=metrics, committed=Committed())
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    store.add(call_record("unlucky"))
    with capture_logs() as lines:
        await store.close(timeout_s=0.2)
    other.close()
    assert metrics.registry.get_sample_value("sip_pbx_cdr_failures_total", {"backend": "sqlite"}) == 1
    [line] = [line for line in lines if line["event"] == "store.record_unsaved"]
    assert json.loads(line["record"])["call_id"] == "unlucky"


async def test_a_full_queue_refuses_no_call_and_logs_the_record(tmp_path: Path) -> None:
    metrics = ControlMetrics()
    store = await RecordStore.open(tmp_path / "cdr.sqlite", metrics=metrics, committed=Committed(), max_pending=2)
    for number in range(3):
        store.add(call_record(f"call-{number}"))
    assert store.pending == 2
    assert metrics.registry.get_sample_value("sip_pbx_cdr_failures_total", {"backend": "sqlite"}) == 1
    await store.close()


async def test_text_that_is_not_unicode_is_refused_and_harms_no_other_record(tmp_path: Path) -> None:
    committed = Committed()
    store = await opened(tmp_path / "cdr.sqlite", committed)
    with pytest.raises(ValueError, match="surrogates"):
        store.add(call_record(caller="\udcff"))
    store.add(call_record())
    await committed.wait_for(1)
    await store.close()


async def test_a_commit_is_durable_before_it_is_told(tmp_path: Path) -> None:
    store = await opened(tmp_path / "cdr.sqlite")
    rows = [
        next(iter(await store._connection.execute_fetchall(f"PRAGMA {name}")))[0]
        for name in ("journal_mode", "synchronous")
    ]
    assert rows == ["wal", 2]
    await store.close()


async def test_a_file_of_a_newer_version_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "cdr.sqlite"
    await (await opened(path)).close()
    with sqlite3.connect(path) as connection:
        connection.execute("INSERT INTO schema_version VALUES (999)")
    connection.close()
    with pytest.raises(StoreError, match=r"cdr\.sqlite.*version 999"):
        await opened(path)


async def test_what_is_not_a_database_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "cdr.sqlite"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(StoreError, match=r"cdr\.sqlite"):
        await opened(path)


def test_migrations_are_numbered_without_gaps() -> None:
    assert [number for number, _ in migrations()] == list(range(1, len(migrations()) + 1))
