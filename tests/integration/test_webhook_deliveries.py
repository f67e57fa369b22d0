"""control.store.deliveries on a real file."""

import sqlite3
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from control.metrics import ControlMetrics
from control.store import deliveries as deliveries_module
from control.store.database import Database, StoreError
from control.store.deliveries import DEAD_KEPT, Backlog, Deliveries, Due
from control.store.events import StoredEvent

pytestmark = pytest.mark.integration

AT = datetime(2026, 3, 1, 9, 30, tzinfo=UTC)
SECOND = timedelta(seconds=1)
LATER = AT + timedelta(hours=1)

ENDPOINTS = (("all", None), ("ends", ("call.ended",)))


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    opened = await Database.open(tmp_path / "store.sqlite", metrics=ControlMetrics())
    yield opened
    await opened.close()


@pytest.fixture
def deliveries(database: Database) -> Deliveries:
    return Deliveries(database, ENDPOINTS)


async def happen(
    database: Database, deliveries: Deliveries, sequence: int, event_type: str = "call.ended", at: datetime = AT
) -> StoredEvent:
    event = StoredEvent(sequence, f"evt_{sequence}", event_type, at, "call-1", b'{"n":1}')
    insert = "INSERT INTO events (sequence, id, type, at, call_id, data) VALUES (?, ?, ?, ?, ?, ?)"
    values = (sequence, event.id, event_type, at.isoformat(timespec="microseconds"), "call-1", event.data)
    await database.write([(insert, values), *deliveries.statements_for(event)])
    return event


async def settled(database: Database) -> None:
    """Writes are carried out in order: when this one is durable, so are those before it."""
    await database.write([("UPDATE webhook_deliveries SET attempts = attempts WHERE false", ())])


def sequences(due: Due) -> list[int]:
    return [delivery.event.sequence for delivery in due.deliveries]


async def test_an_event_is_due_at_once_for_each_endpoint_that_wants_it(
    database: Database, deliveries: Deliveries
) -> None:
    started = await happen(database, deliveries, 1, "call.started")
    ended = await happen(database, deliveries, 2, "call.ended")
    for_all = await deliveries.due("all", LATER, 10)
    assert [delivery.event for delivery in for_all.deliveries] == [started, ended]
    [delivery] = (await deliveries.due("ends", LATER, 10)).deliveries
    assert (delivery.event, delivery.endpoint, delivery.attempts, delivery.queued_at) == (ended, "ends", 0, AT)


async def test_what_has_waited_longest_comes_first_and_the_rest_is_told(
    database: Database, deliveries: Deliveries
) -> None:
    for sequence in range(1, 6):
        await happen(database, deliveries, sequence)
    [first, *_] = (await deliveries.due("all", LATER, 10)).deliveries
    await deliveries.postpone(first, AT + SECOND, "answered 500")
    due = await deliveries.due("all", LATER, 3)
    assert (sequences(due), due.more, due.next_at) == ([2, 3, 4], True, None)
    due = await deliveries.due("all", LATER, 10)
    assert (sequences(due), due.more, due.next_at) == ([2, 3, 4, 5, 1], False, None)


async def test_what_is_under_way_is_left_out_and_takes_nobodys_place(
    database: Database, deliveries: Deliveries
) -> None:
    for sequence in range(1, 6):
        await happen(database, deliveries, sequence)
    assert sequences(await deliveries.due("all", LATER, 2, [1, 2, 3])) == [4, 5]
    assert sequences(await deliveries.due("all", LATER, 10, [1, 2, 3, 4, 5])) == []


async def test_what_was_put_off_is_due_at_its_time_with_its_attempts(
    database: Database, deliveries: Deliveries
) -> None:
    await happen(database, deliveries, 1)
    for attempts in range(3):
        now = AT + attempts * SECOND
        [delivery] = (await deliveries.due("all", now, 10)).deliveries
        assert delivery.attempts == attempts
        await deliveries.postpone(delivery, now + SECOND, "answered 500")
        assert await deliveries.due("all", now + SECOND / 2, 10) == Due((), more=False, next_at=now + SECOND)


async def test_what_was_delivered_to_one_endpoint_still_waits_for_the_other(
    database: Database, deliveries: Deliveries
) -> None:
    await happen(database, deliveries, 1)
    [delivery] = (await deliveries.due("all", LATER, 10)).deliveries
    await deliveries.delivered(delivery)
    assert sequences(await deliveries.due("all", LATER, 10)) == []
    assert sequences(await deliveries.due("ends", LATER, 10)) == [1]


async def test_what_was_given_up_is_never_due_and_no_backlog(database: Database, deliveries: Deliveries) -> None:
    await happen(database, deliveries, 1)
    await happen(database, deliveries, 2, at=AT + SECOND)
    assert await deliveries.backlog("all") == Backlog(2, AT, None)
    [first, _] = (await deliveries.due("all", LATER, 10)).deliveries
    await deliveries.give_up(first, LATER, "answered 500", attempted=True)
    assert sequences(await deliveries.due("all", LATER + LATER.resolution, 10)) == [2]
    assert await deliveries.backlog("all") == Backlog(1, AT + SECOND, LATER)
    query = "SELECT attempts, last_failure FROM webhook_deliveries WHERE sequence = 1 AND endpoint = 'all'"
    assert await database.read(lambda connection: connection.execute(query).fetchone()) == (1, "answered 500")


async def test_a_backlog_of_nothing_is_empty(deliveries: Deliveries) -> None:
    assert await deliveries.backlog("all") == Backlog(0, None, None)


async def test_the_dead_are_forgotten_in_small_portions_when_their_time_has_come(
    database: Database, deliveries: Deliveries, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliveries_module, "_DEAD_BATCH", 2)
    for sequence in range(1, 6):
        await happen(database, deliveries, sequence)
    for delivery in (await deliveries.due("all", LATER, 4)).deliveries:
        await deliveries.give_up(delivery, AT + delivery.event.sequence * SECOND, "answered 500", attempted=True)

    async def forgotten() -> list[int]:
        deliveries.forget_dead("all", AT + DEAD_KEPT + 3.5 * SECOND)
        await settled(database)
        rows = "SELECT sequence FROM webhook_deliveries WHERE endpoint = 'all'"
        left = {row[0] for row in await database.read(lambda connection: connection.execute(rows).fetchall())}
        return sorted(set(range(1, 6)) - left)

    assert await forgotten() == [1, 2]
    assert await forgotten() == [1, 2, 3]
    assert await forgotten() == [1, 2, 3]


async def test_an_event_that_somebody_waits_for_cannot_be_deleted(database: Database, deliveries: Deliveries) -> None:
    await happen(database, deliveries, 1, "call.started")
    with pytest.raises(StoreError, match="FOREIGN KEY"):
        await database.write([("DELETE FROM events", ())])
    [delivery] = (await deliveries.due("all", LATER, 10)).deliveries
    await deliveries.delivered(delivery)
    await database.write([("DELETE FROM events", ())])


async def test_an_event_that_was_not_stored_is_delivered_to_nobody(database: Database, deliveries: Deliveries) -> None:
    await happen(database, deliveries, 1)
    again = StoredEvent(2, "evt_1", "call.ended", AT, "call-1", b"{}")
    await database.write(deliveries.statements_for(again))
    await database.write(deliveries.statements_for(StoredEvent(1, "evt_1", "call.ended", AT, "call-1", b"{}")))
    assert sequences(await deliveries.due("all", LATER, 10)) == [1]


async def test_what_waits_beyond_the_horizon_is_brought_forward(database: Database, deliveries: Deliveries) -> None:
    for sequence in (1, 2):
        await happen(database, deliveries, sequence)
    [first, second] = (await deliveries.due("all", LATER, 10)).deliveries
    await deliveries.postpone(first, AT + 10 * SECOND, "answered 500")
    await deliveries.postpone(second, AT + 11 * SECOND, "answered 500")
    deliveries.bring_forward(AT, 10 * SECOND)
    await settled(database)
    due = await deliveries.due("all", AT, 10)
    assert (sequences(due), due.next_at) == ([2], AT + 10 * SECOND)


async def test_the_rows_of_endpoints_that_are_gone_are_forgotten(database: Database, deliveries: Deliveries) -> None:
    for sequence in (1, 2):
        await happen(database, deliveries, sequence)
    fewer = Deliveries(database, [("ends", None)])
    await happen(database, Deliveries(database, [("zebra", None)]), 3)
    assert await fewer.forget_strangers() == {"all": 2, "zebra": 1}
    await settled(database)
    assert await fewer.forget_strangers() == {}
    assert sequences(await fewer.due("ends", LATER, 10)) == [1, 2]


async def test_reading_what_is_due_costs_what_it_gives_however_much_waits(
    database: Database, deliveries: Deliveries
) -> None:
    def plans(connection: sqlite3.Connection) -> list[str]:
        statements = {
            deliveries_module._DUE: ("all", "", 1),
            deliveries_module._NEXT: ("all", ""),
            deliveries_module._BACKLOG: ("all",),
            deliveries_module._OLDEST_DEAD: ("all",),
        }
        return [
            row[3]
            for statement, values in statements.items()
            for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", values)
        ]

    steps = await database.read(plans)
    assert all(step.startswith("SEARCH") for step in steps)
    by_time, event, next_time, backlog, dead = steps
    assert all("INDEX webhook_deliveries_due" in step for step in (by_time, next_time, backlog)), steps
    assert "PRIMARY KEY" in event
    assert "COVERING INDEX webhook_deliveries_dead" in dead
