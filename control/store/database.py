"""The node's SQLite file: how it is opened, and which version its tables have.

WAL with `synchronous=FULL`: a commit is on the disk when it returns. Migrations are numbered SQL files beside this
module; each is one transaction together with its row in `schema_version`. A file written by a newer version is refused
rather than guessed at.
"""

import re
import sqlite3
from importlib.resources import files
from pathlib import Path

import aiosqlite

BUSY_TIMEOUT_MS = 5_000


class StoreError(Exception):
    """The store cannot be used; the message names the file and says why."""


async def open_database(path: Path) -> aiosqlite.Connection:
    """Open or create the file, and bring its tables up to this version; statements are their own transactions.

    Raises: StoreError.
    """
    connection: aiosqlite.Connection | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = await aiosqlite.connect(path, isolation_level=None)
        await connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        await connection.execute("PRAGMA journal_mode = WAL")
        await connection.execute("PRAGMA synchronous = FULL")
        await connection.execute("PRAGMA foreign_keys = ON")
        await _migrate(connection, path)
    except (sqlite3.Error, OSError) as error:
        if connection is not None:
            await connection.close()
        raise StoreError(f"cannot open {path}: {error}") from error
    except StoreError:
        if connection is not None:
            await connection.close()
        raise
    return connection


def migrations() -> list[tuple[int, str]]:
    """The SQL of each migration by its number, in order."""
    entries = files("control.store").joinpath("migrations").iterdir()
    named = [(re.fullmatch(r"(\d{4})_\w+\.sql", entry.name), entry) for entry in entries]
    return sorted((int(match[1]), entry.read_text(encoding="utf-8")) for match, entry in named if match)


async def _migrate(connection: aiosqlite.Connection, path: Path) -> None:
    await connection.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER PRIMARY KEY) STRICT")
    rows = list(await connection.execute_fetchall("SELECT coalesce(max(version), 0) FROM schema_version"))
    current = int(rows[0][0])
    known = migrations()
    if current > known[-1][0]:
        raise StoreError(f"cannot open {path}: its tables have version {current}, this program knows {known[-1][0]}")
    for version, script in known:
        if version > current:
            entry = f"INSERT INTO schema_version VALUES ({version});"  # noqa: S608 - a file name's number
            await connection.executescript(f"BEGIN IMMEDIATE; {script} {entry} COMMIT;")
