"""EventService of sippbx.control.v1: a snapshot of the calls, and then every event.

A watcher has a place in the order of events and no queue: it is sent what is behind its place as fast as it reads. One
that does not read loses its stream, and nothing else waits for it.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator
from functools import lru_cache
from typing import Any

import grpc.aio
import structlog
from google.protobuf.timestamp_pb2 import Timestamp

from control.api import wire
from control.api.errors import ApiError, ApiErrorKind
from control.api.grpc_border import client_name
from control.api.grpc_services import fitting
from control.api.service import ControlService
from control.events import codec
from control.metrics import ControlMetrics
from control.pbx.records import EVENT_TYPES
from control.store.database import StoreError
from control.store.events import EventsGoneError, StoredEvent
from sippbx.control.v1 import event_service_pb2, event_service_pb2_grpc

HEARTBEAT_S = 10.0
WRITE_TIMEOUT_S = 10.0
MAX_SNAPSHOT_CALLS = 100
RETRY_AFTER_S = 10

_MESSAGES_KEPT = 1024

Context = grpc.aio.ServicerContext[Any, Any]
Response = event_service_pb2.WatchEventsResponse

_log = structlog.get_logger(__name__)


class EventServicer(event_service_pb2_grpc.EventServiceServicer):
    """Serves at most `max_watchers` at once; `heartbeat_s` is how long a stream may be silent."""

    def __init__(
        self,
        service: ControlService,
        metrics: ControlMetrics,
        *,
        max_watchers: int,
        heartbeat_s: float = HEARTBEAT_S,
        write_timeout_s: float = WRITE_TIMEOUT_S,
    ) -> None:
        self._service = service
        self._metrics = metrics
        self._max_watchers = max_watchers
        self._heartbeat_s = heartbeat_s
        self._write_timeout_s = write_timeout_s
        self._node_name = service.node().name
        self._watchers: set[asyncio.Timeout] = set()
        self._stopping = False
        # All who watch are sent the same messages, most of them at about the same time.
        self._message_of = lru_cache(_MESSAGES_KEPT)(self._message)
        metrics.watch_watchers(lambda: len(self._watchers))

    def stop(self) -> None:
        """End all streams, and take no more."""
        self._stopping = True
        for stop in self._watchers:
            stop.reschedule(asyncio.get_running_loop().time())

    # A generator could not tell how long its client takes to read.
    async def WatchEvents(  # type: ignore[override]  # noqa: N802 - the contract's name
        self, request: event_service_pb2.WatchEventsRequest, context: Context
    ) -> None:
        """Send events for as long as the client reads them."""
        types = frozenset(request.types)
        for unknown in types.difference(EVENT_TYPES):
            detail = f"there is no type of event {unknown[:64]!r}; there are {', '.join(EVENT_TYPES)}"
            raise ApiError(ApiErrorKind.INVALID_ARGUMENT, "unknown-event-type", detail)
        if self._stopping:
            raise _stopped()
        if len(self._watchers) >= self._max_watchers:
            detail = f"{self._max_watchers} clients watch already, as many as api.grpc.max_watchers allows"
            raise ApiError(ApiErrorKind.RESOURCE_EXHAUSTED, "too-many-watchers", detail, RETRY_AFTER_S)
        try:
            async with asyncio.timeout(None) as stop:
                self._watchers.add(stop)
                try:
                    await self._watch(request, types, context)
                finally:
                    self._watchers.discard(stop)
        except TimeoutError:
            raise _stopped() from None
        except EventsGoneError as error:
            detail = f"{error}; begin with a snapshot, without resume_after"
            raise ApiError(ApiErrorKind.OUT_OF_RANGE, "events-gone", detail) from None
        except StoreError as error:
            detail = f"the store cannot be read now: {error}"
            raise ApiError(ApiErrorKind.UNAVAILABLE, "store-unavailable", detail) from error

    async def _watch(
        self, request: event_service_pb2.WatchEventsRequest, types: frozenset[str], context: Context
    ) -> None:
        if request.HasField("resume_after"):
            sequence = request.resume_after
        else:
            # Before the calls: what happens in between comes twice rather than never.
            sequence = self._service.events.last_sequence
            for snapshot in self._snapshots(sequence):
                await self._write(context, snapshot)
        async with contextlib.aclosing(self._tail(sequence, types)) as tail:
            async for message in tail:
                await self._write(context, message)

    def _snapshots(self, sequence: int) -> Iterator[Response]:
        """The calls that run now, in as many messages as they need, at least one."""
        calls = [wire.call_to_wire(call) for call in self._service.running_calls()]
        while True:
            count = fitting(calls, MAX_SNAPSHOT_CALLS)
            some, calls = calls[:count], calls[count:]
            snapshot = event_service_pb2.Snapshot(calls=some, complete=not calls, sequence=sequence)
            yield Response(snapshot=snapshot)
            if not calls:
                return

    async def _tail(self, sequence: int, types: frozenset[str]) -> AsyncGenerator[Response]:
        """Events behind `sequence`, with heartbeats in between."""
        events = self._service.events
        loop = asyncio.get_running_loop()
        silent_until = loop.time() + self._heartbeat_s
        while True:
            for event in await events.read_after(sequence):
                sequence = event.sequence
                if (not types or event.type in types) and (message := self._message_of(event)) is not None:
                    yield message
                    silent_until = loop.time() + self._heartbeat_s
            if loop.time() >= silent_until:
                yield _heartbeat(sequence)
                silent_until = loop.time() + self._heartbeat_s
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(silent_until):
                    await events.wait_beyond(sequence)

    def _message(self, stored: StoredEvent) -> Response | None:
        try:
            event = codec.decode(stored.type, stored.at, stored.data)
            return Response(event=wire.event_to_wire(stored, event, self._node_name))
        except (KeyError, TypeError, ValueError):
            # A file that another version has written: watchers must not be stuck before such an event.
            self._metrics.error("api", "event_unreadable")
            _log.exception("api.event_unreadable", sequence=stored.sequence, type=stored.type)
            return None

    async def _write(self, context: Context, message: Response) -> None:
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await context.write(message)
        except TimeoutError:
            _log.warning("api.watcher_dropped", client=client_name.get(), peer=context.peer())
            detail = f"nothing was read for {self._write_timeout_s:g} s; resume behind the last event that was handled"
            raise ApiError(ApiErrorKind.RESOURCE_EXHAUSTED, "watcher-too-slow", detail) from None


def _heartbeat(sequence: int) -> Response:
    now = Timestamp()
    now.GetCurrentTime()
    return Response(heartbeat=event_service_pb2.Heartbeat(sequence=sequence, time=now))


def _stopped() -> ApiError:
    return ApiError(ApiErrorKind.UNAVAILABLE, "stopping", "the node stops", RETRY_AFTER_S)
