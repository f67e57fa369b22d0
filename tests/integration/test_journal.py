"""control.store.journal on a real SQLite file, and a control plane that starts on one that is damaged."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from control import app
from control.events.codec import encode, event_id, event_type
from control.metrics import ControlMetrics
from control.pbx.records import CallEventKind, CallId, CallRecord
from control.settings.settings import Settings
from control.store.database import Database
from control.store.events import EventStore
from control.store.journal import VERSION, Journal, JournalEntry
from control.store.records import RecordStore
from sippbx.runtime.lifecycle import Stop
from tests.harness.media_server import ScriptedMediaServer
from tests.harness.records import call_event, call_record

pytestmark = pytest.mark.integration

HOST, SIP_PORT, METRICS_PORT = "127.0.0.1", 22_110, 22_111
SNAPSHOT = {"call": {"state": "established", "note": "caf\u00e9"}}


class Node:
    """The journal with the stores whose transactions it shares."""

    def __init__(self, database: Database, events: EventStore, journal: Journal, metrics: ControlMetrics) -> None:
        self.database = database
        self.events = events
        self.journal = journal
        self.metrics = metrics

    @classmethod
    @asynccontextmanager
    async def opened(cls, path: Path) -> AsyncIterator["Node"]:
        metrics = ControlMetrics()
        database = await Database.open(path, metrics=metrics)
        journal = Journal(database, boot_id="boot-1", clock=lambda: 12.5)
        events = await EventStore.open(
            database,
            RecordStore(database),
            metrics=metrics,
            keep=timedelta(days=36_500),
            keep_events=1000,
            also=journal.statements_for,
            committed=lambda event, record: None,
        )
        yield cls(database, events, journal, metrics)
        await events.close()
        await database.close()

    def publish(self, kind: CallEventKind, record: CallRecord) -> None:
        event = call_event(kind, record.call_id)
        name = event_type(event)
        assert name is not None
        self.events.append(
            id=event_id(event, lambda: "x"),
            type=name,
            at=event.at,
            call_id=event.call_id,
            data=encode(event),
            record=record if kind is CallEventKind.ENDED else None,
        )

    async def save(self, record: CallRecord | None, snapshot: Any, call_id: str = "call-1") -> None:
        done = asyncio.get_running_loop().create_future()
        self.journal.save(
            CallId(call_id),
            record,
            snapshot,
            committed=lambda: done.set_result(None),
            given_up=lambda reason: done.set_exception(AssertionError(reason)),
        )
        await asyncio.wait_for(done, 10)

    async def settled(self) -> None:
        """Until everything that was queued is on the disk."""
        await self.database.write([("SELECT 1", ())])


def rows(path: Path, sql: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as store:
        return store.execute(sql).fetchall()


CALLS = "SELECT call_id FROM calls ORDER BY call_id"
RECORDS = "SELECT call_id FROM call_records"
ASIDE = "SELECT call_id, reason FROM calls_set_aside"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.sqlite"


async def the_one(journal: Journal) -> JournalEntry:
    (entry,) = await journal.load()
    return entry


async def test_a_call_that_was_saved_is_there_after_the_process(path: Path) -> None:
    async with Node.opened(path) as node:
        await node.save(call_record(), SNAPSHOT)
    async with Node.opened(path) as node:
        entry = await the_one(node.journal)
    assert (entry.call_id, entry.snapshot, entry.trouble) == ("call-1", SNAPSHOT, "")
    assert entry.record == call_record()
    assert (entry.saved_now, entry.boot_id) == (12.5, "boot-1")
    assert abs(entry.saved_at - datetime.now(UTC)) < timedelta(minutes=1)


async def test_a_call_has_one_row_with_its_last_state(path: Path) -> None:
    async with Node.opened(path) as node:
        await node.save(call_record(), {"number": 1})
        await node.save(call_record("call-2"), {"number": 2}, "call-2")
        await node.save(None, {"number": 3})
        entries = await node.journal.load()
    assert [(entry.call_id, entry.snapshot, entry.record is None) for entry in entries] == [
        ("call-1", {"number": 3}, True),
        ("call-2", {"number": 2}, False),
    ]


async def test_octets_that_are_no_unicode_come_back_as_they_were(path: Path) -> None:
    async with Node.opened(path) as node:
        await node.save(call_record(), {"header": "caf\udce9"})
        assert (await the_one(node.journal)).snapshot == {"header": "caf\udce9"}


async def test_a_call_begins_with_the_event_that_tells_of_it(path: Path) -> None:
    async with Node.opened(path) as node:
        node.journal.begin(call_record(), SNAPSHOT)
        await node.settled()
        assert rows(path, CALLS) == []
        node.publish(CallEventKind.STARTED, call_record())
        await node.settled()
        assert rows(path, CALLS) == [("call-1",)]
        node.publish(CallEventKind.RINGING, call_record())
        await node.settled()
        assert (await the_one(node.journal)).snapshot == SNAPSHOT


async def test_a_call_ends_with_the_event_that_carries_its_record(path: Path) -> None:
    async with Node.opened(path) as node:
        await node.save(call_record(), SNAPSHOT)
        node.journal.end(call_record(), None)
        await node.settled()
        assert (rows(path, CALLS), rows(path, RECORDS)) == ([("call-1",)], [])
        node.publish(CallEventKind.ENDED, call_record())
        await node.settled()
        assert (rows(path, CALLS), rows(path, RECORDS)) == ([], [("call-1",)])


async def test_what_is_left_to_be_done_of_an_ended_call_is_kept_without_its_record(path: Path) -> None:
    async with Node.opened(path) as node:
        await node.save(call_record(), SNAPSHOT)
        node.journal.end(call_record(), {"bye": "unanswered"})
        node.publish(CallEventKind.ENDED, call_record())
        await node.settled()
        entry = await the_one(node.journal)
        assert (entry.snapshot, entry.record, entry.trouble) == ({"bye": "unanswered"}, None, "")
        node.journal.forget(entry.call_id)
        await node.settled()
        assert (rows(path, CALLS), rows(path, RECORDS)) == ([], [("call-1",)])


async def die_while_ending(path: Path, statement: int) -> None:
    """Kill this process within the transaction that ends a call, behind its statement of that number."""
    async with Node.opened(path) as node:
        await node.save(call_record(), SNAPSHOT)
        writer, left = node.database._writer, statement

        class Fatal:
            in_transaction = True

            def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
                nonlocal left
                done = writer.execute(sql, *parameters)
                if sql.startswith(("INSERT", "DELETE")):
                    left -= 1
                    if not left:
                        os.kill(os.getpid(), signal.SIGKILL)
                return done

        vars(node.database)["_writer"] = Fatal()
        node.journal.end(call_record(), None)
        node.publish(CallEventKind.ENDED, call_record())
        await node.settled()


@pytest.mark.parametrize("statement", [1, 2, 3], ids=["event", "record", "row"])
def test_a_kill_behind_any_statement_of_a_calls_end_leaves_the_call_and_nothing_of_its_end(
    path: Path, statement: int
) -> None:
    program = (
        "import asyncio, pathlib, sys; from tests.integration.test_journal import die_while_ending; "
        "asyncio.run(die_while_ending(pathlib.Path(sys.argv[1]), int(sys.argv[2])))"
    )
    command = [sys.executable, "-c", program, str(path), str(statement)]
    assert subprocess.run(command, timeout=60, check=False).returncode == -signal.SIGKILL
    assert (rows(path, CALLS), rows(path, RECORDS)) == ([("call-1",)], [])
    assert rows(path, "SELECT type FROM events") == []


# What cannot be read


async def test_a_snapshot_that_is_no_json_says_so_and_keeps_its_record(path: Path) -> None:
    async with Node.opened(path) as node:
        await node.save(call_record(), SNAPSHOT)
        await node.database.write([("UPDATE calls SET snapshot = ?", (b"{\xff",))])
        entry = await the_one(node.journal)
    assert "JSON" in entry.trouble
    assert (entry.snapshot, entry.record) == (None, call_record())


async def test_a_snapshot_of_a_newer_version_is_not_guessed_at(path: Path) -> None:
    async with Node.opened(path) as node:
        await node.save(call_record(), SNAPSHOT)
        await node.database.write([("UPDATE calls SET version = ?", (VERSION + 1,))])
        entry = await the_one(node.journal)
    assert str(VERSION + 1) in entry.trouble
    assert (entry.snapshot, entry.record) == (None, call_record())


@pytest.mark.parametrize("record", ["{", "[]", "[1, 2]", "null"])
async def test_a_record_that_cannot_be_read_costs_nothing_as_long_as_the_call_can(path: Path, record: str) -> None:
    async with Node.opened(path) as node:
        await node.save(call_record(), SNAPSHOT)
        await node.database.write([("UPDATE calls SET record = ?", (record,))])
        entry = await the_one(node.journal)
        assert (entry.snapshot, entry.record, entry.trouble) == (SNAPSHOT, None, "")
        await node.database.write([("UPDATE calls SET snapshot = ?", (b"",))])
        assert "record" in (await the_one(node.journal)).trouble


async def test_a_time_that_cannot_be_read_is_trouble_of_its_own_call_alone(path: Path) -> None:
    async with Node.opened(path) as node:
        await node.save(call_record(), SNAPSHOT)
        await node.save(call_record("call-2"), SNAPSHOT, "call-2")
        await node.database.write([("UPDATE calls SET saved_at = 'noon' WHERE call_id = ?", ("call-1",))])
        first, second = await node.journal.load()
    assert "noon" in first.trouble
    assert second.trouble == ""


async def test_a_call_that_is_set_aside_goes_with_its_record(path: Path) -> None:
    async with Node.opened(path) as node:
        await node.save(call_record(), SNAPSHOT)
        node.journal.set_aside(await the_one(node.journal), "broken")
        await node.settled()
        assert (rows(path, CALLS), rows(path, ASIDE)) == ([("call-1",)], [])
        node.publish(CallEventKind.ENDED, call_record())
        await node.settled()
        assert (rows(path, CALLS), rows(path, ASIDE), rows(path, RECORDS)) == (
            [],
            [("call-1", "broken")],
            [("call-1",)],
        )


async def test_a_call_that_is_set_aside_with_its_record_written_goes_at_once(path: Path) -> None:
    async with Node.opened(path) as node:
        await node.save(None, SNAPSHOT)
        node.journal.set_aside(await the_one(node.journal), "broken")
        await node.settled()
        assert (rows(path, CALLS), rows(path, ASIDE)) == ([], [("call-1", "broken")])


# Two processes


async def test_a_process_that_wakes_up_late_writes_nothing_more_and_is_told_once(path: Path) -> None:
    async with Node.opened(path) as late:
        fenced: list[None] = []
        late.database.when_fenced(lambda: fenced.append(None))
        await late.save(call_record(), {"of": "the first"})
        async with Node.opened(path) as owner:
            assert owner.database.epoch == late.database.epoch + 1
            await owner.save(call_record(), {"of": "the second"})
            reasons: list[str] = []
            for number in range(3):
                late.journal.save(
                    CallId("call-1"),
                    call_record(),
                    {"late": number},
                    committed=lambda: reasons.append("committed"),
                    given_up=reasons.append,
                )
            late.publish(CallEventKind.ENDED, call_record())
            async with asyncio.timeout(10):
                while not fenced:
                    await asyncio.sleep(0.01)
            late.journal.save(
                CallId("call-1"), None, {}, committed=lambda: reasons.append("committed"), given_up=reasons.append
            )
            assert len(reasons) == 4
            assert "epoch" in reasons[0]
            assert "committed" not in reasons
            assert (await the_one(owner.journal)).snapshot == {"of": "the second"}
            assert rows(path, RECORDS) == []
            assert len(fenced) == 1


# A control plane


def settings(folder: Path) -> Settings:
    return Settings.model_validate(
        {
            "node_name": "test",
            "sip": {"listeners": [{"name": "udp", "bind": HOST, "port": SIP_PORT}]},
            "media": {"target": f"unix://{folder}/media.sock", "addresses": [{"bind": HOST}]},
            "store": {"path": str(folder / "store.sqlite")},
            "cdr": {"jsonl_path": str(folder / "cdr.jsonl")},
            "api": {"http": {"bind": HOST, "port": 22_112}, "grpc": {"bind": HOST, "port": 22_113}},
            "metrics": {"bind": HOST, "port": METRICS_PORT},
        }
    )


@pytest.mark.parametrize(
    ("damage", "value"),
    [
        ("snapshot", b"{"),
        ("snapshot", b"[]"),
        ("snapshot", b'{"call": {}, "transactions": []}'),
        ("version", VERSION + 1),
    ],
)
async def test_a_call_that_cannot_be_taken_up_is_closed_with_the_last_that_is_known_of_it(
    tmp_path: Path, path: Path, damage: str, value: Any
) -> None:
    record = call_record(media_complete=False)
    async with Node.opened(path) as node:
        await node.save(record, SNAPSHOT)
        await node.database.write([(f"UPDATE calls SET {damage} = ?", (value,))])
    server = ScriptedMediaServer(tmp_path / "media.sock")
    await server.start()
    try:
        with capture_logs() as logs:
            async with app.ControlPlane.started(settings(tmp_path), {}, Stop()) as plane:
                labels = {"component": "store", "kind": "call_unreadable"}
                assert plane.metrics.registry.get_sample_value("sip_pbx_errors_total", labels) == 1
                async with asyncio.timeout(10):
                    while not rows(path, RECORDS):
                        await asyncio.sleep(0.02)
                assert plane._b2bua.calls() == []
    finally:
        await server.stop()
    assert rows(path, "SELECT ended_at, reason FROM call_records") == [
        (record.ended_at.isoformat(timespec="microseconds"), record.termination.reason.value)
    ]
    kinds = [kind for (kind,) in rows(path, "SELECT type FROM events ORDER BY sequence")]
    assert kinds[-2:] == ["node.error", "call.ended"]
    assert rows(path, CALLS) == []
    ((call_id, reason),) = rows(path, ASIDE)
    assert call_id == "call-1"
    assert reason
    (line,) = [line for line in logs if line["event"] == "journal.call_set_aside"]
    assert line["log_level"] == "error"
