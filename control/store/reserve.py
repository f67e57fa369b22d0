"""Disk space set aside, so that calls that were admitted can be finished when the disk is full.

A file beside the store holds the space. When a commit fails for want of it the file is emptied, and what waits is
written into the room that it leaves: records, events and the journal of the calls that run. From then on new calls are
refused, until the space could be set aside again.

How much: `RESERVED_ONCE` for the write-ahead log, which grows to a thousand pages between two checkpoints and further
while a reader holds it up, and `RESERVED_PER_CALL` for each call that may run: about four times what an answered call
with audio and video adds to the tables and their indexes. File systems that compress or copy on write may need more
than is set aside.
"""

import asyncio
import contextlib
import errno
import os
import sqlite3
from pathlib import Path
from typing import Final

import structlog

from control.metrics import ControlMetrics
from control.store.database import Database, StoreError

RESERVED_ONCE: Final = 16 * 1024 * 1024
RESERVED_PER_CALL: Final = 32 * 1024
CHECK_INTERVAL_S: Final = 5.0

# What must be free beyond the reserve before it is set aside, so that calls are not taken and refused in turn.
_MARGIN_LEAST: Final = 1024 * 1024
_BLOCK_BYTES: Final = 512  # of st_blocks, whatever the file system's own blocks are

_log = structlog.get_logger(__name__)


def reserve_for(max_calls: int) -> int:
    """Bytes to set aside for a node that runs so many calls at once."""
    return RESERVED_ONCE + RESERVED_PER_CALL * max_calls


async def open_store(path: Path, reserve: "Reserve", *, metrics: ControlMetrics) -> Database:
    """Open the store; on a full disk, with the space of the reserve.

    Raises:
        StoreError: it cannot be opened.
    """
    try:
        return await Database.open(path, metrics=metrics, failed=reserve.commit_failed)
    except StoreError as error:
        if not _is_of_space(error.__cause__):
            raise
        await reserve.release()
    return await Database.open(path, metrics=metrics, failed=reserve.commit_failed)


class Reserve:
    """Holds `size_bytes` in a file beside the store, gives them up when the disk is full, and takes them again.

    With 0 bytes nothing is held, and a full disk is noticed all the same.
    """

    def __init__(self, store: Path, size_bytes: int, *, metrics: ControlMetrics) -> None:
        self._path = store.with_name(f"{store.name}-reserve")
        self._size_bytes = size_bytes
        self._metrics = metrics
        self._trouble: str | None = None
        self._full = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    @property
    def trouble(self) -> str | None:
        """Why no new call should be taken; None while the space is set aside."""
        return self._trouble

    async def start(self) -> None:
        """Set the space aside, or say in `trouble` why that is not possible, and go on trying."""
        await self._allocate()
        self._keeper = asyncio.create_task(self._keep(), name="store-reserve")

    def commit_failed(self, error: sqlite3.Error) -> None:
        """Hear that the store could not commit: if for want of space, make room."""
        if _is_of_space(error):
            self._trouble = f"no space on the disk of {self._path.parent}"
            self._full.set()

    async def release(self) -> None:
        """Give the space up now."""
        try:
            released = await asyncio.to_thread(_empty, self._path)
        except OSError as error:
            self._metrics.error("store", "reserve_failed")
            _log.error("store.reserve_kept", path=str(self._path), error=str(error))
            return
        if released:
            self._metrics.error("store", "disk_full")
            _log.error("store.reserve_released", path=str(self._path), bytes=released, advice="make room on this disk")

    async def close(self) -> None:
        """Stop; the space stays set aside, because whoever comes next must finish what is left."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper

    async def _keep(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CHECK_INTERVAL_S):
                    await self._full.wait()
            if self._full.is_set():
                self._full.clear()
                await self.release()
            else:
                await self._allocate()

    async def _allocate(self) -> None:
        trouble = await asyncio.to_thread(_allocate, self._path, self._size_bytes)
        if self._full.is_set():
            return  # a commit failed meanwhile: the space is needed at once
        if trouble is not None and self._trouble is None:
            _log.error("store.reserve_missing", reason=trouble, advice="new calls are refused until it is there")
        elif trouble is None and self._trouble is not None:
            _log.info("store.reserve_allocated", path=str(self._path), bytes=self._size_bytes)
        self._trouble = trouble


def _is_of_space(error: BaseException | None) -> bool:
    """Whether more room may help: SQLite does not tell a quota that was met from a broken disk."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)


def _allocate(path: Path, size: int) -> str | None:
    """Have the file hold `size` bytes of disk; what hinders it, None when nothing does."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            status = os.fstat(descriptor)
            held = status.st_blocks * _BLOCK_BYTES
            if size and status.st_size == size and held >= size:
                return None
            volume = os.fstatvfs(descriptor)
            free = volume.f_bavail * volume.f_frsize + held
            needed = size + max(size // 2, _MARGIN_LEAST)
            if free < needed:
                return f"{_mib(free)} are free for the reserve {path}, which needs {_mib(needed)}"
            os.ftruncate(descriptor, size)
            if size:
                _take(descriptor, size)
        finally:
            os.close(descriptor)
    except OSError as error:
        return f"cannot set space aside in {path}: {error.strerror}"
    return None


def _take(descriptor: int, size: int) -> None:
    """Raises: OSError, after which the file holds nothing."""
    try:
        os.posix_fallocate(descriptor, 0, size)
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, 0)
        raise


def _empty(path: Path) -> int:
    """Give the file's space back, and tell how much that was.

    Raises: OSError.
    """
    with contextlib.suppress(FileNotFoundError):
        held = path.stat().st_blocks * _BLOCK_BYTES
        os.truncate(path, 0)
        return held
    return 0


def _mib(size: int) -> str:
    return f"{size / 1048576:.1f} MiB"
