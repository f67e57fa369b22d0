"""control.events.webhook with real receivers, on a real file."""

import asyncio
import itertools
import re
import socket
import sqlite3
import ssl
import threading
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import trustme
from aiohttp import web
from pydantic import SecretStr
from standardwebhooks import Webhook
from structlog.testing import capture_logs

from control.events import webhook as webhook_module
from control.events.backoff import BackOff
from control.events.webhook import Webhooks
from control.events.webhook_client import MAX_ANSWER_BYTES, WebhookClient
from control.metrics import ControlMetrics
from control.pbx.records import ErrorEvent, Event
from control.settings.sections import WebhookSettings
from control.store.database import Database, StoreError
from control.store.deliveries import Deliveries
from control.store.events import EventStore, StoredEvent
from control.store.records import RecordStore

pytestmark = pytest.mark.integration

HOST = "127.0.0.51"
SECRET = "whsec_" + b64encode(b"s" * 32).decode()
SOON = BackOff(first_s=0.01, most_s=0.01)

ports = itertools.count(27100)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


@dataclass
class Receiver:
    """An endpoint: what it got, and what it answers, first to last and then 204."""

    answers: list[int | Handler] = field(default_factory=list)
    port: int = field(default_factory=lambda: next(ports))
    tls: ssl.SSLContext | None = None
    headers: list[dict[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    most_at_once: int = 0
    at_once: int = 0

    @property
    def ids(self) -> list[str]:
        return [headers["webhook-id"] for headers in self.headers]

    def settings(self, name: str = "crm", host: str = HOST, **changes: Any) -> WebhookSettings:
        url = f"{'https' if self.tls else 'http'}://{host}:{self.port}/hook"
        return WebhookSettings(name=name, url=url, secret=SecretStr(SECRET), **changes)

    async def __aenter__(self) -> "Receiver":
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, HOST, self.port, ssl_context=self.tls).start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            body = await request.read()
            self.headers.append({name.lower(): value for name, value in request.headers.items()})
            self.bodies.append(body)
            self.paths.append(f"{request.method} {request.path}")
            answer = self.answers.pop(0) if self.answers else 204
            return web.Response(status=answer) if isinstance(answer, int) else await answer(request)
        finally:
            self.at_once -= 1


async def hang(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(60)
    return web.Response()


class Node:
    """A store with its webhooks, and what they published."""

    def __init__(self, path: Path, database: Database, webhooks: Webhooks, metrics: ControlMetrics) -> None:
        self.path = path
        self.database = database
        self.webhooks = webhooks
        self.metrics = metrics
        self.published: list[Event] = []

    async def happen(
        self, event_id: str = "evt_1", event_type: str = "call.ended", ago: timedelta = timedelta(0)
    ) -> StoredEvent:
        """Store an event with its deliveries in one transaction, as the event store does."""
        [sequence] = await self.database.read(
            lambda connection: connection.execute("SELECT coalesce(max(sequence), 0) + 1 FROM events").fetchone()
        )
        event = StoredEvent(sequence, event_id, event_type, datetime.now(UTC) - ago, "call-1", b'{"call_id":"call-1"}')
        insert = "INSERT INTO events (sequence, id, type, at, call_id, data) VALUES (?, ?, ?, ?, ?, ?)"
        values = (sequence, event_id, event_type, event.at.isoformat(timespec="microseconds"), "call-1", event.data)
        await self.database.write([(insert, values), *self.webhooks.deliveries.statements_for(event)])
        self.webhooks.wake(event)
        return event

    async def rows(self) -> list[dict[str, Any]]:
        columns = "endpoint, sequence, attempts, next_attempt_at, last_failure, dead_at"
        query = f"SELECT {columns} FROM webhook_deliveries ORDER BY endpoint, sequence"
        found = await self.database.read(lambda connection: connection.execute(query).fetchall())
        return [dict(zip(columns.split(", "), row, strict=True)) for row in found]

    async def until_rows(self, condition: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
        async with asyncio.timeout(20):
            while not condition(rows := await self.rows()):
                await asyncio.sleep(0.005)
        return rows

    def counted(self, result: str, endpoint: str = "crm") -> float | None:
        labels = {"endpoint": endpoint, "result": result}
        return self.metrics.registry.get_sample_value("sip_pbx_webhook_deliveries_total", labels)

    def errors(self, kind: str) -> float | None:
        labels = {"component": "webhook", "kind": kind}
        return self.metrics.registry.get_sample_value("sip_pbx_errors_total", labels)


@asynccontextmanager
async def node_on(
    path: Path, *settings: WebhookSettings, back_off: BackOff = SOON, close_s: float = 5.0, refresh_s: float = 30.0
) -> AsyncIterator[Node]:
    metrics = ControlMetrics()
    published: list[Event] = []
    database = await Database.open(path, metrics=metrics)
    try:
        webhooks = await Webhooks.open(
            settings,
            database=database,
            node_name="node 1",
            metrics=metrics,
            publish=published.append,
            back_off=back_off,
            draw=lambda: 0.0,
            refresh_s=refresh_s,
        )
        node = Node(path, database, webhooks, metrics)
        node.published = published
        try:
            yield node
        finally:
            await webhooks.close(close_s)
    finally:
        await database.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.sqlite"


async def test_an_event_arrives_as_a_signed_cloud_event_and_is_then_forgotten(path: Path) -> None:
    async with Receiver() as receiver, node_on(path, receiver.settings()) as node:
        event = await node.happen("evt_call-1_ended")
        await node.until_rows(lambda rows: not rows)
        [headers], [body] = receiver.headers, receiver.bodies
        assert receiver.paths == ["POST /hook"]
        assert headers["content-type"] == "application/cloudevents+json"
        assert headers["user-agent"] == "sippbx"
        assert headers["webhook-id"] == "evt_call-1_ended"
        document = Webhook(SECRET).verify(body, headers)
        assert document["id"] == "evt_call-1_ended"
        assert document["source"] == "/sippbx/node%201"
        assert document["type"] == "sippbx.call.ended"
        assert int(document["sequence"]) == event.sequence
        assert datetime.fromisoformat(document["time"]) == event.at
        assert document["data"] == {"call_id": "call-1"}
        assert (node.counted("ok"), node.counted("retry"), node.counted("dead")) == (1, 0, 0)


@pytest.mark.parametrize("status", [400, 404, 429, 500, 503])
async def test_an_event_that_was_refused_is_sent_again_with_the_same_id(path: Path, status: int) -> None:
    async with Receiver([status, 200]) as receiver, node_on(path, receiver.settings()) as node:
        await node.happen("evt_1")
        await node.until_rows(lambda rows: not rows)
        assert receiver.ids == ["evt_1", "evt_1"]
        assert receiver.bodies[0] == receiver.bodies[1]
        for headers, body in zip(receiver.headers, receiver.bodies, strict=True):
            Webhook(SECRET).verify(body, headers)
        assert (node.counted("ok"), node.counted("retry")) == (1, 1)


async def test_redirects_are_not_followed(path: Path) -> None:
    async def redirect(request: web.Request) -> web.StreamResponse:
        raise web.HTTPTemporaryRedirect("/elsewhere")

    async with Receiver([redirect]) as receiver, node_on(path, receiver.settings()) as node:
        await node.happen()
        await node.until_rows(lambda rows: not rows)
        assert receiver.paths == ["POST /hook", "POST /hook"]


async def test_an_endpoint_that_hangs_holds_up_no_other_and_is_tried_again(path: Path) -> None:
    async with Receiver([hang] * 4) as slow, Receiver() as quick:
        settings = (slow.settings("slow", concurrency=1), quick.settings("quick", concurrency=1))
        async with node_on(path, *settings, close_s=0) as node:
            for number in range(10):
                await node.happen(f"evt_{number}")
            await until(lambda: len(quick.ids) == 10)
            assert len(slow.ids) == 1


async def test_an_attempt_without_answer_ends_with_the_timeout(path: Path) -> None:
    async with Receiver([hang]) as receiver, node_on(path, receiver.settings(timeout_s=0.1)) as node:
        with capture_logs() as lines:
            await node.happen("evt_1")
            await node.until_rows(lambda rows: not rows)
        assert receiver.ids == ["evt_1", "evt_1"]
        [line] = [line for line in lines if line["event"] == "webhook.attempt_failed"]
        assert (line["failure"], line["attempts"], line["endpoint"]) == ("no answer within 0.1 s", 1, "crm")


async def test_retry_after_puts_the_next_attempt_off(path: Path) -> None:
    async def busy(request: web.Request) -> web.StreamResponse:
        return web.Response(status=503, headers={"Retry-After": "600"})

    async with Receiver([busy]) as receiver, node_on(path, receiver.settings()) as node:
        before = datetime.now(UTC)
        await node.happen()
        [row] = await node.until_rows(lambda rows: rows[0]["attempts"] == 1)
        wait = datetime.fromisoformat(row["next_attempt_at"]) - before
        assert timedelta(seconds=600) <= wait < timedelta(seconds=630)
        assert row["last_failure"] == "answered 503"
        assert receiver.ids == ["evt_1"]


async def test_no_attempt_is_planned_behind_the_time_when_the_event_is_given_up(path: Path) -> None:
    async def busy(request: web.Request) -> web.StreamResponse:
        return web.Response(status=503, headers={"Retry-After": "600"})

    async with Receiver([busy]) as receiver, node_on(path, receiver.settings(give_up_after_s=300)) as node:
        event = await node.happen()
        [row] = await node.until_rows(lambda rows: rows[0]["attempts"] == 1)
        assert datetime.fromisoformat(row["next_attempt_at"]) == event.at + timedelta(seconds=300)


async def test_what_is_appended_to_the_event_store_is_delivered(path: Path) -> None:
    async with Receiver() as receiver, node_on(path, receiver.settings()) as node:
        events = await EventStore.open(
            node.database,
            RecordStore(node.database),
            metrics=node.metrics,
            keep=timedelta(days=1),
            keep_events=1000,
            also=node.webhooks.deliveries.statements_for,
            committed=lambda event, record: node.webhooks.wake(event),
        )
        for event_id in ("evt_a", "evt_b", "evt_a", "evt_c"):
            at = datetime.now(UTC)
            events.append(id=event_id, type="user.registered", at=at, call_id=None, data=b'{"user":"1001"}')
        await until(lambda: len(receiver.ids) == 3)
        await node.until_rows(lambda rows: not rows)
        await events.close()
        assert sorted(receiver.ids) == ["evt_a", "evt_b", "evt_c"]


async def test_what_was_not_delivered_is_delivered_after_a_restart(path: Path) -> None:
    receiver = Receiver()
    async with node_on(path, receiver.settings()) as node:
        await node.happen("evt_1")
        await node.until_rows(lambda rows: rows[0]["attempts"] >= 2)
        assert "ClientConnectorError" in (await node.rows())[0]["last_failure"]
    async with receiver, node_on(path, receiver.settings()) as node:
        await node.until_rows(lambda rows: not rows)
        assert receiver.ids == ["evt_1"]


async def test_a_restart_keeps_to_the_time_of_the_next_attempt(path: Path) -> None:
    later = BackOff(first_s=600, most_s=600)
    async with Receiver([500]) as receiver:
        async with node_on(path, receiver.settings(), back_off=later) as node:
            await node.happen("evt_1")
            [before] = await node.until_rows(lambda rows: rows[0]["attempts"] == 1)
        async with node_on(path, receiver.settings(), back_off=later) as node:
            await node.happen("evt_2")
            await until(lambda: "evt_2" in receiver.ids)
            [after] = await node.until_rows(lambda rows: len(rows) == 1)
        assert after == before
        assert receiver.ids == ["evt_1", "evt_2"]


async def test_a_clock_that_was_set_back_keeps_nothing_waiting_after_a_restart(path: Path) -> None:
    async with Receiver([500]) as receiver:
        async with node_on(path, receiver.settings(), back_off=BackOff(600, 600)) as node:
            await node.happen("evt_1")
            await node.until_rows(lambda rows: rows[0]["attempts"] == 1)
            far = (datetime.now(UTC) + timedelta(days=30)).isoformat(timespec="microseconds")
            await node.database.write([("UPDATE webhook_deliveries SET next_attempt_at = ?", (far,))])
        async with node_on(path, receiver.settings(), refresh_s=0.02) as node:
            await node.until_rows(lambda rows: not rows)
        assert receiver.ids == ["evt_1", "evt_1"]


async def test_an_event_that_cannot_be_delivered_in_time_is_kept_as_dead_and_told_once(path: Path) -> None:
    async with Receiver([500] * 3) as receiver:
        async with node_on(path, receiver.settings(give_up_after_s=60)) as node:
            await node.happen("evt_old", ago=timedelta(seconds=90))
            [row] = await node.until_rows(lambda rows: rows[0]["dead_at"] is not None)
            await until(lambda: bool(node.published))
            assert (row["attempts"], row["last_failure"]) == (1, "answered 500")
            assert (node.counted("dead"), node.counted("retry")) == (1, 0)
            [error] = node.published
            assert isinstance(error, ErrorEvent)
            assert (error.component, error.kind, error.call_id) == ("webhook", "delivery-given-up", "call-1")
            assert "crm did not take evt_old in 1 attempts" in error.detail
            assert "answered 500" in error.detail
        async with node_on(path, receiver.settings()) as node:
            await node.happen("evt_new")
            await until(lambda: receiver.ids.count("evt_new") == 3)
            await node.until_rows(lambda rows: len(rows) == 1)
        assert receiver.ids.count("evt_old") == 1


async def test_an_error_that_cannot_be_delivered_makes_no_other_error(path: Path) -> None:
    async with Receiver([500] * 2) as receiver, node_on(path, receiver.settings(give_up_after_s=60)) as node:
        await node.happen("evt_error", "node.error", ago=timedelta(seconds=90))
        await node.until_rows(lambda rows: rows[0]["dead_at"] is not None)
        await node.happen("evt_call", "call.ended", ago=timedelta(seconds=90))
        await until(lambda: bool(node.published))
        [error] = node.published
        assert isinstance(error, ErrorEvent)
        assert "evt_call" in error.detail


async def test_an_endpoint_gets_the_types_that_it_asked_for(path: Path) -> None:
    async with Receiver() as some, Receiver() as every:
        settings = (some.settings("some", events=("call.answered", "call.ended")), every.settings("every"))
        async with node_on(path, *settings) as node:
            for event_type in ("call.started", "call.answered", "user.registered", "call.ended"):
                await node.happen(f"evt_{event_type}", event_type)
            await node.until_rows(lambda rows: not rows)
        assert sorted(some.ids) == ["evt_call.answered", "evt_call.ended"]
        assert len(every.ids) == 4


async def test_no_more_attempts_are_under_way_than_allowed(path: Path) -> None:
    release = asyncio.Event()

    async def wait(request: web.Request) -> web.StreamResponse:
        await release.wait()
        return web.Response()

    async with Receiver([wait] * 12) as receiver, node_on(path, receiver.settings(concurrency=3)) as node:
        for number in range(12):
            await node.happen(f"evt_{number}")
        await until(lambda: receiver.at_once == 3)
        release.set()
        await node.until_rows(lambda rows: not rows)
        assert receiver.most_at_once == 3
        assert sorted(receiver.ids) == sorted(f"evt_{number}" for number in range(12))


async def test_one_attempt_at_a_time_keeps_the_order_of_events(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook_module, "BATCH", 4)
    names = [f"evt_{number}" for number in range(30)]
    receiver = Receiver()
    async with node_on(path, receiver.settings(concurrency=1), back_off=BackOff(600, 600)) as node:
        for name in names:
            await node.happen(name)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE webhook_deliveries SET next_attempt_at = queued_at")
    async with receiver, node_on(path, receiver.settings(concurrency=1)) as node:
        await node.until_rows(lambda rows: not rows)
    assert receiver.ids == names


async def test_closing_lets_attempts_end_and_keeps_what_did_not(path: Path) -> None:
    release = asyncio.Event()

    async def wait(request: web.Request) -> web.StreamResponse:
        await release.wait()
        return web.Response()

    async with Receiver([wait, hang]) as receiver:
        async with node_on(path, receiver.settings(), close_s=0.3) as node:
            await node.happen("evt_ends")
            await until(lambda: receiver.ids == ["evt_ends"])
            await node.happen("evt_hangs")
            await until(lambda: len(receiver.ids) == 2)
            asyncio.get_running_loop().call_later(0.05, release.set)
        async with node_on(path, receiver.settings()) as node:
            await node.until_rows(lambda rows: not rows)
        assert receiver.ids == ["evt_ends", "evt_hangs", "evt_hangs"]


async def test_what_waits_for_an_endpoint_that_is_configured_no_longer_is_dropped(path: Path) -> None:
    gone, stays = Receiver(), Receiver()
    later = BackOff(600, 600)
    async with node_on(path, gone.settings("gone"), stays.settings("stays"), back_off=later) as node:
        await node.happen()
        await node.until_rows(lambda rows: all(row["attempts"] for row in rows))
    with capture_logs() as lines:
        async with node_on(path, stays.settings("stays"), back_off=later) as node:
            rows = await node.until_rows(lambda rows: len(rows) == 1)
    assert rows[0]["endpoint"] == "stays"
    assert {"event": "webhook.endpoint_removed", "endpoint": "gone", "dropped": 1, "log_level": "warning"} in lines


async def test_an_answer_without_end_is_not_read_to_its_end(path: Path) -> None:
    sent = 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(bytes(16_384))
            sent += 16_384

    async with Receiver([endless]) as receiver, node_on(path, receiver.settings(timeout_s=30)) as node:
        await node.happen()
        await node.until_rows(lambda rows: not rows)
        assert sent >= MAX_ANSWER_BYTES
        assert node.counted("ok") == 1


async def test_a_body_that_breaks_off_takes_no_success_back(path: Path) -> None:
    async def break_off(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b"x")
        assert request.transport is not None
        request.transport.abort()
        return response

    async with Receiver([break_off]) as receiver, node_on(path, receiver.settings()) as node:
        await node.happen()
        await node.until_rows(lambda rows: not rows)
        assert receiver.ids == ["evt_1"]


async def test_a_receiver_that_speaks_no_http_is_a_failure_like_any_other(path: Path) -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 " + b"\xff nonsense" * 100 + b"\r\n\r\n")
        writer.close()

    receiver = Receiver()
    server = await asyncio.start_server(babble, HOST, receiver.port)
    async with server, node_on(path, receiver.settings(), back_off=BackOff(600, 600)) as node:
        await node.happen()
        [row] = await node.until_rows(lambda rows: rows[0]["attempts"] == 1)
        assert row["last_failure"].startswith("ClientResponseError: 400, message=")
        assert len(row["last_failure"]) == 200
        assert "\n" not in row["last_failure"]


async def test_nothing_is_told_to_a_receiver_whose_certificate_nobody_vouches_for(path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert(HOST).configure_cert(context)
    receiver = Receiver(tls=context)
    async with receiver, node_on(path, receiver.settings(), back_off=BackOff(600, 600)) as node:
        await node.happen()
        [row] = await node.until_rows(lambda rows: rows[0]["attempts"] == 1)
        assert "certificate verify failed" in row["last_failure"]
        assert receiver.ids == []


async def test_an_endpoint_that_keeps_failing_gets_a_pause(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook_module, "PAUSES", BackOff(60, 60))
    async with Receiver([500] * 100) as receiver, node_on(path, receiver.settings(concurrency=1)) as node:
        for number in range(30):
            await node.happen(f"evt_{number}")
        await until(lambda: len(receiver.ids) == 10)
        await asyncio.sleep(0.2)
        assert len(receiver.ids) == 10


async def test_events_that_are_too_old_are_given_up_untried_while_the_endpoint_is_down(path: Path) -> None:
    receiver = Receiver([500] * 100)
    async with receiver, node_on(path, receiver.settings(concurrency=1, give_up_after_s=60)) as node:
        for number in range(30):
            await node.happen(f"evt_{number}", ago=timedelta(hours=1))
        rows = await node.until_rows(lambda rows: all(row["dead_at"] for row in rows))
        assert sum(row["attempts"] for row in rows) == len(receiver.ids) == 10
        assert node.counted("dead") == 30


async def test_the_backlog_is_a_metric(path: Path) -> None:
    receiver = Receiver()

    async with node_on(path, receiver.settings(), back_off=BackOff(0.05, 0.05), refresh_s=0.02) as node:
        value = node.metrics.registry.get_sample_value
        assert value("sip_pbx_outbox_pending", {"endpoint": "crm"}) == 0
        await node.happen("evt_1", ago=timedelta(hours=1))
        await node.happen("evt_2")
        await until(lambda: value("sip_pbx_outbox_pending", {"endpoint": "crm"}) == 2)
        assert 3600 <= (value("sip_pbx_outbox_oldest_seconds", {"endpoint": "crm"}) or 0) < 3700
        async with receiver:
            await until(lambda: value("sip_pbx_outbox_pending", {"endpoint": "crm"}) == 0)
        assert value("sip_pbx_outbox_oldest_seconds", {"endpoint": "crm"}) == 0


async def test_what_died_a_week_ago_is_forgotten(path: Path) -> None:
    receiver = Receiver([500] * 2)
    async with receiver, node_on(path, receiver.settings(give_up_after_s=60), refresh_s=0.02) as node:
        for name in ("evt_old", "evt_older"):
            await node.happen(name, ago=timedelta(hours=1))
        await node.until_rows(lambda rows: len(rows) == 2 and all(row["dead_at"] for row in rows))
        long_ago = (datetime.now(UTC) - timedelta(days=8)).isoformat(timespec="microseconds")
        await node.database.write([("UPDATE webhook_deliveries SET dead_at = ? WHERE sequence = 1", (long_ago,))])
        [row] = await node.until_rows(lambda rows: len(rows) == 1)
        assert row["sequence"] == 2


async def test_name_servers_that_are_silent_for_one_endpoint_hold_up_no_other(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()

    def look_up(host: str, port: int, family: int = 0, kind: int = 0) -> list[Any]:
        if host == "silent.test":
            release.wait(30)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (HOST, port))]

    monkeypatch.setattr("control.events.webhook_client.socket.getaddrinfo", look_up)
    with ThreadPoolExecutor(max_workers=1) as shared:
        asyncio.get_running_loop().set_default_executor(shared)
        async with AsyncExitStack() as stack:
            stack.callback(release.set)
            silent, named = [await stack.enter_async_context(Receiver()) for _ in range(2)]
            settings = (silent.settings("silent", "silent.test"), named.settings("named", "named.test"))
            node = await stack.enter_async_context(node_on(path, *settings, close_s=0))
            await node.happen("evt_1")
            await until(lambda: named.ids == ["evt_1"])
            assert await asyncio.to_thread(path.exists)
            assert silent.ids == []


async def test_an_outcome_that_cannot_be_stored_makes_the_event_come_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook_module, "_STORE_PAUSE_S", 0.01)
    real = Deliveries.delivered
    failures = iter([StoreError("no room")])

    async def delivered(self: Deliveries, delivery: Any) -> None:
        if (error := next(failures, None)) is not None:
            raise error
        await real(self, delivery)

    monkeypatch.setattr(Deliveries, "delivered", delivered)
    async with Receiver() as receiver, node_on(path, receiver.settings()) as node:
        await node.happen("evt_1")
        await node.until_rows(lambda rows: not rows)
        assert receiver.ids == ["evt_1", "evt_1"]
        assert node.errors("outcome_unsaved") == 1


async def test_a_store_that_cannot_be_read_is_read_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook_module, "_STORE_PAUSE_S", 0.01)
    real = Deliveries.due
    failures: list[Exception] = []

    async def due(self: Deliveries, *arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return await real(self, *arguments)

    monkeypatch.setattr(Deliveries, "due", due)
    async with Receiver() as receiver, node_on(path, receiver.settings()) as node:
        failures += [StoreError("disk"), RuntimeError("a bug")]
        await node.happen("evt_1")
        await node.until_rows(lambda rows: not rows)
        assert (node.errors("outbox_unreadable"), node.errors("internal")) == (1, 1)


async def test_an_event_that_trips_over_a_bug_is_put_off_and_keeps_no_other(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = WebhookClient.post
    failures = [RuntimeError("a bug")]

    async def post(self: WebhookClient, event: StoredEvent) -> Any:
        if event.id == "evt_bad" and failures:
            raise failures.pop()
        return await real(self, event)

    monkeypatch.setattr(WebhookClient, "post", post)
    async with Receiver() as receiver, node_on(path, receiver.settings(concurrency=1)) as node:
        await node.happen("evt_bad")
        await node.happen("evt_good")
        await node.until_rows(lambda rows: not rows)
        assert sorted(receiver.ids) == ["evt_bad", "evt_good"]
        assert (node.errors("internal"), node.counted("retry")) == (1, 1)


async def test_the_receiver_of_the_documentation_takes_what_is_genuine_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "webhooks.md").read_text()
    names: dict[str, Any] = {"__name__": "receiver"}
    monkeypatch.setenv("WEBHOOK_SECRET", SECRET)
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], names)
    port = next(ports)
    url = f"http://{HOST}:{port}/hooks/calls"
    genuine = WebhookSettings(name="genuine", url=url, secret=SecretStr(SECRET))
    forged = WebhookSettings(name="forged", url=url, secret=SecretStr("whsec_" + b64encode(b"x" * 32).decode()))
    runner = web.AppRunner(names["app"])
    await runner.setup()
    try:
        await web.TCPSite(runner, HOST, port).start()
        async with node_on(path, genuine, forged, back_off=BackOff(600, 600)) as node:
            await node.happen("evt_1")
            [row] = await node.until_rows(lambda rows: [row["attempts"] for row in rows] == [1])
        assert (row["endpoint"], row["last_failure"]) == ("forged", "answered 401")
        assert list(names["seen"]) == ["evt_1"]
    finally:
        await runner.cleanup()
