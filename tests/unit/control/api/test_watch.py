"""What a watcher is sent, one message after the other."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from control.api.errors import ApiError, ApiErrorKind
from control.api.grpc_border import client_name
from control.api.watch import EventServicer
from control.metrics import ControlMetrics
from control.pbx.records import CallEventKind
from control.store.database import StoreError
from sippbx.control.v1 import event_service_pb2
from tests.harness.control_node import ControlNode, call_view
from tests.harness.records import call_event

Response = event_service_pb2.WatchEventsResponse


class HangingUpError(Exception):
    """The client has what it wanted."""


class Client:
    """A client that reads `enough` messages and hangs up; `between` is done after the first."""

    def __init__(self, enough: int, between: Any = None) -> None:
        self.enough = enough
        self.between = between
        self.messages: list[Response] = []

    async def write(self, message: Response) -> None:
        self.messages.append(message)
        if len(self.messages) == 1 and self.between is not None:
            self.between()
        if len(self.messages) == self.enough:
            raise HangingUpError


@pytest.fixture
async def node() -> ControlNode:
    return ControlNode()


async def watch(
    node: ControlNode,
    enough: int,
    *,
    resume_after: int | None = None,
    types: Sequence[str] = (),
    between: Any = None,
    heartbeat_s: float = 100.0,
    metrics: ControlMetrics | None = None,
) -> list[Response]:
    servicer = EventServicer(node.service, metrics or ControlMetrics(), max_watchers=1, heartbeat_s=heartbeat_s)
    client: Any = Client(enough, between)
    request = event_service_pb2.WatchEventsRequest(resume_after=resume_after, types=types)
    with pytest.raises(HangingUpError):
        await servicer.WatchEvents(request, client)
    return list(client.messages)


def append(node: ControlNode, *kinds: CallEventKind) -> None:
    for kind in kinds:
        node.events.append(call_event(kind))


async def test_stream_begins_with_the_calls_that_run_and_goes_on_with_events(node: ControlNode) -> None:
    append(node, CallEventKind.STARTED)
    node.calls.add(call_view("c1"))
    first, second = await watch(node, 2, between=lambda: append(node, CallEventKind.ANSWERED))
    assert [call.call_id for call in first.snapshot.calls] == ["c1"]
    assert first.snapshot.complete
    assert first.snapshot.sequence == 1
    assert second.event.WhichOneof("payload") == "call_answered"
    assert (second.event.sequence, second.event.node) == (2, "node-1")


async def test_event_that_comes_while_the_calls_are_listed_follows_the_snapshot(node: ControlNode) -> None:
    listed = node.calls.calls

    def calls() -> list[Any]:
        append(node, CallEventKind.STARTED)
        return listed()

    node.calls.calls = calls  # type: ignore[method-assign]
    first, second = await watch(node, 2)
    assert first.snapshot.sequence == 0
    assert second.event.sequence == 1


async def test_large_snapshot_comes_in_parts(node: ControlNode) -> None:
    node.calls.add(*(call_view(f"c{index}") for index in range(250)))
    parts = [message.snapshot for message in await watch(node, 3)]
    assert [len(part.calls) for part in parts] == [100, 100, 50]
    assert [part.complete for part in parts] == [False, False, True]
    assert len({call.call_id for part in parts for call in part.calls}) == 250


async def test_snapshot_of_calls_with_long_names_comes_in_smaller_parts(node: ControlNode) -> None:
    node.calls.add(*(call_view(f"c{index}", caller="x" * 60_000) for index in range(50)))
    parts = [message.snapshot for message in await watch(node, 3)]
    assert sum(len(part.calls) for part in parts) == 50
    assert all(part.ByteSize() < 1024 * 1024 + 1000 for part in parts)


async def test_resumed_stream_has_no_snapshot_and_no_gap(node: ControlNode) -> None:
    append(node, *[CallEventKind.STARTED] * 600)
    node.calls.add(call_view("c1"))
    messages = await watch(node, 598, resume_after=2)
    assert [message.event.sequence for message in messages] == list(range(3, 601))


async def test_only_events_of_the_wanted_types_come(node: ControlNode) -> None:
    append(node, CallEventKind.STARTED, CallEventKind.RINGING, CallEventKind.ENDED, CallEventKind.STARTED)
    node.events.kept[1] = node.events.append(call_event(CallEventKind.ANSWERED))
    node.events.kept.pop()
    messages = await watch(node, 2, resume_after=0, types=["call.started"])
    assert [message.event.sequence for message in messages] == [1, 4]


async def test_unknown_type_is_refused_with_those_that_there_are(node: ControlNode) -> None:
    servicer = EventServicer(node.service, ControlMetrics(), max_watchers=1)
    context: Any = Client(1)
    with pytest.raises(ApiError) as refused:
        await servicer.WatchEvents(event_service_pb2.WatchEventsRequest(types=["call.ended", "call.x"]), context)
    assert (refused.value.kind, refused.value.reason) == (ApiErrorKind.INVALID_ARGUMENT, "unknown-event-type")
    assert "'call.x'" in refused.value.detail
    assert "call.ended" in refused.value.detail


async def test_silence_is_broken_by_a_heartbeat_with_the_place_to_resume_at(node: ControlNode) -> None:
    append(node, CallEventKind.STARTED, CallEventKind.ENDED)
    messages = await watch(node, 2, resume_after=0, types=["call.started"], heartbeat_s=0.0)
    assert messages[0].event.sequence == 1
    assert messages[1].heartbeat.sequence == 2
    assert messages[1].heartbeat.HasField("time")


@pytest.mark.parametrize("resume_after", [4, 99])
async def test_resuming_where_nothing_is_kept_is_out_of_range(node: ControlNode, resume_after: int) -> None:
    append(node, *[CallEventKind.STARTED] * 10)
    node.events.gone_through = 5
    servicer = EventServicer(node.service, ControlMetrics(), max_watchers=1)
    context: Any = Client(1)
    with pytest.raises(ApiError) as refused:
        await servicer.WatchEvents(event_service_pb2.WatchEventsRequest(resume_after=resume_after), context)
    assert (refused.value.kind, refused.value.reason) == (ApiErrorKind.OUT_OF_RANGE, "events-gone")
    assert "snapshot" in refused.value.detail


async def test_store_that_cannot_be_read_ends_the_stream_as_unavailable(node: ControlNode) -> None:
    async def fail(sequence: int, limit: int = 256) -> Any:
        raise StoreError("the disk is gone")

    node.events.read_after = fail  # type: ignore[method-assign]
    servicer = EventServicer(node.service, ControlMetrics(), max_watchers=1)
    context: Any = Client(9)
    with pytest.raises(ApiError) as refused:
        await servicer.WatchEvents(event_service_pb2.WatchEventsRequest(), context)
    assert (refused.value.kind, refused.value.reason) == (ApiErrorKind.UNAVAILABLE, "store-unavailable")


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"call_id": 1}'])
async def test_event_that_cannot_be_read_is_counted_and_stops_nobody(node: ControlNode, data: bytes) -> None:
    node.events.append(call_event(CallEventKind.STARTED), data=data)
    append(node, CallEventKind.ANSWERED)
    metrics = ControlMetrics()
    [message] = await watch(node, 1, resume_after=0, metrics=metrics)
    assert message.event.sequence == 2
    labels = {"component": "api", "kind": "event_unreadable"}
    assert metrics.registry.get_sample_value("sip_pbx_errors_total", labels) == 1


async def test_client_that_does_not_read_loses_its_stream(node: ControlNode) -> None:
    class Deaf:
        async def write(self, message: Response) -> None:
            await asyncio.Event().wait()

        def peer(self) -> str:
            return "ipv4:192.0.2.1:1"

    servicer = EventServicer(node.service, ControlMetrics(), max_watchers=1, write_timeout_s=0.0)
    deaf: Any = Deaf()
    client_name.set("dialler")
    with pytest.raises(ApiError) as refused:
        await servicer.WatchEvents(event_service_pb2.WatchEventsRequest(), deaf)
    assert (refused.value.kind, refused.value.reason) == (ApiErrorKind.RESOURCE_EXHAUSTED, "watcher-too-slow")


async def test_watchers_are_counted_while_they_watch(node: ControlNode) -> None:
    metrics = ControlMetrics()
    counts: list[float | None] = []

    def count() -> None:
        counts.append(metrics.registry.get_sample_value("sip_pbx_watch_clients"))

    append(node, CallEventKind.STARTED)
    await watch(node, 1, resume_after=0, between=count, metrics=metrics)
    count()
    assert counts == [1, 0]
