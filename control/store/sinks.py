"""How far each sink of call records has come, kept where the records are.

A sink reads the records in the order of their ids and commits its position behind what it has surely written. So a
crash makes it write again what was not committed, and never leaves anything out; a sink that must not write twice
either finds out by its mark what it had written.

One process at a time feeds them, which a lock on a file beside the store ensures: one that was stopped and wakes up
when another has taken its place would write what that has written already.
"""

import asyncio
import fcntl
import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from control.store.database import Database

LOCK_INTERVAL_S: Final = 0.5

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SinkPosition:
    """The id of the last record that a sink has surely written, 0 before the first, and the sink's own mark."""

    record_id: int = 0
    mark: str = ""


class SinkPositions:
    """Loads and saves positions by the sinks' names."""

    def __init__(self, database: Database, store: Path) -> None:
        self._database = database
        self._lock_path = store.with_name(f"{store.name}-sinks")
        self._lock: int | None = None
        self._is_warned = False

    async def hold(self) -> None:
        """Return once no other process feeds the sinks of this store; from then on, none will.

        Raises:
            OSError: the lock cannot be used.
        """
        while not self._has_lock():
            if not self._is_warned:
                self._is_warned = True
                _log.warning("cdr.sinks_locked", lock=str(self._lock_path), advice="another control plane feeds them")
            await asyncio.sleep(LOCK_INTERVAL_S)

    def close(self) -> None:
        """Let others feed the sinks."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _has_lock(self) -> bool:
        if self._lock is not None:
            return True
        descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        except OSError:
            os.close(descriptor)
            raise
        self._lock = descriptor
        return True

    async def load(self, name: str) -> SinkPosition:
        """Where the sink stands; before the first record when it is new.

        Raises:
            StoreError: the store cannot be read.
        """

        def query(connection: sqlite3.Connection) -> SinkPosition:
            row = connection.execute("SELECT record_id, mark FROM sinks WHERE name = ?", (name,)).fetchone()
            return SinkPosition() if row is None else SinkPosition(*row)

        return await self._database.read(query)

    async def save(self, name: str, position: SinkPosition) -> None:
        """Return once the position is durable.

        Raises:
            StoreError: it was given up.
        """
        await self._database.write(
            [("INSERT OR REPLACE INTO sinks VALUES (?, ?, ?)", (name, position.record_id, position.mark))]
        )

    async def settled(self) -> None:
        """Return once everything is durable that was submitted to the store before.

        Raises:
            StoreError: the store was closed meanwhile.
        """
        await self._database.write(())
