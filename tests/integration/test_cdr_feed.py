"""control.events.feed: records find their way from a real store to a sink, and where it stands outlives the process."""

import asyncio
import fcntl
import os
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from control.events import feed as feed_module
from control.events.feed import NumberedRecord, SinkFeed
from control.metrics import ControlMetrics
from control.store import sinks as sinks_module
from control.store.database import Database, migrations
from control.store.records import RecordStore
from control.store.sinks import SinkPosition, SinkPositions
from tests.harness.records import call_record

pytestmark = pytest.mark.integration


class ListSink:
    """Keeps what it gets; it can be told to fail, and to take only so much at a time."""

    def __init__(self, name: str = "list") -> None:
        self.name = name
        self.written: list[str] = []
        self.asked_without_records = 0
        self.failures: list[Exception] = []
        self.most = 1000

    def write(self, position: SinkPosition, records: Sequence[NumberedRecord]) -> SinkPosition:
        if self.failures:
            raise self.failures.pop(0)
        if not records:
            self.asked_without_records += 1
            return position
        taken = records[: self.most]
        self.written += [record.call_id for _, record in taken if record is not None]
        return SinkPosition(taken[-1][0], f"mark {taken[-1][0]}")


class Node:
    """A store with feeds, as the control plane has them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = ControlMetrics()
        self.feeds: list[SinkFeed] = []
        self.now = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)

    async def open(self) -> None:
        self.database = await Database.open(self.path, metrics=self.metrics)
        self.records = RecordStore(self.database)
        self.positions = SinkPositions(self.database, self.path)

    def feed(self, sink: ListSink) -> SinkFeed:
        feed = SinkFeed(
            sink, records=self.records, positions=self.positions, metrics=self.metrics, utc_now=lambda: self.now
        )
        self.feeds.append(feed)
        return feed

    def submit(self, *call_ids: str) -> None:
        """End calls; the feeds are woken by the commits."""
        for call_id in call_ids:
            self.database.submit([self.records.statement_for(call_record(call_id))], committed=self._wake)

    def _wake(self) -> None:
        for feed in self.feeds:
            feed.wake()

    async def close(self, timeout_s: float = 5.0) -> None:
        for feed in self.feeds:
            await feed.close(timeout_s)
        self.positions.close()
        await self.database.close()

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"sip_pbx_{name}_total", labels) or 0


@asynccontextmanager
async def running(path: Path) -> AsyncIterator[Node]:
    node = Node(path)
    await node.open()
    try:
        yield node
    finally:
        await node.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.sqlite"


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "_RETRY_FIRST_S", 0.01)
    monkeypatch.setattr(sinks_module, "LOCK_INTERVAL_S", 0.01)


async def test_a_commit_wakes_the_sink_and_records_come_in_its_order(path: Path) -> None:
    sink = ListSink()
    async with running(path) as node:
        node.feed(sink)
        node.submit("a")
        await until(lambda: sink.written == ["a"])
        node.submit("b", "c")
        await until(lambda: sink.written == ["a", "b", "c"])
        await until(lambda: node.count("cdrs_written", backend="list") == 3)


async def test_what_is_submitted_before_the_stop_is_written_before_it(path: Path) -> None:
    sink = ListSink()
    async with running(path) as node:
        node.feed(sink)
        node.submit(*(str(number) for number in range(500)))
    assert sink.written == [str(number) for number in range(500)]


async def test_the_next_process_goes_on_where_this_one_ended(path: Path) -> None:
    first, second = ListSink(), ListSink()
    for sink, call_ids in ((first, ("a", "b")), (second, ("c",))):
        async with running(path) as node:
            node.feed(sink)
            node.submit(*call_ids)
    assert (first.written, second.written) == (["a", "b"], ["c"])


async def test_each_sink_has_a_position_of_its_own_and_a_new_one_gets_every_record(path: Path) -> None:
    old, new = ListSink("old"), ListSink("new")
    async with running(path) as node:
        node.feed(old)
        node.submit("a")
    async with running(path) as node:
        node.feed(old)
        node.feed(new)
        node.submit("b")
    assert (old.written, new.written) == (["a", "b"], ["a", "b"])


async def test_a_sink_gets_again_what_it_did_not_take(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "BATCH_RECORDS", 5)
    sink = ListSink()
    sink.most = 3
    async with running(path) as node:
        node.feed(sink)
        node.submit(*"abcdefgh")
    assert sink.written == list("abcdefgh")


@pytest.mark.parametrize(
    ("failure", "kind"), [(OSError("the disk is gone"), "cdr_write_failed"), (ValueError("a bug"), "internal")]
)
async def test_a_sink_that_fails_is_tried_again_and_the_failure_is_counted(
    path: Path, failure: Exception, kind: str
) -> None:
    sink = ListSink()
    sink.failures = [failure, failure]
    async with running(path) as node:
        node.feed(sink)
        node.submit("a")
        await until(lambda: sink.written == ["a"])
        assert node.count("errors", component="events", kind=kind) == 2


async def test_what_a_sink_fails_to_write_at_the_stop_is_left_to_the_next_process(path: Path) -> None:
    broken, mended = ListSink(), ListSink()
    broken.failures = [OSError("broken")] * 10_000
    async with running(path) as node:
        node.feed(broken)
        node.submit("a")
        await until(lambda: len(broken.failures) < 10_000)
    async with running(path) as node:
        node.feed(mended)
    assert (broken.written, mended.written) == ([], ["a"])


async def test_a_sink_that_hangs_at_the_stop_is_waited_for_so_long_and_no_longer(path: Path) -> None:
    may_go_on = threading.Event()

    class HangingSink(ListSink):
        def write(self, position: SinkPosition, records: Sequence[NumberedRecord]) -> SinkPosition:
            assert may_go_on.wait(10)
            return position

    async with running(path) as node:
        feed = node.feed(HangingSink())
        node.submit("a")
        await feed.close(timeout_s=0.05)
        may_go_on.set()


async def test_a_process_whose_store_is_taken_by_another_stops_feeding_without_delay(path: Path) -> None:
    old_sink, new_sink = ListSink(), ListSink()
    old = Node(path)
    await old.open()
    old.feed(old_sink)
    old.submit("a")
    await until(lambda: old_sink.written == ["a"])
    async with running(path) as new:
        new.feed(new_sink)
        new.submit("b")
        await asyncio.wait_for(old.close(timeout_s=60), 10)
        await until(lambda: new_sink.written == ["b"])
    assert old_sink.written == ["a"]


async def test_a_record_that_cannot_be_read_is_counted_and_bars_no_other(path: Path) -> None:
    sink = ListSink()
    async with running(path) as node:
        node.submit("a", "b", "c")
        await node.database.write([("UPDATE call_records SET reason = 'of the future' WHERE call_id = 'b'", ())])
        node.feed(sink)
        await until(lambda: sink.written == ["a", "c"])
        await until(lambda: node.count("cdr_failures", backend="list") == 1)
        assert node.count("cdrs_written", backend="list") == 2


async def test_a_sink_is_asked_when_the_hour_ends_although_no_record_comes(path: Path) -> None:
    sink = ListSink()
    async with running(path) as node:
        node.now = datetime(2026, 3, 1, 12, 59, 59, 990_000, tzinfo=UTC)
        node.feed(sink)
        await until(lambda: sink.asked_without_records == 1)


async def test_one_process_at_a_time_feeds_the_sinks(path: Path) -> None:
    sink = ListSink()
    async with running(path) as node:
        other = os.open(path.with_name("store.sqlite-sinks"), os.O_RDWR | os.O_CREAT)
        fcntl.flock(other, fcntl.LOCK_EX)
        node.feed(sink)
        node.submit("a")
        # The other process writes it meanwhile, and ends.
        await node.positions.save("list", SinkPosition(1))
        os.close(other)
        node.submit("b")
        await until(lambda: sink.written == ["b"])


async def test_lines_of_the_version_before_are_not_written_again(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE schema_version (version INTEGER PRIMARY KEY) STRICT")
        for number, script in migrations():
            if number < 6:
                connection.executescript(f"{script} INSERT INTO schema_version VALUES ({number});")
        sql, values = RecordStore.statement_for(None, call_record("old"))  # type: ignore[arg-type]
        connection.execute(sql, values)
    connection.close()
    lines, table = ListSink("jsonl"), ListSink("csv")
    async with running(path) as node:
        node.feed(lines)
        node.feed(table)
        node.submit("new")
    assert (lines.written, table.written) == (["new"], ["old", "new"])
