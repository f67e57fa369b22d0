"""The HTTP API over real sockets: a real service over tables of this file, and a real client."""

import asyncio
import contextlib
import json
import logging
import re
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from control.api import http_api
from control.api.auth import ApiKeys
from control.api.errors import ApiBindError
from control.api.http_api import HttpApi
from control.api.service import ControlService, NodeView
from control.events.cdr import cdr_line
from control.metrics import ControlMetrics
from control.pbx.records import (
    Reason,
)
from control.pbx.routing import Refusal
from control.settings.sections import ApiSettings
from control.store.database import StoreError
from tests.harness.node import Calls, Events, Records, phone, running_call
from tests.harness.records import INVITED_AT, call_record

pytestmark = pytest.mark.integration

ADDRESS = "127.0.0.53"
KEY = "a-key-of-sixteen-characters-or-more"
PARTIES = {"caller": "1001", "callee": "1002"}


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def document(self) -> Any:
        return json.loads(self.body)


class Node:
    """The API of a node, and a client of it."""

    def __init__(self, **http: Any) -> None:
        self.calls = Calls()
        self.records = Records()
        self.unready: list[str] = []
        self.draining = False
        self.metrics = ControlMetrics()
        self.settings = ApiSettings.model_validate(
            {"keys": [{"name": "orchestrator", "key": KEY}], "http": {"bind": ADDRESS, "port": 27300, **http}}
        )
        self.api = self.make()

    def make(self) -> HttpApi:
        service = ControlService(
            calls=self.calls,
            records=self.records,
            events=Events(),
            node=self._view,
            drain=self._drain,
        )
        return HttpApi(self.settings, service, ApiKeys(self.settings.keys), self.metrics, lambda: self.unready)

    async def ask(
        self, method: str, path: str, *, key: str | None = KEY, headers: Mapping[str, str] | None = None, **body: Any
    ) -> Answer:
        sent = {**({} if key is None else {"Authorization": f"Bearer {key}"}), **(headers or {})}
        url = f"http://{ADDRESS}:{self.api.port}{path}"
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as client,
            client.request(method, url, headers=sent, **body) as response,
        ):
            return Answer(response.status, response.headers, await response.read())

    async def get(self, path: str, **options: Any) -> Answer:
        return await self.ask("GET", path, **options)

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Octets as they are."""
        reader, writer = await asyncio.open_connection(ADDRESS, self.api.port)
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    def requests(self, **labels: str) -> float:
        """How many requests with these labels were counted."""
        families = text_string_to_metric_families(generate_latest(self.metrics.registry).decode())
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == "sip_pbx_http_request_seconds_count" and labels.items() <= sample.labels.items()
        )

    def _view(self) -> NodeView:
        return NodeView(
            name="test",
            version="1.2.3",
            started_at=INVITED_AT,
            ready=not self.unready,
            not_ready_reasons=tuple(self.unready),
            draining=self.draining,
            active_calls=len(self.calls.running),
            max_calls=1000,
            registrations=len(self.calls.phones),
        )

    def _drain(self) -> None:
        self.draining = True


@contextlib.asynccontextmanager
async def started(**http: Any) -> AsyncIterator[Node]:
    node = Node(**http)
    await node.api.start()
    try:
        yield node
    finally:
        await node.api.stop()


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    async with started() as node:
        yield node


def assert_problem(answer: Answer, status: int, reason: str) -> Any:
    assert answer.status == status, answer.body
    assert answer.headers["Content-Type"] == "application/problem+json"
    document = answer.document
    assert set(document) == {"type", "title", "status", "detail", "instance"}
    assert (document["type"], document["status"]) == (f"urn:sippbx:problem:{reason}", status)
    assert document["title"].lower() == reason.replace("-", " ")
    assert document["detail"]
    return document


# Calls


async def test_calls_are_listed_in_the_words_of_the_record(node: Node) -> None:
    node.calls.running["call-1"] = running_call()
    answer = await node.get("/v1/calls")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    assert answer.document == {
        "calls": [
            {
                "call_id": "call-1",
                "state": "established",
                "direction": "internal",
                "caller": "1001",
                "callee": "1002",
                "invited_at": "2026-03-01T09:30:00.250000Z",
                "ringing_at": "2026-03-01T09:30:00.250000Z",
                "answered_at": None,
                "record": None,
            }
        ],
        "next_page_token": "",
    }


async def test_calls_come_in_pages_that_a_token_joins(node: Node) -> None:
    node.calls.running = {
        name: running_call(name, invited_at=INVITED_AT + timedelta(seconds=second))
        for second, name in enumerate(("a", "b", "c"))
    }
    first = (await node.get("/v1/calls?page_size=2")).document
    assert [call["call_id"] for call in first["calls"]] == ["a", "b"]
    second = (await node.get("/v1/calls", params={"page_token": first["next_page_token"]})).document
    assert [call["call_id"] for call in second["calls"]] == ["c"]
    assert second["next_page_token"] == ""


async def test_ended_call_carries_the_record_of_the_cdr_file(node: Node) -> None:
    record = call_record("call-9")
    node.records.kept = [record]
    call = (await node.get("/v1/calls/call-9")).document
    assert call["state"] == "ended"
    assert call["record"] == json.loads(cdr_line(record))


async def test_unknown_call_is_not_found(node: Node) -> None:
    problem = assert_problem(await node.get("/v1/calls/nobody"), 404, "no-such-call")
    assert problem["instance"] == "/v1/calls/nobody"


async def test_put_starts_a_call_and_repeating_it_gives_the_same_one(node: Node) -> None:
    first = await node.ask("PUT", "/v1/calls/mine", json=PARTIES)
    again = await node.ask("PUT", "/v1/calls/mine", json=PARTIES)
    assert (first.status, again.status) == (201, 200)
    assert first.document == again.document
    assert first.document["state"] == "calling"
    assert list(node.calls.running) == ["mine"]


async def test_id_of_a_call_between_others_is_a_conflict(node: Node) -> None:
    await node.ask("PUT", "/v1/calls/mine", json=PARTIES)
    answer = await node.ask("PUT", "/v1/calls/mine", json={"caller": "1002", "callee": "1001"})
    assert_problem(answer, 409, answer.document["type"].rpartition(":")[2])


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        (Reason.NOT_REGISTERED, 422),
        (Reason.UNKNOWN_NUMBER, 422),
        (Reason.NOT_ALLOWED, 422),
        (Reason.CALL_LIMIT, 429),
        (Reason.DRAINING, 503),
        (Reason.MEDIA_UNAVAILABLE, 503),
    ],
)
async def test_refusal_of_the_pbx_has_its_reason(node: Node, reason: Reason, status: int) -> None:
    node.calls.refusal = Refusal(503, reason, "for a reason")
    problem = assert_problem(await node.ask("PUT", "/v1/calls/mine", json=PARTIES), status, reason.value)
    assert problem["detail"] == "for a reason"


async def test_refusal_says_when_to_come_back(node: Node) -> None:
    node.calls.refusal = Refusal(503, Reason.DRAINING, "the node stops", retry_after_s=7)
    assert (await node.ask("PUT", "/v1/calls/mine", json=PARTIES)).headers["Retry-After"] == "7"


async def test_call_is_hung_up(node: Node) -> None:
    node.calls.running["call-1"] = running_call()
    answer = await node.ask("POST", "/v1/calls/call-1/hangup")
    assert (answer.status, answer.document["state"]) == (200, "releasing")
    assert node.calls.hung_up == ["call-1"]


async def test_text_that_was_no_unicode_does_not_hide_the_calls_of_others(node: Node) -> None:
    node.calls.running = {"a": running_call("a", caller="\udcff1001"), "b": running_call("b")}
    node.calls.phones = [phone(contact="sip:\udcff@x", user_agent="\udcfe")]
    calls = (await node.get("/v1/calls")).document["calls"]
    assert [call["caller"] for call in calls] == ["\N{REPLACEMENT CHARACTER}1001", "1001"]
    (registration,) = (await node.get("/v1/registrations")).document["registrations"]
    assert registration["contact"] == "sip:\N{REPLACEMENT CHARACTER}@x"


# Registrations, records, node


async def test_registrations_are_listed_for_all_users_and_for_one(node: Node) -> None:
    node.calls.phones = [phone("1001"), phone("1002", user_agent=None)]
    everybody = (await node.get("/v1/registrations")).document["registrations"]
    assert [registration["user"] for registration in everybody] == ["1001", "1002"]
    assert (await node.get("/v1/registrations?user=1002")).document["registrations"] == [
        {
            "user": "1002",
            "contact": "sip:1002@127.0.0.2",
            "source": "127.0.0.2:5060",
            "user_agent": None,
            "expires_at": "2026-03-01T09:35:00.250000Z",
        }
    ]


async def test_records_are_those_of_the_cdr_file_the_newest_first_and_in_pages(node: Node) -> None:
    node.records.kept = [call_record(name) for name in ("c", "b", "a")]
    first = (await node.get("/v1/cdrs?page_size=2")).document
    assert first["cdrs"] == [json.loads(cdr_line(record)) for record in node.records.kept[:2]]
    second = (await node.get("/v1/cdrs", params={"page_token": first["next_page_token"]})).document
    assert [record["call_id"] for record in second["cdrs"]] == ["a"]


async def test_node_tells_how_it_is_and_drains_when_it_is_told(node: Node) -> None:
    assert (await node.get("/v1/node")).document == {
        "name": "test",
        "version": "1.2.3",
        "started_at": "2026-03-01T09:30:00.250000Z",
        "ready": True,
        "not_ready_reasons": [],
        "draining": False,
        "active_calls": 0,
        "max_calls": 1000,
        "registrations": 0,
    }
    assert (await node.ask("POST", "/v1/node/drain", json={})).document["draining"] is True
    assert node.draining


async def test_health_needs_no_key_and_tells_the_reasons(node: Node) -> None:
    well = await node.get("/healthz", key=None)
    assert (well.status, well.body) == (200, b"ok\n")
    node.unready = ["draining", "media: not connected"]
    ill = await node.get("/healthz", key=None)
    assert (ill.status, ill.body) == (503, b"draining\nmedia: not connected\n")


# Who may


@pytest.mark.parametrize("path", ["/v1/calls", "/v1/node", "/v1/nothing", "/"])
@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", f"Basic {KEY}", KEY])
async def test_nothing_is_told_without_a_key(node: Node, path: str, header: str | None) -> None:
    answer = await node.get(path, key=None, headers={} if header is None else {"Authorization": header})
    assert_problem(answer, 401, answer.document["type"].rpartition(":")[2])
    assert answer.headers["WWW-Authenticate"].startswith("Bearer ")


async def test_verb_without_a_key_does_nothing(node: Node) -> None:
    node.calls.running["call-1"] = running_call()
    assert (await node.ask("POST", "/v1/calls/call-1/hangup", key="guessed")).status == 401
    assert (await node.ask("PUT", "/v1/calls/mine", key="guessed", json=PARTIES)).status == 401
    assert (await node.ask("POST", "/v1/node/drain", key="guessed")).status == 401
    assert (node.calls.hung_up, list(node.calls.running), node.draining) == ([], ["call-1"], False)


# What is asked


async def test_unknown_path_is_a_problem_of_its_own(node: Node) -> None:
    assert assert_problem(await node.get("/v1/trunks"), 404, "unknown-path")["instance"] == "/v1/trunks"


async def test_method_that_is_not_allowed_is_told_with_those_that_are(node: Node) -> None:
    answer = await node.ask("DELETE", "/v1/calls/call-1")
    assert_problem(answer, 405, "method-not-allowed")
    assert answer.headers["Allow"] == "GET, HEAD, PUT"


async def test_head_is_a_get_without_the_body(node: Node) -> None:
    got, headed = await node.get("/v1/node"), await node.ask("HEAD", "/v1/node")
    assert (headed.status, headed.body) == (200, b"")
    assert headed.headers["Content-Length"] == got.headers["Content-Length"] == str(len(got.body))


async def test_answers_are_not_kept_by_anybody(node: Node) -> None:
    for path in ("/v1/calls", "/v1/nothing", "/healthz"):
        answer = await node.get(path)
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    ("body", "reason", "told"),
    [
        (b"{", "bad-json", "not JSON"),
        (b"\xff\xfe", "bad-json", "not JSON"),
        (b"[]", "bad-body", "must be a JSON object"),
        (b"", "bad-body", "caller is required"),
        (b'{"caller": "1001"}', "bad-body", "callee is required"),
        (b'{"caller": 1001, "callee": "1002"}', "bad-body", "caller: "),
        (b'{"caller": "1001", "callee": "1002", "colour": 1}', "bad-body", "'colour' is not a key"),
    ],
)
async def test_body_that_does_not_fit_is_told_what_is_wrong(node: Node, body: bytes, reason: str, told: str) -> None:
    answer = await node.ask("PUT", "/v1/calls/mine", data=body, headers={"Content-Type": "application/json"})
    assert told in assert_problem(answer, 400, reason)["detail"]
    assert not node.calls.running


async def test_verb_that_takes_nothing_refuses_what_it_would_ignore(node: Node) -> None:
    node.calls.running["call-1"] = running_call()
    assert_problem(await node.ask("POST", "/v1/calls/call-1/hangup", json={"status": 486}), 400, "bad-body")
    assert not node.calls.hung_up


async def test_body_of_another_type_is_refused_with_what_is_accepted(node: Node) -> None:
    answer = await node.ask("PUT", "/v1/calls/mine", data={"caller": "1001"})
    assert_problem(answer, 415, "unsupported-media-type")
    assert answer.headers["Accept"] == "application/json"


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("page_size=many", "whole number"),
        ("page_size=-1", "whole number"),
        ("page_size=1234567", "whole number"),
        ("page_size=1&page_size=2", "given twice"),
        ("colour=red", "known are page_size, page_token"),
        (f"page_token={'x' * 513}", "more than 512 characters"),
    ],
)
async def test_query_that_does_not_fit_is_told_what_is_wrong(node: Node, query: str, told: str) -> None:
    assert told in assert_problem(await node.get(f"/v1/calls?{query}"), 400, "bad-query")["detail"]


async def test_page_token_of_somebody_else_is_refused(node: Node) -> None:
    answer = await node.get("/v1/calls?page_token=guessed")
    assert_problem(answer, 400, answer.document["type"].rpartition(":")[2])


# Limits


@pytest.mark.parametrize("declared", [True, False])
async def test_body_that_is_too_long_is_refused(declared: bool) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 100

    async with started(max_body_bytes=1024) as node:
        body = b"x" * 2000 if declared else pieces()
        answer = await node.ask("PUT", "/v1/calls/mine", data=body, headers={"Content-Type": "application/json"})
        assert_problem(answer, 413, "body-too-large")
        assert answer.headers["Connection"] == "close"
        assert (await node.get("/v1/node")).status == 200


async def test_body_that_grows_when_it_is_unpacked_is_refused() -> None:
    async with started(max_body_bytes=1024) as node:
        answer = await node.ask(
            "PUT",
            "/v1/calls/mine",
            data=b"x" * 1_000_000,
            compress="gzip",
            headers={"Content-Type": "application/json"},
        )
        assert_problem(answer, 413, "body-too-large")


async def test_client_that_sends_its_body_slowly_is_cut_off() -> None:
    async with started(request_timeout_s=0.2) as node, node.connection() as (reader, writer):
        head = f"PUT /v1/calls/mine HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        writer.write(f"{head}Content-Type: application/json\r\nContent-Length: 50\r\n\r\n{{".encode())
        answer = await asyncio.wait_for(reader.read(), 10)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"urn:sippbx:problem:request-timeout" in answer


@pytest.mark.parametrize(
    "sent", [b"", b"GET /v1/calls HTTP/1.1\r\nHost: x\r\n", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"]
)
async def test_connection_is_closed_when_no_whole_head_comes(sent: bytes) -> None:
    async with started(request_timeout_s=0.2) as node, node.connection() as (reader, writer):
        writer.write(sent)
        await asyncio.wait_for(reader.read(), 10)


async def test_request_that_takes_too_long_is_given_up() -> None:
    async with started(request_timeout_s=0.2) as node:
        node.records.read = asyncio.Event().wait
        assert_problem(await node.get("/v1/cdrs"), 504, "timeout")


async def test_client_that_does_not_read_is_cut_off() -> None:
    async with started(request_timeout_s=0.2) as node:
        node.records.kept = [call_record(f"call-{number}", caller="x" * 10_000) for number in range(1000)]
        async with node.connection() as (reader, writer):
            writer.write(
                f"GET /v1/cdrs?page_size=1000 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode()
            )
            async with asyncio.timeout(10):
                while not node.requests(route="/v1/cdrs"):
                    await asyncio.sleep(0.02)
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        declared = re.search(rb"Content-Length: (\d+)", head)
        assert declared
        assert len(body) < int(declared[1])


async def test_connections_are_bounded(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_api, "MAX_CONNECTIONS", 1)
    async with node.connection() as (reader, writer):
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
        async with node.connection() as (late, _):
            assert await asyncio.wait_for(late.read(), 5) == b""
    async with asyncio.timeout(5):
        while True:
            try:
                assert (await node.get("/healthz")).status == 200
                break
            except aiohttp.ClientConnectionError:
                await asyncio.sleep(0.02)


async def test_what_is_not_http_is_answered_and_not_logged(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    for sent in (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET / HTTP/1.1\r\nno colon\r\n\r\n", b"G\r\n\r\n"):
        async with node.connection() as (reader, writer):
            writer.write(sent)
            answer = await asyncio.wait_for(reader.read(), 10)
            assert answer.startswith(b"HTTP/1.0 400 ")
            assert b"urn:sippbx:problem:bad-http" in answer
    assert not [record for record in caplog.records if record.levelno >= logging.INFO]
    assert node.requests(route="other", method="other", code="400") == 3


# Failures


async def test_failure_is_told_with_an_id_that_the_log_has(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    async def fail() -> None:
        raise RuntimeError("no such thing")

    node.records.read = fail
    problem = assert_problem(await node.get("/v1/cdrs"), 500, "internal-error")
    prefix, _, error_id = problem["instance"].rpartition(":")
    assert prefix == "urn:sippbx:error"
    assert error_id in capsys.readouterr().out
    assert "no such thing" not in problem["detail"]


async def test_store_that_cannot_be_read_is_unavailable(node: Node) -> None:
    async def fail() -> None:
        raise StoreError("the disk is gone")

    node.records.read = fail
    answer = await node.get("/v1/cdrs")
    assert_problem(answer, 503, answer.document["type"].rpartition(":")[2])


async def test_requests_are_counted_by_pattern_and_never_by_path(node: Node) -> None:
    await node.get("/v1/calls/one")
    await node.get("/v1/calls/two")
    await node.get("/v1/three")
    await node.ask("PROPFIND", "/v1/calls/one")
    assert node.requests(route="/v1/calls/{call_id}", method="GET", code="404") == 2
    assert node.requests(route="other", method="GET", code="404") == 1
    assert node.requests(route="other", method="other", code="405") == 1
    assert node.requests() == 4


# Start and stop


async def test_taken_port_is_named(node: Node) -> None:
    with pytest.raises(ApiBindError, match=f"{ADDRESS} TCP port {node.api.port}"):
        await node.make().start()


async def test_stopped_api_leaves_its_port_free_and_no_task_behind() -> None:
    before = asyncio.all_tasks()
    async with started() as node, node.connection() as (reader, writer):
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
        await node.api.stop()
        assert node.api.port == 0
        assert await asyncio.wait_for(reader.read(), 5)
        await node.api.start()
        assert (await node.get("/healthz")).status == 200
    assert asyncio.all_tasks() == before


async def test_it_speaks_https_where_there_is_a_certificate(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert(ADDRESS)
    chain, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    chain.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    key.write_bytes(certificate.private_key_pem.bytes())
    node = Node()
    node.settings = ApiSettings.model_validate(
        {
            **node.settings.model_dump(exclude={"tls"}),
            "tls": {"certificate_path": chain, "private_key_path": key},
        }
    )
    api = node.make()
    await api.start()
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as client,
            client.get(f"https://{ADDRESS}:{api.port}/healthz", ssl=trust) as response,
        ):
            assert response.status == 200
    finally:
        await api.stop()


async def test_certificate_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    node = Node()
    (tmp_path / "tls.crt").write_text("nonsense")
    node.settings = node.settings.model_copy(
        update={
            "tls": ApiSettings.model_validate(
                {"tls": {"certificate_path": tmp_path / "tls.crt", "private_key_path": tmp_path / "none"}}
            ).tls
        }
    )
    with pytest.raises(ApiBindError, match=r"tls\.crt"):
        await node.make().start()
