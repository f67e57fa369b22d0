"""Which events are still to be delivered to which endpoint, and when each is to be tried next.

A row is made in the transaction of its event and deleted once the endpoint has it, so that no crash loses a delivery.
One that was given up stays for `DEAD_KEPT`, with its event, as what the endpoint missed.
"""

import sqlite3
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from control.store.database import Database, Statement
from control.store.events import StoredEvent

DEAD_KEPT = timedelta(days=7)

_DEAD_BATCH = 1000

# Nothing for an event that was not stored, because its id was there already.
_ADD = (
    "INSERT INTO webhook_deliveries (endpoint, sequence, queued_at, next_attempt_at)"
    " SELECT ?, sequence, ?, ? FROM events WHERE sequence = ? ON CONFLICT DO NOTHING"
)
_DELIVERED = "DELETE FROM webhook_deliveries WHERE endpoint = ? AND sequence = ?"
_POSTPONE = (
    "UPDATE webhook_deliveries SET attempts = attempts + 1, next_attempt_at = ?, last_failure = ?"
    " WHERE endpoint = ? AND sequence = ?"
)
_GIVE_UP = (
    "UPDATE webhook_deliveries SET attempts = attempts + ?, dead_at = ?, last_failure = ?"
    " WHERE endpoint = ? AND sequence = ?"
)
_BRING_FORWARD = (
    "UPDATE webhook_deliveries SET next_attempt_at = ? WHERE endpoint = ? AND dead_at IS NULL AND next_attempt_at > ?"
)
_FORGET_DEAD = (
    "DELETE FROM webhook_deliveries WHERE endpoint = ? AND sequence IN"
    " (SELECT sequence FROM webhook_deliveries WHERE endpoint = ? AND dead_at < ? LIMIT ?)"
)
# CROSS JOIN keeps SQLite to the order of the tables: the index gives the rows that are due in order, one look-up each.
_DUE = (
    "SELECT events.sequence, events.id, events.type, events.at, events.call_id, events.data, queued_at, attempts"
    " FROM webhook_deliveries AS delivery CROSS JOIN events ON events.sequence = delivery.sequence"
    " WHERE endpoint = ? AND dead_at IS NULL AND next_attempt_at <= ?"
    " ORDER BY next_attempt_at, delivery.sequence LIMIT ?"
)
_NEXT = (
    "SELECT min(next_attempt_at) FROM webhook_deliveries WHERE endpoint = ? AND dead_at IS NULL AND next_attempt_at > ?"
)
_BACKLOG = (
    "SELECT count(*), min(sequence) FROM webhook_deliveries INDEXED BY webhook_deliveries_due"
    " WHERE endpoint = ? AND dead_at IS NULL"
)
_QUEUED_AT = "SELECT queued_at FROM webhook_deliveries WHERE endpoint = ? AND sequence = ?"
_OLDEST_DEAD = "SELECT min(dead_at) FROM webhook_deliveries WHERE endpoint = ? AND dead_at IS NOT NULL"
# From name to name by the primary key: one look-up for each endpoint instead of a walk through all rows.
_ENDPOINTS = (
    "WITH RECURSIVE names (name) AS (SELECT min(endpoint) FROM webhook_deliveries UNION ALL"
    " SELECT (SELECT min(endpoint) FROM webhook_deliveries WHERE endpoint > name) FROM names WHERE name IS NOT NULL)"
    " SELECT name FROM names WHERE name IS NOT NULL"
)
_COUNT = "SELECT count(*) FROM webhook_deliveries WHERE endpoint = ?"
_FORGET_ENDPOINT = "DELETE FROM webhook_deliveries WHERE endpoint = ?"


@dataclass(frozen=True, slots=True)
class Delivery:
    """An event that an endpoint is to get. `attempts` have failed so far; times are UTC."""

    endpoint: str
    event: StoredEvent
    queued_at: datetime
    attempts: int


@dataclass(frozen=True, slots=True)
class Due:
    """What can be tried now, oldest first; whether there is `more` of it; and when something else will be due."""

    deliveries: tuple[Delivery, ...]
    more: bool
    next_at: datetime | None


@dataclass(frozen=True, slots=True)
class Backlog:
    """How many events wait for an endpoint, and since when the first of them does."""

    pending: int = 0
    oldest_at: datetime | None = None
    oldest_dead_at: datetime | None = None


class Deliveries:
    """The outbox of some endpoints: their names, and the event types that each wants (None: all)."""

    def __init__(self, database: Database, endpoints: Sequence[tuple[str, Collection[str] | None]]) -> None:
        self._database = database
        self._endpoints = tuple(endpoints)

    def statements_for(self, event: StoredEvent) -> Sequence[Statement]:
        """What belongs into the event's own transaction, behind it: a row for each endpoint that wants it."""
        at = _text(event.at)
        return [
            (_ADD, (name, at, at, event.sequence))
            for name, types in self._endpoints
            if types is None or event.type in types
        ]

    async def due(self, endpoint: str, now: datetime, limit: int, besides: Collection[int] = ()) -> Due:
        """At most `limit` deliveries whose time has come, without the sequences `besides`.

        Raises: StoreError.
        """
        # Before the read: what is taken off `besides` meanwhile may still be in the file as the reader sees it.
        besides = frozenset(besides)
        most = limit + len(besides)

        def query(connection: sqlite3.Connection) -> Due:
            rows = connection.execute(_DUE, (endpoint, _text(now), most)).fetchall()
            [next_at] = connection.execute(_NEXT, (endpoint, _text(now))).fetchone()
            deliveries = tuple(_delivery(endpoint, row) for row in rows if row[0] not in besides)
            return Due(deliveries[:limit], len(rows) == most, _optional_time(next_at))

        return await self._database.read(query)

    async def delivered(self, delivery: Delivery) -> None:
        """The endpoint has it. Returns once that is durable.

        Raises: StoreError.
        """
        await self._database.write([(_DELIVERED, (delivery.endpoint, delivery.event.sequence))])

    async def postpone(self, delivery: Delivery, next_attempt_at: datetime, failure: str) -> None:
        """An attempt failed; there will be another. Returns once that is durable.

        Raises: StoreError.
        """
        key = (delivery.endpoint, delivery.event.sequence)
        await self._database.write([(_POSTPONE, (_text(next_attempt_at), failure, *key))])

    async def give_up(self, delivery: Delivery, at: datetime, failure: str, *, attempted: bool) -> None:
        """There will be no other attempt; `attempted` says whether there was one now. Returns once that is durable.

        Raises: StoreError.
        """
        key = (delivery.endpoint, delivery.event.sequence)
        await self._database.write([(_GIVE_UP, (int(attempted), _text(at), failure, *key))])

    async def backlog(self, endpoint: str) -> Backlog:
        """What waits for an endpoint. Its cost grows with the answer.

        Raises: StoreError.
        """

        def query(connection: sqlite3.Connection) -> Backlog:
            pending, first = connection.execute(_BACKLOG, (endpoint,)).fetchone()
            oldest = connection.execute(_QUEUED_AT, (endpoint, first)).fetchone()
            [dead] = connection.execute(_OLDEST_DEAD, (endpoint,)).fetchone()
            return Backlog(pending, _optional_time(oldest and oldest[0]), _optional_time(dead))

        return await self._database.read(query)

    def bring_forward(self, now: datetime, horizon: timedelta) -> None:
        """Make due what waits for a time beyond `horizon`, as nothing does unless the clock was set back."""
        for endpoint, _ in self._endpoints:
            self._database.submit([(_BRING_FORWARD, (_text(now), endpoint, _text(now + horizon)))])

    def forget_dead(self, endpoint: str, now: datetime) -> None:
        """Delete some of what was given up longer than `DEAD_KEPT` ago."""
        self._database.submit([(_FORGET_DEAD, (endpoint, endpoint, _text(now - DEAD_KEPT), _DEAD_BATCH))])

    async def forget_strangers(self) -> dict[str, int]:
        """Delete the rows of endpoints that are not among ours; tell how many by name.

        Raises: StoreError.
        """
        known = {name for name, _ in self._endpoints}

        def query(connection: sqlite3.Connection) -> dict[str, int]:
            names = [name for (name,) in connection.execute(_ENDPOINTS) if name not in known]
            return {name: connection.execute(_COUNT, (name,)).fetchone()[0] for name in names}

        strangers = await self._database.read(query)
        self._database.submit([(_FORGET_ENDPOINT, (name,)) for name in strangers])
        return strangers


def _delivery(endpoint: str, row: tuple[Any, ...]) -> Delivery:
    sequence, event_id, event_type, at, call_id, data, queued_at, attempts = row
    event = StoredEvent(sequence, event_id, event_type, _time(at), call_id, data)
    return Delivery(endpoint, event, _time(queued_at), attempts)


def _text(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="microseconds")


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _optional_time(text: str | None) -> datetime | None:
    return None if text is None else _time(text)
