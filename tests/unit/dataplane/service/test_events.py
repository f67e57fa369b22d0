"""The bounded log of events and its watchers."""

import asyncio
from datetime import UTC, datetime

from dataplane.service.events import EventLog
from dataplane.session.relay import Resumed
from dataplane.session.spec import Leg

AT = datetime(2030, 1, 1, tzinfo=UTC)


def log_of(count: int, capacity: int = 3) -> EventLog:
    log = EventLog(capacity)
    for i in range(count):
        log.append(Resumed(f"s{i + 1}", 0.0, Leg.CALLER, 0), AT)
    return log


def test_an_empty_log_begins_with_one() -> None:
    log = log_of(0)
    assert (log.first_kept, log.last, log.read(0, 10)) == (1, 0, [])


def test_the_last_events_are_kept_with_their_numbers() -> None:
    log = log_of(5)
    assert (log.first_kept, log.last) == (3, 5)
    assert [record.sequence for record in log.read(0, 10)] == [3, 4, 5]


def test_reading_goes_on_behind_what_was_read() -> None:
    log = log_of(3)
    assert [record.sequence for record in log.read(1, 1)] == [2]
    assert [record.sequence for record in log.read(2, 10)] == [3]
    assert log.read(3, 10) == []


async def test_every_watcher_is_woken_by_an_event() -> None:
    log = log_of(1)
    await log.wait(0)
    watchers = [asyncio.create_task(log.wait(1)) for _ in range(3)]
    await asyncio.sleep(0)
    assert not any(watcher.done() for watcher in watchers)
    log.append(Resumed("s", 0.0, Leg.CALLER, 0), AT)
    await asyncio.wait_for(asyncio.gather(*watchers), 1.0)
