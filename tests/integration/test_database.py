"""control.store.database on a real SQLite file: group commits, a disk that fails, writes at fault, and being killed."""

import asyncio
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from control.metrics import ControlMetrics
from control.store.database import Database, Statement, StoreError, migrations

pytestmark = pytest.mark.integration

DELETED = "SELECT count(*) FROM webhook_deliveries"


def event(sequence: int) -> Statement:
    values = (sequence, f"evt_{sequence}", "node.error", "2026-03-01T09:30:00.000000+00:00", b"{}")
    return "INSERT INTO events (sequence, id, type, at, data) VALUES (?, ?, ?, ?, ?)", values


def sequences(connection: sqlite3.Connection) -> list[int]:
    return [row[0] for row in connection.execute("SELECT sequence FROM events ORDER BY sequence")]


async def opened(path: Path, *, metrics: ControlMetrics | None = None, max_pending: int = 1000) -> Database:
    return await Database.open(path, metrics=metrics or ControlMetrics(), max_pending=max_pending)


async def test_what_was_written_is_read_and_outlives_the_database(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "store.sqlite"
    database = await opened(path)
    await database.write([event(1), event(2)])
    assert await database.read(sequences) == [1, 2]
    await database.close()
    database = await opened(path)
    assert await database.read(sequences) == [1, 2]
    await database.close()


async def test_callbacks_come_in_order_once_their_writes_are_on_the_disk(tmp_path: Path) -> None:
    database = await opened(tmp_path / "store.sqlite")
    told: list[int] = []
    other = sqlite3.connect(tmp_path / "store.sqlite")

    def committed(sequence: int) -> None:
        assert sequence in sequences(other)
        told.append(sequence)

    for sequence in range(1, 601):
        database.submit([event(sequence)], committed=lambda sequence=sequence: committed(sequence))  # type: ignore[misc]
    await database.write([event(601)])
    assert told == list(range(1, 601))
    assert database.pending == 0
    other.close()
    await database.close()


async def test_a_burst_is_committed_in_few_transactions(tmp_path: Path) -> None:
    metrics = ControlMetrics()
    database = await opened(tmp_path / "store.sqlite", metrics=metrics)
    for sequence in range(1, 600):
        database.submit([event(sequence)])
    await database.write([event(600)])
    commits = metrics.registry.get_sample_value("sip_pbx_store_commit_seconds_count")
    assert commits is not None
    assert 1 <= commits <= 4
    await database.close()


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(event(1), id="constraint"),
        pytest.param(("INSERT INTO nowhere VALUES (1)", ()), id="no such table"),
        pytest.param(("INSERT INTO events (sequence) VALUES (?)", (1, 2)), id="wrong number of parameters"),
        pytest.param(("INSERT INTO events (id) VALUES (?)", ("\udcff",)), id="text that is not Unicode"),
        pytest.param(("INSERT INTO events (sequence) VALUES (?)", (2**63,)), id="number too large"),
    ],
)
async def test_a_write_at_fault_is_dropped_as_a_whole_and_alone(tmp_path: Path, fault: Statement) -> None:
    database = await opened(tmp_path / "store.sqlite")
    reasons: list[str] = []
    database.submit([event(1)])
    database.submit([event(2), fault], given_up=reasons.append)
    database.submit([event(3)])
    await database.write([event(4)])
    assert await database.read(sequences) == [1, 3, 4]
    assert len(reasons) == 1
    with pytest.raises(StoreError):
        await database.write([fault, event(5)])
    await database.close()


async def test_a_locked_file_delays_writes_and_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("control.store.database.BUSY_TIMEOUT_MS", 10)
    metrics = ControlMetrics()
    database = await opened(tmp_path / "store.sqlite", metrics=metrics)
    other = sqlite3.connect(tmp_path / "store.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    done = asyncio.create_task(database.write([event(1)]))
    labels = {"component": "store", "kind": "write_failed"}
    async with asyncio.timeout(10):
        while not metrics.registry.get_sample_value("sip_pbx_errors_total", labels):
            await asyncio.sleep(0.01)
    assert not done.done()
    assert metrics.registry.get_sample_value("sip_pbx_store_pending") == 1
    other.execute("COMMIT")
    other.close()
    await asyncio.wait_for(done, 10)
    assert await database.read(sequences) == [1]
    await database.close()


async def test_what_cannot_be_written_before_the_end_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("control.store.database.BUSY_TIMEOUT_MS", 10)
    database = await opened(tmp_path / "store.sqlite")
    other = sqlite3.connect(tmp_path / "store.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    reasons: list[str] = []
    database.submit([event(1)], given_up=reasons.append)
    await database.close(timeout_s=0.2)
    other.close()
    assert reasons == ["the store was closed"]


async def test_a_full_queue_and_a_closed_database_give_up_at_once(tmp_path: Path) -> None:
    database = await opened(tmp_path / "store.sqlite", max_pending=1)
    reasons: list[str] = []
    database.submit([event(1)], given_up=reasons.append)
    database.submit([event(2)], given_up=reasons.append)
    await database.close()
    database.submit([event(3)], given_up=reasons.append)
    assert reasons == ["the queue of the store is full", "the store is closed"]


async def test_a_callback_that_fails_costs_nobody_else_their_store(tmp_path: Path) -> None:
    database = await opened(tmp_path / "store.sqlite")

    def fails() -> None:
        raise ZeroDivisionError

    database.submit([event(1)], committed=fails)
    await database.write([event(2)])
    assert await database.read(sequences) == [1, 2]
    await database.close()


async def test_a_query_that_takes_too_long_is_cut_off_and_harms_no_other(tmp_path: Path) -> None:
    database = await opened(tmp_path / "store.sqlite")
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    with pytest.raises(StoreError, match=r"did not answer within 0\.1 s"):
        await database.read(lambda connection: connection.execute(endless).fetchone(), timeout_s=0.1)
    assert await database.read(sequences) == []
    await database.close()


async def test_a_reader_cannot_write(tmp_path: Path) -> None:
    database = await opened(tmp_path / "store.sqlite")
    with pytest.raises(StoreError, match="readonly"):
        await database.read(lambda connection: connection.execute("DELETE FROM events"))
    await database.close()


async def test_a_file_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    await (await opened(path)).close()
    with sqlite3.connect(path) as connection:
        connection.execute("INSERT INTO schema_version VALUES (9999)")
    connection.close()
    with pytest.raises(StoreError, match="have version 9999, this program knows"):
        await opened(path)


async def test_a_file_of_the_first_version_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("CREATE TABLE schema_version (version INTEGER PRIMARY KEY) STRICT")
    connection.executescript(f"{migrations()[0][1]} INSERT INTO schema_version VALUES (1);")
    connection.close()
    database = await opened(path)
    assert await database.read(sequences) == []
    assert await database.read(lambda reader: reader.execute(DELETED).fetchone()) == (0,)
    await database.close()


@pytest.mark.parametrize("trouble", ["a file in the way", "no database"])
async def test_a_path_that_cannot_be_used_is_named(tmp_path: Path, trouble: str) -> None:
    (tmp_path / "file").write_text("this is no database, and long enough to be told apart from one" * 100)
    path = tmp_path / "file" / "store.sqlite" if trouble == "a file in the way" else tmp_path / "file"
    with pytest.raises(StoreError, match=r"cannot open .*file"):
        await opened(path)


WRITER = """
import asyncio, sys
from pathlib import Path
from control.metrics import ControlMetrics
from control.store.database import Database
from tests.integration.test_database import event

async def main():
    database = await Database.open(Path(sys.argv[1]), metrics=ControlMetrics())
    for sequence in range(1, 1_000_000):
        database.submit([event(sequence)], committed=lambda sequence=sequence: print(sequence, flush=True))
        if sequence % 50 == 0:
            await asyncio.sleep(0)
        while database.pending > 500:
            await asyncio.sleep(0.001)

asyncio.run(main())
"""


async def test_what_was_told_to_be_committed_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    told = await asyncio.to_thread(written_until_killed, path)
    database = await opened(path)
    found = await database.read(sequences)
    await database.close()
    assert told == list(range(1, len(told) + 1))
    assert found[: len(told)] == told


def written_until_killed(path: Path) -> list[int]:
    """What a process told to be committed before it was killed in the middle of its work."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as process:
        assert process.stdout is not None
        told = [int(process.stdout.readline()) for _ in range(1000)]
        process.send_signal(signal.SIGKILL)
        lines = process.stdout.read().splitlines(keepends=True)
    return told + [int(line) for line in lines if line.endswith(b"\n")]
