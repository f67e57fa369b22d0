"""Registrations that outlive the process: the bindings of each address-of-record, replaced as a whole.

They follow what the registrar has answered by a moment: a registration that a crash costs is made again by the phone's
next refresh, while no REGISTER waits for the disk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import structlog

from control.store.database import Database
from control.store.journal import read_plain, written_plain

VERSION: Final = 1

_SAVE: Final = (
    "INSERT INTO registrations (aor, version, saved_at, saved_now, boot_id, bindings) VALUES (?, ?, ?, ?, ?, ?)"
    " ON CONFLICT (aor) DO UPDATE SET version = excluded.version, saved_at = excluded.saved_at,"
    " saved_now = excluded.saved_now, boot_id = excluded.boot_id, bindings = excluded.bindings"
)
_REMOVE: Final = "DELETE FROM registrations WHERE aor = ?"
_ALL: Final = "SELECT aor, version, saved_at, saved_now, boot_id, bindings FROM registrations ORDER BY aor"

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SavedBindings:
    """What was saved of an address-of-record; `bindings` is plain data, its moments are of `boot_id`."""

    aor: str
    saved_at: datetime
    saved_now: float
    boot_id: str
    bindings: Any


class RegistrationStore:
    """Saves bindings. `boot_id` names the boot whose monotonic clock is used."""

    def __init__(self, database: Database, *, boot_id: str, clock: Callable[[], float]) -> None:
        self._database = database
        self._boot_id = boot_id
        self._clock = clock

    def save(self, aor: str, bindings: Any) -> None:
        """Queue the bindings of an address-of-record; None when it has none any more."""
        if bindings is None:
            self._database.submit([(_REMOVE, (aor,))])
            return
        saved_at = datetime.now(UTC).isoformat(timespec="microseconds")
        values = (aor, VERSION, saved_at, self._clock(), self._boot_id, written_plain(bindings))
        self._database.submit([(_SAVE, values)])

    async def load(self) -> list[SavedBindings]:
        """All that can be read; what cannot is logged and left to the phones, which refresh it.

        Raises:
            StoreError: the store cannot be read.
        """
        found = []
        rows = await self._database.read(lambda connection: connection.execute(_ALL).fetchall())
        for aor, version, saved_at, saved_now, boot_id, data in rows:
            try:
                if version > VERSION:
                    raise ValueError(f"it is of version {version}, this program knows {VERSION}")
                saved = SavedBindings(aor, datetime.fromisoformat(saved_at), saved_now, boot_id, read_plain(data))
            except ValueError as error:
                _log.warning("registration.unreadable", user=aor, reason=str(error))
            else:
                found.append(saved)
        return found
