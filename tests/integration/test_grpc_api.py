"""The gRPC API from outside, with bare stubs and with sippbx.client."""

import asyncio
import contextlib
import itertools
import os
import re
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import trustme
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from pydantic import SecretStr

from control.api import grpc_border
from control.api.auth import ApiKeys
from control.api.errors import ApiBindError
from control.api.grpc_api import GrpcApi
from control.api.grpc_services import CallServicer
from control.metrics import ControlMetrics
from control.pbx.records import CallEventKind, ErrorEvent, LegName, Reason, RegistrationView
from control.pbx.routing import Refusal
from control.settings.sections import ApiKeySettings, ApiSettings, GrpcSettings, TlsSettings
from sippbx.client import Client, ClientError
from sippbx.control.v1 import (
    call_service_pb2,
    call_service_pb2_grpc,
    cdr_service_pb2,
    cdr_service_pb2_grpc,
    event_service_pb2,
    event_service_pb2_grpc,
    node_service_pb2,
    node_service_pb2_grpc,
)
from sippbx.events.v1 import event_pb2
from tests.harness.control_node import STARTED_AT, ControlNode, call_view
from tests.harness.records import call_event, call_record

pytestmark = pytest.mark.integration

HOST = "127.0.0.52"
KEY = "0123456789abcdef0123"
AUTHORIZED = (("authorization", f"Bearer {KEY}"),)
PORTS = itertools.count(27_200)


class Node(ControlNode):
    """A control node behind its gRPC API."""

    def __init__(self) -> None:
        super().__init__()
        self.port = next(PORTS)
        self.metrics = ControlMetrics()
        self.tls: TlsSettings | None = None
        self.max_watchers = 10
        self.heartbeat_s = 10.0
        self.write_timeout_s = 10.0
        self.api = self._api()

    def _api(self) -> GrpcApi:
        key = ApiKeySettings(name="dialler", key=SecretStr(KEY))
        grpc_settings = GrpcSettings(bind=HOST, port=self.port, max_watchers=self.max_watchers)
        settings = ApiSettings(keys=(key,), tls=self.tls, grpc=grpc_settings)
        return GrpcApi(
            settings,
            self.service,
            ApiKeys(settings.keys),
            self.metrics,
            heartbeat_s=self.heartbeat_s,
            write_timeout_s=self.write_timeout_s,
        )

    async def start(self) -> None:
        """Serve, as a process that has just begun."""
        self.metrics = ControlMetrics()
        self.api = self._api()
        await self.api.start()

    async def stop(self) -> None:
        await self.api.stop(0.1)

    @property
    def target(self) -> str:
        return f"{HOST}:{self.port}"

    def requests(self, method: str, code: str) -> float:
        labels = {"method": method, "code": code}
        return self.metrics.registry.get_sample_value("sip_pbx_grpc_request_seconds_count", labels) or 0

    @property
    def watchers(self) -> float:
        return self.metrics.registry.get_sample_value("sip_pbx_watch_clients") or 0


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    """A node that its test starts, or has started by `client` or `channel`."""
    made = Node()
    yield made
    await made.stop()


@pytest.fixture
async def client(node: Node) -> AsyncIterator[Client]:
    await node.start()
    async with Client(node.target, KEY) as made:
        yield made


@pytest.fixture
async def channel(node: Node) -> AsyncIterator[grpc.aio.Channel]:
    await node.start()
    async with grpc.aio.insecure_channel(node.target, options=[("grpc.use_local_subchannel_pool", 1)]) as made:
        yield made


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """The reason in the ErrorInfo, which must be of our domain."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "sippbx"
    return str(info.reason)


async def read_all(stream: Any) -> None:
    async for _ in stream:
        pass


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


# ---- who may ask --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ((), "no-api-key"),
        ((("authorization", KEY),), "no-api-key"),
        ((("authorization", f"Bearer {KEY}x"),), "wrong-api-key"),
    ],
)
async def test_nothing_is_told_or_done_without_a_valid_key(
    node: Node, channel: grpc.aio.Channel, metadata: Any, reason: str
) -> None:
    originate = call_service_pb2.OriginateCallRequest(call_id="c1", caller="1001", callee="1002")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call_service_pb2_grpc.CallServiceStub(channel).OriginateCall(originate, metadata=metadata, timeout=10)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert reason_of(refused.value) == reason
    assert node.calls.originated == []
    assert node.requests("OriginateCall", "UNAUTHENTICATED") == 1
    watch = event_service_pb2_grpc.EventServiceStub(channel).WatchEvents(
        event_service_pb2.WatchEventsRequest(), metadata=metadata, timeout=10
    )
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await watch.read()
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_health_is_told_without_a_key(node: Node, channel: grpc.aio.Channel) -> None:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    for service in ("", "sippbx.control.v1.CallService", "sippbx.control.v1.EventService"):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_health_watchers_are_bounded(
    node: Node, channel: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_border, "MAX_HEALTH_WATCHERS", 1)
    stub: Any = health_pb2_grpc.HealthStub(channel)
    first = stub.Watch(health_pb2.HealthCheckRequest(), timeout=10)
    assert (await first.read()).status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.Watch(health_pb2.HealthCheckRequest(), timeout=10).read()
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    first.cancel()


async def test_method_that_there_is_not_is_said_to_be_so_to_those_with_a_key(
    node: Node, channel: grpc.aio.Channel
) -> None:
    unknown: Any = channel.unary_unary("/sippbx.control.v1.CallService/BridgeCalls")
    for metadata, code in ((AUTHORIZED, "UNIMPLEMENTED"), ((), "UNAUTHENTICATED")):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await unknown(b"", metadata=metadata, timeout=10)
        assert refused.value.code().name == code
        assert node.requests("other", code) == 1


async def test_over_tls_the_certificate_is_checked(node: Node, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert(HOST)
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    chain.write_bytes(b"".join(part.bytes() for part in certificate.cert_chain_pems))
    key.write_bytes(certificate.private_key_pem.bytes())
    node.tls = TlsSettings(certificate_path=chain, private_key_path=key)
    await node.start()
    trusted = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    async with Client(node.target, KEY, tls=trusted) as client:
        assert (await client.node()).name == "node-1"
    stranger = grpc.ssl_channel_credentials(trustme.CA().cert_pem.bytes())
    for tls in (stranger, None):
        async with Client(node.target, KEY, tls=tls, timeout_s=1.0) as client:
            with pytest.raises(ClientError) as refused:
                await client.node()
            assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.UNAVAILABLE, "")


async def test_certificate_that_cannot_be_read_is_named(node: Node, tmp_path: Path) -> None:
    certificate = trustme.CA().issue_cert(HOST)
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    node.tls = TlsSettings(certificate_path=chain, private_key_path=key)
    with pytest.raises(ApiBindError, match=r"chain\.pem.*No such file"):
        await node.start()
    chain.write_bytes(certificate.cert_chain_pems[0].bytes())
    with pytest.raises(ApiBindError, match=r"key\.pem.*No such file"):
        await node.start()
    key.write_bytes(trustme.CA().issue_cert(HOST).private_key_pem.bytes())
    with pytest.raises(ApiBindError, match=r"chain\.pem with .*key\.pem"):
        await node.start()


async def test_taken_port_is_an_error_that_names_it(node: Node) -> None:
    await node.start()
    other = Node()
    other.port = node.port
    with pytest.raises(ApiBindError, match=rf"{HOST} TCP port {node.port}: Address already in use"):
        await other.start()


# ---- calls, records, the node -------------------------------------------------------------------------------------


async def test_originated_call_may_be_asked_for_again(node: Node, client: Client) -> None:
    first = await client.originate("c1", caller="1001", callee="1002")
    assert await client.originate("c1", caller="1001", callee="1002") == first
    assert (first.call_id, first.caller, first.callee) == ("c1", "1001", "1002")
    assert first.state == call_service_pb2.CALL_STATE_CALLING
    assert node.calls.originated == ["c1"]
    assert node.requests("OriginateCall", "OK") == 2


async def test_id_of_another_call_is_refused(node: Node, client: Client) -> None:
    await client.originate("c1", caller="1001", callee="1002")
    with pytest.raises(ClientError) as refused:
        await client.originate("c1", caller="1001", callee="1003")
    assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.ALREADY_EXISTS, "call-id-in-use")
    assert node.requests("OriginateCall", "ALREADY_EXISTS") == 1


async def test_refusal_says_when_to_come_back_and_is_not_asked_again(node: Node, client: Client) -> None:
    node.calls.refusal = Refusal(503, Reason.DRAINING, "the node drains", 7)
    with pytest.raises(ClientError) as refused:
        await client.originate("c1", caller="1001", callee="1002")
    error = refused.value
    assert (error.code, error.reason, error.detail) == (grpc.StatusCode.UNAVAILABLE, "draining", "the node drains")
    assert error.retry_after_s == 7
    assert str(error) == "draining: the node drains"
    assert node.requests("OriginateCall", "UNAVAILABLE") == 1


async def test_call_is_given_and_hung_up_by_its_id(node: Node, client: Client) -> None:
    node.calls.add(call_view("c1"))
    node.records.kept.append(call_record("c2"))
    assert (await client.get_call("c1")).call_id == "c1"
    assert (await client.hang_up("c1")).call_id == "c1"
    assert [call_id for call_id, _ in node.calls.hung_up] == ["c1"]
    ended = await client.hang_up("c2")
    assert ended.state == call_service_pb2.CALL_STATE_ENDED
    assert ended.record.termination.sip_status == 200
    with pytest.raises(ClientError) as refused:
        await client.get_call("c3")
    assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.NOT_FOUND, "no-such-call")


async def test_lists_are_followed_over_their_pages(node: Node, client: Client) -> None:
    node.calls.add(*(call_view(f"c{index}", after_s=index) for index in range(25)))
    node.records.kept = [call_record(f"r{index}") for index in range(25)]
    node.calls.bindings = [
        RegistrationView(user, f"sip:{index}@x", "x:1", None, STARTED_AT) for index in range(12) for user in ("1", "2")
    ]
    assert [call.call_id async for call in client.calls(page_size=10)] == [f"c{index}" for index in range(25)]
    assert [record.call_id async for record in client.records(page_size=10)] == [
        f"r{index}" for index in reversed(range(25))
    ]
    assert len({view.contact async for view in client.registrations("2", page_size=5)}) == 12
    assert len([view async for view in client.registrations(page_size=5)]) == 24
    assert node.requests("ListCalls", "OK") == 3


async def test_page_ends_early_rather_than_be_too_long_for_a_client(node: Node, channel: grpc.aio.Channel) -> None:
    node.records.kept = [call_record(f"r{index}", caller="x" * 60_000) for index in range(100)]
    stub = cdr_service_pb2_grpc.CdrServiceStub(channel)
    seen: list[str] = []
    token = ""
    while True:
        request = cdr_service_pb2.ListCallRecordsRequest(page_token=token)
        page = await stub.ListCallRecords(request, metadata=AUTHORIZED, timeout=10)
        assert page.ByteSize() < 1024 * 1024 + 100
        seen += [record.call_id for record in page.records]
        if not (token := page.next_page_token):
            break
    assert seen == [f"r{index}" for index in reversed(range(100))]


async def test_page_token_of_another_list_is_refused(node: Node, channel: grpc.aio.Channel) -> None:
    node.calls.add(call_view("c1"), call_view("c2"))
    request = call_service_pb2.ListCallsRequest(page_size=1)
    page = await call_service_pb2_grpc.CallServiceStub(channel).ListCalls(request, metadata=AUTHORIZED, timeout=10)
    wrong = cdr_service_pb2.ListCallRecordsRequest(page_token=page.next_page_token)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await cdr_service_pb2_grpc.CdrServiceStub(channel).ListCallRecords(wrong, metadata=AUTHORIZED, timeout=10)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason_of(refused.value) == "bad-page-token"


async def test_node_is_drained_by_a_verb(node: Node, client: Client) -> None:
    before = await client.node()
    assert (before.ready, before.draining, before.version) == (True, False, "1.2.3")
    after = await client.drain()
    assert (after.ready, after.draining, list(after.not_ready_reasons)) == (False, True, ["draining"])
    assert node.draining


async def test_bug_is_told_without_its_inside_and_counted(node: Node, client: Client) -> None:
    node.records.failure = RuntimeError("secret")
    with pytest.raises(ClientError) as failed:
        await client.get_call("c1")
    assert (failed.value.code, failed.value.reason) == (grpc.StatusCode.INTERNAL, "internal-error")
    assert "secret" not in str(failed.value)
    labels = {"component": "api", "kind": "internal"}
    assert node.metrics.registry.get_sample_value("sip_pbx_errors_total", labels) == 1
    assert node.requests("GetCall", "INTERNAL") == 1


async def test_request_that_takes_too_long_is_given_up(node: Node) -> None:
    node.records.readable.clear()
    border = grpc_border.Border(
        ApiKeys([ApiKeySettings(name="dialler", key=SecretStr(KEY))]), node.metrics, request_timeout_s=0.05
    )
    server = grpc.aio.server(interceptors=[border])
    call_service_pb2_grpc.add_CallServiceServicer_to_server(CallServicer(node.service), server)
    server.add_insecure_port(node.target)
    await server.start()
    async with Client(node.target, KEY) as client:
        with pytest.raises(ClientError) as late:
            await client.get_call("c1")
    await server.stop(0)
    assert (late.value.code, late.value.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "timeout")


async def test_requests_under_way_are_bounded(node: Node, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_border, "MAX_REQUESTS", 3)
    node.records.readable.clear()
    waiting = [asyncio.create_task(client.get_call(f"c{index}")) for index in range(3)]
    await until(lambda: node.records.reads == 3)
    with pytest.raises(ClientError) as refused:
        await client.node()
    assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "too-many-requests")
    node.records.readable.set()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert (await client.node()).name == "node-1"


async def test_message_that_is_too_long_is_refused(node: Node, client: Client) -> None:
    with pytest.raises(ClientError) as refused:
        await client.originate("c1", caller="x" * (1024 * 1024 + 1), callee="1002")
    assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert node.calls.originated == []


# ---- events -------------------------------------------------------------------------------------------------------


def started(node: Node, call_id: str) -> None:
    node.events.append(call_event(CallEventKind.STARTED, call_id))


async def test_watcher_gets_a_snapshot_and_then_what_happens(node: Node, client: Client) -> None:
    started(node, "c1")
    node.calls.add(*(call_view(f"c{index}", after_s=index) for index in range(150)))
    async with asyncio.timeout(10), contextlib.aclosing(client.watch_events()) as stream:
        snapshot = await anext(stream)
        assert isinstance(snapshot, event_service_pb2.Snapshot)
        assert (len(snapshot.calls), snapshot.complete, snapshot.sequence) == (150, True, 1)
        for index in range(3):
            started(node, f"n{index}")
            message = await anext(stream)
            assert isinstance(message, event_pb2.Event)
            assert (message.sequence, message.call_started.call_id) == (2 + index, f"n{index}")
        assert node.watchers == 1
    await until(lambda: node.watchers == 0)


async def test_silent_stream_is_kept_alive_by_heartbeats(node: Node) -> None:
    node.heartbeat_s = 0.02
    await node.start()
    started(node, "c1")
    async with (
        asyncio.timeout(10),
        Client(node.target, KEY) as client,
        contextlib.aclosing(client.watch_events(resume_after=1)) as stream,
    ):
        beats = [await anext(stream), await anext(stream)]
    assert all(isinstance(beat, event_service_pb2.Heartbeat) and beat.sequence == 1 for beat in beats)


async def test_watcher_resumes_behind_what_it_has_handled(node: Node, client: Client) -> None:
    for index in range(5):
        started(node, f"c{index}")
    async with asyncio.timeout(10), contextlib.aclosing(client.watch_events(resume_after=3)) as stream:
        assert [(await anext(stream)).sequence for _ in range(2)] == [4, 5]


async def test_gap_is_told_and_not_hidden(node: Node, channel: grpc.aio.Channel) -> None:
    for index in range(5):
        started(node, f"c{index}")
    node.events.gone_through = 3
    stub = event_service_pb2_grpc.EventServiceStub(channel)
    for resume_after in (2, 6):
        request = event_service_pb2.WatchEventsRequest(resume_after=resume_after)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.WatchEvents(request, metadata=AUTHORIZED, timeout=10).read()
        assert refused.value.code() is grpc.StatusCode.OUT_OF_RANGE
        assert reason_of(refused.value) == "events-gone"


async def test_client_begins_anew_with_a_snapshot_after_a_gap(node: Node, client: Client) -> None:
    for index in range(5):
        started(node, f"c{index}")
    node.events.gone_through = 3
    async with asyncio.timeout(10), contextlib.aclosing(client.watch_events(resume_after=2)) as stream:
        snapshot = await anext(stream)
        assert isinstance(snapshot, event_service_pb2.Snapshot)
        assert snapshot.sequence == 5
        started(node, "c6")
        assert (await anext(stream)).sequence == 6


async def test_client_goes_on_over_a_restart_of_the_node_without_a_gap(node: Node, client: Client) -> None:
    async with asyncio.timeout(30), contextlib.aclosing(client.watch_events()) as stream:
        await anext(stream)
        started(node, "c1")
        assert (await anext(stream)).sequence == 1
        await node.stop()
        started(node, "c2")
        waiting = asyncio.create_task(anext(stream))
        await asyncio.sleep(0.2)
        started(node, "c3")
        await node.start()
        messages = [await waiting, await anext(stream)]
        assert [message.sequence for message in messages] == [2, 3]
        assert all(isinstance(message, event_pb2.Event) for message in messages)


async def test_streams_end_as_unavailable_when_the_node_stops(node: Node, channel: grpc.aio.Channel) -> None:
    stub = event_service_pb2_grpc.EventServiceStub(channel)
    stream = stub.WatchEvents(event_service_pb2.WatchEventsRequest(), metadata=AUTHORIZED, timeout=10)
    await stream.read()
    await node.stop()
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await stream.read()
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    assert reason_of(ended.value) == "stopping"


async def test_unknown_type_of_event_is_refused(node: Node, client: Client) -> None:
    with pytest.raises(ClientError) as refused:
        await anext(client.watch_events(types=["call.exploded"]))
    assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "unknown-event-type")


async def test_no_more_watch_than_are_allowed(node: Node) -> None:
    node.max_watchers = 2
    await node.start()
    async with asyncio.timeout(10), contextlib.AsyncExitStack() as open_streams:
        client = await open_streams.enter_async_context(Client(node.target, KEY))
        streams = [client.watch_events() for _ in range(2)]
        for stream in streams:
            await open_streams.enter_async_context(contextlib.aclosing(stream))
            await anext(stream)
        with pytest.raises(ClientError) as refused:
            await anext(client.watch_events())
        assert (refused.value.code, refused.value.reason) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "too-many-watchers",
        )
        assert refused.value.retry_after_s == 10
        await streams[0].aclose()
        await until(lambda: node.watchers == 1)
        late = await open_streams.enter_async_context(contextlib.aclosing(client.watch_events()))
        assert isinstance(await anext(late), event_service_pb2.Snapshot)


async def test_watcher_that_does_not_read_is_dropped_and_delays_nobody(
    node: Node, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_border, "_ABORT_TIMEOUT_S", 0.01)
    node.write_timeout_s = 0.5
    await node.start()
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with (
        asyncio.timeout(60),
        grpc.aio.insecure_channel(node.target, options=options) as channel,
        Client(node.target, KEY) as client,
    ):
        stub = event_service_pb2_grpc.EventServiceStub(channel)
        deaf = stub.WatchEvents(event_service_pb2.WatchEventsRequest(), metadata=AUTHORIZED)
        await until(lambda: node.watchers == 1)
        stream = client.watch_events()
        await anext(stream)
        assert node.watchers == 2
        last = 0
        while node.watchers == 2:
            for _ in range(10):
                node.events.append(ErrorEvent(datetime.now(UTC), "media", "lost", "x" * 50_000))
            while last < node.events.last_sequence:
                last = (await anext(stream)).sequence
        assert (await client.node()).name == "node-1"
        await until(lambda: node.requests("WatchEvents", "RESOURCE_EXHAUSTED") == 1)
        # Long enough for the node to leave it behind with its error.
        await asyncio.sleep(0.2)
        with pytest.raises(grpc.aio.AioRpcError) as dropped:
            await read_all(deaf)
        assert dropped.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert reason_of(dropped.value) == "watcher-too-slow"
        await stream.aclose()
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


# ---- the client ---------------------------------------------------------------------------------------------------


async def test_verb_is_repeated_while_the_node_restarts(node: Node, client: Client) -> None:
    await client.node()
    await node.stop()
    asking = asyncio.create_task(client.originate("c1", caller="1001", callee="1002"))
    await asyncio.sleep(0.3)
    await node.start()
    assert (await asking).call_id == "c1"


async def test_node_that_is_not_there_is_an_error_in_time() -> None:
    async with asyncio.timeout(20), Client(f"{HOST}:{next(PORTS)}", KEY, timeout_s=5.0) as client:
        with pytest.raises(ClientError) as failed:
            await client.node()
        assert (failed.value.code, failed.value.reason) == (grpc.StatusCode.UNAVAILABLE, "")
        with pytest.raises(ClientError) as failed:
            await anext(client.watch_events())
        assert failed.value.code is grpc.StatusCode.UNAVAILABLE


async def test_wrong_key_is_not_tried_again(node: Node) -> None:
    await node.start()
    async with asyncio.timeout(10), Client(node.target, "x" * 20) as client:
        with pytest.raises(ClientError) as refused:
            await client.node()
        assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.UNAUTHENTICATED, "wrong-api-key")
        with pytest.raises(ClientError, match="wrong-api-key"):
            await anext(client.watch_events())
    assert node.requests("GetNode", "UNAUTHENTICATED") == 1


async def test_node_is_asked_with_bare_stubs(node: Node, channel: grpc.aio.Channel) -> None:
    stub = node_service_pb2_grpc.NodeServiceStub(channel)
    answer = await stub.GetNode(node_service_pb2.GetNodeRequest(), metadata=AUTHORIZED, timeout=10)
    assert answer.node.max_calls == 9


# ---- what the page shows ------------------------------------------------------------------------------------------

EXAMPLES = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs" / "api.md").read_text(), re.DOTALL)


@contextlib.asynccontextmanager
async def example(node: Node, text: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A program of docs/api.md, as a process of its own."""
    environment = {**os.environ, "SIPPBX_TARGET": node.target, "SIPPBX_API_KEY": KEY}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-W", "error", "-c", text, env=environment, cwd=Path(__file__).parents[2],
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_example_with_the_client_follows_its_call_to_the_end(node: Node) -> None:
    await node.start()
    async with asyncio.timeout(30), example(node, EXAMPLES[0]) as program:
        await until(lambda: node.calls.originated)
        for kind in (CallEventKind.RINGING, CallEventKind.ANSWERED, CallEventKind.ENDED):
            node.events.append(call_event(kind, "another-call", leg=LegName.CALLEE))
            node.events.append(call_event(kind, "order-4711", leg=LegName.CALLEE))
        out, err = await program.communicate()
    assert (out.decode().splitlines(), err.decode()) == (["rings", "talks", "ended after 0:00:05"], "")


async def test_example_with_bare_stubs_starts_a_call_and_lists_it(node: Node) -> None:
    await node.start()
    async with asyncio.timeout(30), example(node, EXAMPLES[1]) as program:
        out, err = await program.communicate()
    assert (out.decode().splitlines(), err.decode()) == (["order-4712", "order-4712 1001 1002"], "")
