"""The node's SQLite file: how it is opened, written and read, and which version its tables have.

WAL with `synchronous=FULL`: a commit is on the disk when it returns. One thread writes: whatever was submitted while
the disk was busy with the commit before goes into the next one, so that the price of one `fsync` is shared by a burst.
Another thread reads, and waits for no writer.

Migrations are numbered SQL files beside this module; each is one transaction together with its row in `schema_version`.
A file written by a newer version is refused rather than guessed at.
"""

import asyncio
import contextlib
import re
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Final, TypeVar

import structlog

from control.metrics import ControlMetrics

BUSY_TIMEOUT_MS: Final = 5_000
MAX_PENDING: Final = 100_000

_MAX_GROUP: Final = 256
# How many instructions of SQLite's machine a query runs between two looks at the clock.
_INSTRUCTIONS: Final = 10_000
_RETRY_FIRST_S: Final = 0.1
_RETRY_MOST_S: Final = 5.0
# Errors of a statement, which no other try would mend; all others are of the disk, or of somebody who holds the file.
_FAULTY: Final = frozenset(
    {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_TOOBIG,
     sqlite3.SQLITE_RANGE, sqlite3.SQLITE_MISUSE}
)  # fmt: skip

Value = str | int | float | bytes | None
Statement = tuple[str, Sequence[Value]]
"""One SQL statement with its parameters."""
T = TypeVar("T")

_log = structlog.get_logger(__name__)


class StoreError(Exception):
    """The store cannot be used; the message says why."""


class StoreFencedError(Exception):
    """Another process has opened the file since, and it is that one's now."""


@dataclass(frozen=True, slots=True)
class Commit:
    """One that succeeded: how long it took, and when it ended (`time.monotonic`)."""

    seconds: float
    ended_at: float


@dataclass(frozen=True, slots=True)
class _Write:
    """Statements that are carried out together or not at all."""

    queued_at: float
    statements: tuple[Statement, ...]
    committed: Callable[[], None]
    given_up: Callable[[str], None]


def _nothing(*_: object) -> None:
    """The callback of those who do not ask."""


class Database:
    """One file. Callbacks are called in the event loop, in the order of what they are about.

    `failed` is told of each commit that the disk, or somebody who holds the file, did not let through.
    """

    def __init__(
        self,
        writer: sqlite3.Connection,
        reader: sqlite3.Connection,
        threads: tuple[ThreadPoolExecutor, ThreadPoolExecutor],
        *,
        metrics: ControlMetrics,
        max_pending: int,
        failed: Callable[[sqlite3.Error], None],
        epoch: int,
    ) -> None:
        self.epoch = epoch
        """Of this process; that of a later one is higher."""
        self._writer = writer
        self._reader = reader
        self._writing, self._reading = threads
        self._metrics = metrics
        self._max_pending = max_pending
        self._failed = failed
        self._fenced: Callable[[], None] = _nothing
        self._last_commit: Commit | None = None
        self._pending: deque[_Write] = deque()
        self._wake = asyncio.Event()
        self._closing = False
        self._task = asyncio.create_task(self._work(), name="store-writer")
        metrics.watch_store(self._pending.__len__)

    @classmethod
    async def open(
        cls,
        path: Path,
        *,
        metrics: ControlMetrics,
        max_pending: int = MAX_PENDING,
        failed: Callable[[sqlite3.Error], None] = _nothing,
    ) -> "Database":
        """Open the file, creating it and its folder when they are not there, and bring its tables up to this version.

        From then on it is this process's: one that had it before commits nothing more.

        Raises:
            StoreError: the message names the file and says why.
        """
        loop = asyncio.get_running_loop()
        threads = ThreadPoolExecutor(1, "store-writer"), ThreadPoolExecutor(1, "store-reader")
        try:
            writer, epoch = await loop.run_in_executor(threads[0], _open, path)
            reader = await loop.run_in_executor(threads[1], _open_to_read, path)
        except (sqlite3.Error, OSError) as error:
            _stop(threads)
            raise StoreError(f"cannot open {path}: {error}") from error
        except StoreError:
            _stop(threads)
            raise
        return cls(
            writer,
            reader,
            threads,
            metrics=metrics,
            max_pending=max_pending,
            failed=failed,
            epoch=epoch,
        )

    def when_fenced(self, callback: Callable[[], None]) -> None:
        """Call this, once, when another process has opened the file."""
        self._fenced = callback

    @property
    def pending(self) -> int:
        """Writes that are not on the disk yet."""
        return len(self._pending)

    @property
    def pending_since(self) -> float | None:
        """Since when the oldest of them waits (`time.monotonic`); None when there are none."""
        return self._pending[0].queued_at if self._pending else None

    @property
    def last_commit(self) -> Commit | None:
        """The newest one; None before the first."""
        return self._last_commit

    def submit(
        self,
        statements: Sequence[Statement],
        *,
        committed: Callable[[], None] = _nothing,
        given_up: Callable[[str], None] = _nothing,
    ) -> None:
        """Queue statements to be carried out together; never waits.

        `committed` is called once they are durable. While the disk fails, everything is tried again; a write that is
        itself at fault is dropped alone, and `given_up` is told why. A full queue gives up at once.
        """
        if len(self._pending) >= self._max_pending or self._task.done():
            given_up("the queue of the store is full" if not self._task.done() else "the store is closed")
            return
        self._pending.append(_Write(time.monotonic(), tuple(statements), committed, given_up))
        self._wake.set()

    async def write(self, statements: Sequence[Statement]) -> None:
        """Carry out statements together, and wait until they are durable.

        Raises:
            StoreError: they were given up.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def committed() -> None:
            if not done.done():
                done.set_result(None)

        def given_up(reason: str) -> None:
            if not done.done():
                done.set_exception(StoreError(reason))

        self.submit(statements, committed=committed, given_up=given_up)
        await done

    async def read(self, query: Callable[[sqlite3.Connection], T], timeout_s: float = 5.0) -> T:
        """What `query` finds; it runs in the reader's thread, on one snapshot of what is committed.

        Raises:
            StoreError: it failed, or took too long.
        """
        loop = asyncio.get_running_loop()
        deadline = time.monotonic() + timeout_s
        try:
            # Not `wait_for`: before Python 3.12 it swallows a cancellation that comes together with the answer.
            async with asyncio.timeout(timeout_s):
                return await loop.run_in_executor(self._reading, _on_snapshot, self._reader, query, deadline)
        except TimeoutError:
            raise StoreError(f"the store did not answer within {timeout_s:g} s") from None
        except (sqlite3.Error, RuntimeError) as error:
            raise StoreError(f"the store cannot be read: {error}") from error

    async def close(self, timeout_s: float = 10.0) -> None:
        """Commit what is queued, for at most `timeout_s`, and close the file; what is left is given up."""
        self._closing = True
        self._wake.set()
        done, _ = await asyncio.wait({self._task}, timeout=timeout_s)
        if not done:
            self._task.cancel()
            self._writer.interrupt()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        while self._pending:
            self._call(self._pending.popleft().given_up, "the store was closed")
        loop = asyncio.get_running_loop()
        for thread, connection in ((self._reading, self._reader), (self._writing, self._writer)):
            try:
                await asyncio.wait_for(loop.run_in_executor(thread, connection.close), timeout_s)
            except (TimeoutError, sqlite3.Error) as error:
                _log.error("store.close_failed", error=str(error))
        _stop((self._writing, self._reading))

    async def _work(self) -> None:
        retry_s = _RETRY_FIRST_S
        loop = asyncio.get_running_loop()
        while True:
            if not self._pending:
                if self._closing:
                    return
                self._wake.clear()
                await self._wake.wait()
                continue
            group = [self._pending[index] for index in range(min(len(self._pending), _MAX_GROUP))]
            began = time.monotonic()
            try:
                faults = await loop.run_in_executor(self._writing, _commit, self._writer, self.epoch, group)
            except sqlite3.Error as error:
                self._metrics.error("store", "write_failed")
                _log.error("store.write_failed", error=str(error), pending=len(self._pending), retry_s=retry_s)
                self._call(self._failed, error)
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, _RETRY_MOST_S)
                continue
            except StoreFencedError as error:
                _log.error("store.fenced", error=str(error), pending=len(self._pending))
                while self._pending:
                    self._call(self._pending.popleft().given_up, str(error))
                self._call(self._fenced)
                return
            except Exception:  # noqa: BLE001 - the boundary
                # The boundary of the writer's task: nobody must wait for ever behind a group that trips over a bug.
                self._metrics.error("store", "internal")
                _log.exception("store.group_failed", writes=len(group))
                for _ in group:
                    self._call(self._pending.popleft().given_up, "a bug of the store; the log has it")
                continue
            retry_s = _RETRY_FIRST_S
            ended = time.monotonic()
            self._last_commit = Commit(ended - began, ended)
            self._metrics.committed(ended - began)
            for index, write in enumerate(group):
                self._pending.popleft()
                if index in faults:
                    self._metrics.error("store", "write_faulty")
                    _log.error("store.write_dropped", error=faults[index])
                    self._call(write.given_up, faults[index])
                else:
                    self._call(write.committed)

    def _call(self, callback: Callable[..., None], *arguments: object) -> None:
        try:
            callback(*arguments)
        except Exception:  # noqa: BLE001 - the boundary
            # The boundary of the writer's task: a bug of one who wrote must not cost the others their store.
            self._metrics.error("store", "callback_failed")
            _log.exception("store.callback_failed")


def _commit(connection: sqlite3.Connection, epoch: int, group: Sequence[_Write]) -> dict[int, str]:
    """Carry out a group in one transaction; those at fault are left out and told by their index.

    Raises: sqlite3.Error, StoreFencedError when nothing of it was done.
    """
    faults: dict[int, str] = {}
    try:
        connection.execute("BEGIN IMMEDIATE")
        (owner,) = connection.execute("SELECT epoch FROM owner").fetchone()
        if owner != epoch:
            raise StoreFencedError(f"epoch {owner} has the file, this process had {epoch}")
        for index, write in enumerate(group):
            connection.execute("SAVEPOINT write_of_group")
            try:
                for sql, parameters in write.statements:
                    connection.execute(sql, parameters)
            except (sqlite3.Error, sqlite3.Warning, ValueError, TypeError, OverflowError) as error:
                if not _is_fault(error):
                    raise
                faults[index] = str(error)
                connection.execute("ROLLBACK TO write_of_group")
            connection.execute("RELEASE write_of_group")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
        raise
    return faults


def _on_snapshot(connection: sqlite3.Connection, query: Callable[[sqlite3.Connection], T], deadline: float) -> T:
    """Run a query in a transaction of its own, until a time of `time.monotonic`.

    Raises: TimeoutError, sqlite3.Error.
    """
    # Not `interrupt`: called from the event loop, it might hit the query that came next.
    connection.set_progress_handler(lambda: time.monotonic() > deadline, _INSTRUCTIONS)
    try:
        connection.execute("BEGIN")
        return query(connection)
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_INTERRUPT:
            raise TimeoutError from error
        raise
    finally:
        connection.set_progress_handler(None, 0)
        connection.rollback()


def _is_fault(error: Exception) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    return code is None or code & 0xFF in _FAULTY


def _open(path: Path) -> tuple[sqlite3.Connection, int]:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(
        path, isolation_level=None, timeout=BUSY_TIMEOUT_MS / 1000, check_same_thread=False, cached_statements=256
    )
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        _migrate(connection, path)
        (epoch,) = connection.execute("UPDATE owner SET epoch = epoch + 1 RETURNING epoch").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection, epoch


def _open_to_read(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(
        path, isolation_level=None, timeout=BUSY_TIMEOUT_MS / 1000, check_same_thread=False, cached_statements=64
    )
    connection.execute("PRAGMA query_only = ON")
    return connection


def _stop(threads: Sequence[ThreadPoolExecutor]) -> None:
    for thread in threads:
        thread.shutdown(wait=False, cancel_futures=True)


def migrations() -> list[tuple[int, str]]:
    """The SQL of each migration by its number, in order."""
    entries = files("control.store").joinpath("migrations").iterdir()
    named = [(re.fullmatch(r"(\d{4})_\w+\.sql", entry.name), entry) for entry in entries]
    return sorted((int(match[1]), entry.read_text(encoding="utf-8")) for match, entry in named if match)


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    connection.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER PRIMARY KEY) STRICT")
    (current,) = connection.execute("SELECT coalesce(max(version), 0) FROM schema_version").fetchone()
    known = migrations()
    if current > known[-1][0]:
        raise StoreError(f"cannot open {path}: its tables have version {current}, this program knows {known[-1][0]}")
    for version, script in known:
        if version > current:
            entry = f"INSERT INTO schema_version VALUES ({version});"  # noqa: S608 - a file name's number
            connection.executescript(f"BEGIN IMMEDIATE; {script} {entry} COMMIT;")
