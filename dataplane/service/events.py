"""What happened, in order: a bounded log that any number of watchers read at their own pace.

A watcher is a place in the log, not a queue of its own, so a slow one costs nothing; it misses what the log has
forgotten by the time it reads on, and is told so.
"""

import asyncio
from collections import deque
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from itertools import islice

from dataplane.session.relay import StreamEvent, StreamSnapshot


class CloseReason(StrEnum):
    """Why a session ended."""

    DELETED = "deleted"
    OWNER_LOST = "owner_lost"
    WORKER_LOST = "worker_lost"
    SHUTDOWN = "shutdown"


@dataclass(frozen=True, slots=True)
class Capacity:
    """Port blocks by state, and whether new sessions are taken; the three states add up to the total."""

    blocks_total: int
    blocks_in_use: int
    blocks_resting: int
    blocks_free: int
    block_size: int
    first_port: int
    last_port: int
    not_accepting_reason: str

    @property
    def accepting(self) -> bool:
        """New sessions are taken."""
        return not self.not_accepting_reason


@dataclass(frozen=True, slots=True)
class SessionClosed:
    """A session ended; said once for each."""

    session_id: str
    reason: CloseReason
    streams: tuple[StreamSnapshot, ...]


@dataclass(frozen=True, slots=True)
class CapacityChanged:
    """New sessions are taken now, or no longer."""

    capacity: Capacity


@dataclass(frozen=True, slots=True)
class RelayInterrupted:
    """The engine relayed nothing for `gap_s`, and is back with its sessions."""

    gap_s: float


NodeEvent = StreamEvent | SessionClosed | CapacityChanged | RelayInterrupted


@dataclass(frozen=True, slots=True)
class Record:
    """An event with its place in the order, from 1 on, and its time (UTC)."""

    sequence: int
    at: datetime
    event: NodeEvent


class EventLog:
    """Keeps the last `capacity` events."""

    def __init__(self, capacity: int) -> None:
        self._records: deque[Record] = deque(maxlen=capacity)
        self._next = 1
        self._news = asyncio.Event()

    @property
    def first_kept(self) -> int:
        """The sequence number of the oldest event kept, or of the next one when there is none."""
        return self._records[0].sequence if self._records else self._next

    @property
    def last(self) -> int:
        """The sequence number of the newest event; 0 before the first."""
        return self._next - 1

    def append(self, event: NodeEvent, at: datetime) -> None:
        """Add an event and wake the watchers."""
        self._records.append(Record(self._next, at, event))
        self._next += 1
        self._news.set()
        self._news = asyncio.Event()

    def read(self, after: int, limit: int) -> list[Record]:
        """Return up to `limit` events that follow sequence number `after`, as far as they are kept."""
        start = max(0, after + 1 - self.first_kept)
        return list(islice(self._records, start, start + limit))

    async def wait(self, after: int) -> None:
        """Wait until there is an event that follows sequence number `after`."""
        while self.last <= after:
            await self._news.wait()
