"""How far each sink of call records has come, kept where the records are.

A sink reads the records in the order of their ids and commits its position behind what it has surely written. So a
crash makes it write again what was not committed, and never leaves anything out; a sink that must not write twice
either finds out by its mark what it had written.
"""

import sqlite3
from dataclasses import dataclass

from control.store.database import Database


@dataclass(frozen=True, slots=True)
class SinkPosition:
    """The id of the last record that a sink has surely written, 0 before the first, and the sink's own mark."""

    record_id: int = 0
    mark: str = ""


class SinkPositions:
    """Loads and saves positions by the sinks' names."""

    def __init__(self, database: Database) -> None:
        self._database = database

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
