"""The store on a disk that is full, and under somebody who locks it: nothing is lost, and new calls would be refused.

The full disk is a real one: a small tmpfs, mounted by the test.
"""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from control.events.cdr import JsonLines
from control.events.cdr_file import CdrFile, Rotation
from control.events.feed import SinkFeed
from control.metrics import ControlMetrics
from control.store import database as database_module
from control.store import reserve as reserve_module
from control.store.database import Database, StoreError
from control.store.health import StoreHealth
from control.store.records import RecordStore
from control.store.reserve import Reserve, open_store, reserve_for
from control.store.sinks import SinkPositions
from tests.harness.disk import fill, small_disk
from tests.harness.records import call_record

pytestmark = pytest.mark.integration

MIB = 1024 * 1024
DISK_BYTES = 24 * MIB
RESERVE_BYTES = 4 * MIB
SLOW_AFTER_S = 0.2


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, which can be filled."""
    with small_disk(tmp_path / "disk", DISK_BYTES) as folder:
        yield folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reserve_module, "CHECK_INTERVAL_S", 0.05)
    monkeypatch.setattr(database_module, "_RETRY_MOST_S", 0.1)


class Node:
    """A store with what watches over it, and a file of records on a disk that may be another one."""

    def __init__(self, store: Path, cdr_path: Path, reserve_bytes: int) -> None:
        self.metrics = ControlMetrics()
        self.store = store
        self.cdr_path = cdr_path
        self.reserve = Reserve(store, reserve_bytes, metrics=self.metrics)
        self.committed: list[str] = []

    async def open(self) -> None:
        self.database = await open_store(self.store, self.reserve, metrics=self.metrics)
        await self.reserve.start()
        self.health = StoreHealth(self.database, slow_after_s=SLOW_AFTER_S, clock=time.monotonic)
        self._records = RecordStore(self.database)
        self._positions = SinkPositions(self.database, self.store)
        sink = CdrFile(self.cdr_path, JsonLines(), rotation=Rotation(), utc_now=lambda: datetime.now(UTC))
        self._feed = SinkFeed(sink, records=self._records, positions=self._positions, metrics=self.metrics)

    async def close(self) -> None:
        await self._feed.close()
        self._positions.close()
        await self.reserve.close()
        await self.database.close()

    def end_calls(self, *call_ids: str) -> None:
        for call_id in call_ids:

            def committed(call_id: str = call_id) -> None:
                self.committed.append(call_id)
                self._feed.wake()

            self.database.submit([self._records.statement_for(call_record(call_id))], committed=committed)

    async def stored(self) -> list[str]:
        records = await self._records.after(0, 100_000)
        return [record.call_id for _, record in records if record is not None]

    def slowness(self) -> str:
        return self.health.trouble or ""

    def lines(self) -> list[str]:
        lines = JsonLines()
        return [lines.key(line) or "?" for line in self.cdr_path.read_bytes().splitlines(keepends=True)]


@asynccontextmanager
async def running(store: Path, cdr_path: Path, reserve_bytes: int = RESERVE_BYTES) -> AsyncIterator[Node]:
    node = Node(store, cdr_path, reserve_bytes)
    await node.open()
    try:
        yield node
    finally:
        await node.close()


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512 if path.exists() else 0


async def until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Somebody holds the file, as a backup or a person with a shell may."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        other.execute("ROLLBACK")
        other.close()


# The reserve


def test_the_default_has_room_for_every_call_that_may_run() -> None:
    assert reserve_for(1000) == 16 * MIB + 1000 * 32 * 1024


async def test_what_a_call_adds_to_the_store_is_within_its_share_of_the_reserve(tmp_path: Path) -> None:
    async with running(tmp_path / "store.sqlite", tmp_path / "cdr.jsonl", 0) as node:
        node.end_calls(*(str(number) for number in range(500)))
        await until(lambda: len(node.committed) == 500)
    size = (tmp_path / "store.sqlite").stat().st_size
    assert 4 * size / 500 < reserve_module.RESERVED_PER_CALL


async def test_the_space_is_set_aside_and_stays_so_for_the_next_process(tmp_path: Path) -> None:
    store = tmp_path / "store.sqlite"
    for _ in range(2):
        async with running(store, tmp_path / "cdr.jsonl") as node:
            assert node.reserve.trouble is None
            assert allocated(tmp_path / "store.sqlite-reserve") >= RESERVE_BYTES
    assert allocated(tmp_path / "store.sqlite-reserve") >= RESERVE_BYTES
    async with running(store, tmp_path / "cdr.jsonl", MIB):
        assert allocated(tmp_path / "store.sqlite-reserve") == MIB


async def test_a_full_disk_costs_no_record_and_new_calls_are_refused_until_there_is_room(
    disk: Path, tmp_path: Path
) -> None:
    calls = [str(number) for number in range(600)]
    async with running(disk / "store.sqlite", tmp_path / "cdr.jsonl") as node:
        filler = fill(disk)
        node.end_calls(*calls)
        await until(lambda: node.reserve.trouble == f"no space on the disk of {disk}")
        await until(lambda: node.committed == calls)
        assert allocated(disk / "store.sqlite-reserve") == 0
        # The room that the calls needed was there, and less than what is asked for before it is set aside again.
        await until(lambda: node.reserve.trouble is not None and "are free for the reserve" in node.reserve.trouble)
        filler.unlink()
        await until(lambda: node.reserve.trouble is None)
        assert allocated(disk / "store.sqlite-reserve") >= RESERVE_BYTES
        assert await node.stored() == calls
        assert node.metrics.registry.get_sample_value(
            "sip_pbx_errors_total", {"component": "store", "kind": "disk_full"}
        ) == 1  # fmt: skip
    assert node.lines() == calls


async def test_when_even_the_reserve_is_used_up_writes_wait_for_room(disk: Path, tmp_path: Path) -> None:
    calls = [str(number) for number in range(2000)]
    async with running(disk / "store.sqlite", tmp_path / "cdr.jsonl", 512 * 1024) as node:
        filler = fill(disk)
        node.end_calls(*calls)
        await until(lambda: node.health.trouble is not None and node.reserve.trouble is not None)
        assert len(node.committed) < len(calls)
        filler.unlink()
        await until(lambda: node.committed == calls)
        await until(lambda: node.reserve.trouble is None and node.health.trouble is None)
        assert await node.stored() == calls
    assert node.lines() == calls


async def test_files_of_records_on_the_full_disk_are_filled_up_afterwards(disk: Path) -> None:
    calls = [str(number) for number in range(300)]
    async with running(disk / "store.sqlite", disk / "cdr.jsonl") as node:
        node.end_calls("first")
        await until(lambda: node.cdr_path.exists() and node.lines() == ["first"])
        filler = fill(disk)
        node.end_calls(*calls)
        await until(lambda: node.committed == ["first", *calls])
        filler.unlink()
    assert node.lines() == ["first", *calls]


async def test_a_node_with_too_little_room_takes_no_calls_and_says_how_much_it_needs(
    disk: Path, tmp_path: Path
) -> None:
    filler = fill(disk, leave=5 * MIB)
    async with running(disk / "store.sqlite", tmp_path / "cdr.jsonl") as node:
        assert node.reserve.trouble is not None
        assert node.reserve.trouble.endswith("store.sqlite-reserve, which needs 6.0 MiB")
        assert allocated(disk / "store.sqlite-reserve") == 0
        filler.unlink()
        await until(lambda: node.reserve.trouble is None)


async def test_a_reserve_that_somebody_deletes_comes_back(tmp_path: Path) -> None:
    async with running(tmp_path / "store.sqlite", tmp_path / "cdr.jsonl"):
        (tmp_path / "store.sqlite-reserve").unlink()
        await until(lambda: allocated(tmp_path / "store.sqlite-reserve") >= RESERVE_BYTES)


async def test_a_store_is_opened_on_a_full_disk_with_the_space_of_the_reserve(disk: Path, tmp_path: Path) -> None:
    async with running(disk / "store.sqlite", tmp_path / "cdr.jsonl"):
        pass
    fill(disk)
    (disk / "store.sqlite").unlink()
    fill(disk)
    with pytest.raises(StoreError, match="cannot open"):
        await Database.open(disk / "store.sqlite", metrics=ControlMetrics())
    async with running(disk / "store.sqlite", tmp_path / "other.jsonl") as node:
        node.end_calls("a")
        await until(lambda: node.committed == ["a"])
        assert node.reserve.trouble is not None


async def test_a_store_that_cannot_be_opened_for_another_reason_costs_no_reserve(tmp_path: Path) -> None:
    (tmp_path / "store.sqlite").write_bytes(b"no database, " * 1000)
    reserve = Reserve(tmp_path / "store.sqlite", MIB, metrics=ControlMetrics())
    await reserve.start()
    with pytest.raises(StoreError, match="not a database"):
        await open_store(tmp_path / "store.sqlite", reserve, metrics=ControlMetrics())
    await reserve.close()
    assert allocated(tmp_path / "store.sqlite-reserve") == MIB


async def test_a_reserve_that_cannot_be_made_is_trouble(tmp_path: Path) -> None:
    (tmp_path / "store.sqlite-reserve").mkdir()
    reserve = Reserve(tmp_path / "store.sqlite", MIB, metrics=ControlMetrics())
    await reserve.start()
    assert reserve.trouble == f"cannot set space aside in {tmp_path}/store.sqlite-reserve: Is a directory"
    (tmp_path / "store.sqlite-reserve").rmdir()
    await until(lambda: reserve.trouble is None)
    await reserve.close()


async def test_without_a_reserve_a_full_disk_is_noticed_all_the_same(disk: Path, tmp_path: Path) -> None:
    async with running(disk / "store.sqlite", tmp_path / "cdr.jsonl", 0) as node:
        filler = fill(disk)
        node.end_calls(*(str(number) for number in range(300)))
        await until(lambda: node.reserve.trouble is not None)
        filler.unlink()
        await until(lambda: node.reserve.trouble is None and len(node.committed) == 300)


# Locked by somebody else


async def held_for(node: Node, seconds: float) -> None:
    """Lock the store for so long while calls end; all is written afterwards, and trouble is told meanwhile."""
    calls = [str(number) for number in range(50)]
    with locked(node.store):
        node.end_calls(*calls)
        assert not node.slowness(), "nobody is refused for a moment's lock"
        await until(lambda: node.health.trouble is not None)
        await asyncio.sleep(seconds)
        assert node.committed == []
        assert node.slowness().startswith("50 writes wait")
        assert node.reserve.trouble is None, "a lock is not a full disk"
    await until(lambda: node.committed == calls)
    await until(lambda: node.health.trouble is None)
    assert await node.stored() == calls


async def test_a_locked_store_delays_records_loses_none_and_is_trouble_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "BUSY_TIMEOUT_MS", 100)
    async with running(tmp_path / "store.sqlite", tmp_path / "cdr.jsonl") as node:
        await held_for(node, 0.5)
    assert len(node.lines()) == 50


@pytest.mark.soak
async def test_a_store_locked_for_ten_seconds_delays_records_and_loses_none(tmp_path: Path) -> None:
    async with running(tmp_path / "store.sqlite", tmp_path / "cdr.jsonl") as node:
        await held_for(node, 10)
    assert len(node.lines()) == 50
