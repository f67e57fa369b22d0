"""Whether the store keeps up, so that no call is taken whose record would wait for ever longer.

A slow disk or somebody who holds the file delays writes; nothing is lost and running calls go on, but new ones are
refused until it has recovered.
"""

from collections.abc import Callable
from typing import Final, Protocol

from control.store.database import Commit

# A commit that was slow is held against the disk for so many times the limit: between two slow ones nothing waits, and
# while calls are refused there may be no other that would show whether the disk has recovered.
_REMEMBERED: Final = 5


class Watched(Protocol):
    """What is asked of a database; times are of `time.monotonic`."""

    @property
    def pending(self) -> int:
        """Writes that are not on the disk yet."""

    @property
    def pending_since(self) -> float | None:
        """Since when the oldest of them waits."""

    @property
    def last_commit(self) -> Commit | None:
        """The newest commit."""


class StoreHealth:
    """Judges by the age of the oldest write that waits, and by the last commit."""

    def __init__(self, database: Watched, *, slow_after_s: float, clock: Callable[[], float]) -> None:
        self._database = database
        self._slow_after_s = slow_after_s
        self._clock = clock

    @property
    def trouble(self) -> str | None:
        """Why no new call should be taken; None when the store keeps up."""
        now = self._clock()
        since = self._database.pending_since
        if since is not None and now - since > self._slow_after_s:
            return f"{self._database.pending} writes wait for the disk, the oldest for {now - since:.1f} s"
        last = self._database.last_commit
        if (
            last is not None
            and last.seconds > self._slow_after_s
            and now - last.ended_at < _REMEMBERED * self._slow_after_s
        ):
            return f"the last commit took {last.seconds:.1f} s"
        return None
