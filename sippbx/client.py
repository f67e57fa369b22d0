"""A typed asyncio client of the control API (sippbx.control.v1).

    async with Client("pbx.example:50051", key) as client:
        await client.originate("order-4711", caller="1001", callee="1002")
        async for message in client.watch_events():
            ...

Every verb may be repeated, so the client repeats one by itself when the connection fails. What the node says, no matter
how unwelcome, is an answer and not repeated. docs/api.md explains services, errors and events.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from sippbx.control.v1 import (
    call_service_pb2,
    call_service_pb2_grpc,
    cdr_service_pb2,
    cdr_service_pb2_grpc,
    event_service_pb2,
    event_service_pb2_grpc,
    node_service_pb2,
    node_service_pb2_grpc,
    registration_service_pb2,
    registration_service_pb2_grpc,
)
from sippbx.events.v1 import event_pb2, record_pb2

TIMEOUT_S = 10.0
"""For one verb, repetitions included."""
SILENCE_S = 30.0
"""A stream of events that is silent for so long is lost: the node sends a heartbeat every ten seconds."""

_ATTEMPTS = 5
_BACKOFF_FIRST_S = 0.1
_BACKOFF_MOST_S = 5.0
_DOMAIN = "sippbx"
_EVENTS_GONE = "events-gone"
_TOO_SLOW = "watcher-too-slow"
_CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    # With a pool of its own, a new channel tries at once instead of sharing another's back-off.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
]

WatchMessage = event_service_pb2.Snapshot | event_pb2.Event | event_service_pb2.Heartbeat
Response = TypeVar("Response")
Item = TypeVar("Item")


class ClientError(Exception):
    """A verb failed.

    `reason` is the node's, in kebab-case (docs/api.md), and empty when the node did not answer; `detail` is for people.
    """

    def __init__(self, code: grpc.StatusCode, reason: str, detail: str, retry_after_s: float | None = None) -> None:
        super().__init__(f"{reason or code.name.lower().replace('_', '-')}: {detail}")
        self.code = code
        self.reason = reason
        self.detail = detail
        self.retry_after_s = retry_after_s


class Client:
    """One node. `target` is host:port, `tls` what its certificate is checked with; without it nothing is encrypted.

    All methods raise `ClientError`.
    """

    def __init__(
        self, target: str, key: str, *, tls: grpc.ChannelCredentials | None = None, timeout_s: float = TIMEOUT_S
    ) -> None:
        self._timeout_s = timeout_s
        self._metadata = (("authorization", f"Bearer {key}"),)
        if tls is None:
            self._channel = grpc.aio.insecure_channel(target, options=_CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(target, tls, options=_CHANNEL_OPTIONS)
        self._calls = call_service_pb2_grpc.CallServiceStub(self._channel)
        self._registrations = registration_service_pb2_grpc.RegistrationServiceStub(self._channel)
        self._records = cdr_service_pb2_grpc.CdrServiceStub(self._channel)
        self._node = node_service_pb2_grpc.NodeServiceStub(self._channel)
        self._events = event_service_pb2_grpc.EventServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Disconnect; what is under way fails."""
        await self._channel.close()

    async def originate(self, call_id: str, *, caller: str, callee: str) -> call_service_pb2.Call:
        """Start a call: the caller's phone rings first, and the callee's once the caller has answered.

        The same id with the same parties gives the same call, running or ended.
        """
        request = call_service_pb2.OriginateCallRequest(call_id=call_id, caller=caller, callee=callee)
        return (await self._ask(self._calls.OriginateCall, request)).call

    async def get_call(self, call_id: str) -> call_service_pb2.Call:
        """One call, running or ended."""
        return (await self._ask(self._calls.GetCall, call_service_pb2.GetCallRequest(call_id=call_id))).call

    async def hang_up(self, call_id: str) -> call_service_pb2.Call:
        """End a call, whatever it is doing."""
        return (await self._ask(self._calls.HangupCall, call_service_pb2.HangupCallRequest(call_id=call_id))).call

    async def calls(self, *, page_size: int = 0) -> AsyncIterator[call_service_pb2.Call]:
        """The calls that have not ended, the oldest first."""
        token = ""
        while True:
            request = call_service_pb2.ListCallsRequest(page_size=page_size, page_token=token)
            page = await self._ask(self._calls.ListCalls, request)
            for call in page.calls:
                yield call
            if not (token := page.next_page_token):
                return

    async def registrations(
        self, user: str = "", *, page_size: int = 0
    ) -> AsyncIterator[registration_service_pb2.Registration]:
        """The phones that are registered: of one user, or of all."""
        token = ""
        while True:
            request = registration_service_pb2.ListRegistrationsRequest(
                user=user, page_size=page_size, page_token=token
            )
            page = await self._ask(self._registrations.ListRegistrations, request)
            for registration in page.registrations:
                yield registration
            if not (token := page.next_page_token):
                return

    async def records(self, *, page_size: int = 0) -> AsyncIterator[record_pb2.CallRecord]:
        """The call detail records, the newest first; leave off when there are enough."""
        token = ""
        while True:
            request = cdr_service_pb2.ListCallRecordsRequest(page_size=page_size, page_token=token)
            page = await self._ask(self._records.ListCallRecords, request)
            for record in page.records:
                yield record
            if not (token := page.next_page_token):
                return

    async def node(self) -> node_service_pb2.Node:
        """How the node is."""
        return (await self._ask(self._node.GetNode, node_service_pb2.GetNodeRequest())).node

    async def drain(self) -> node_service_pb2.Node:
        """Let the node take no new calls from now on."""
        return (await self._ask(self._node.Drain, node_service_pb2.DrainRequest())).node

    async def watch_events(
        self, *, resume_after: int | None = None, types: Sequence[str] = ()
    ) -> AsyncGenerator[WatchMessage]:
        """What happens on the node, for as long as you listen.

        Without `resume_after` it begins with one Snapshot of all calls that run. Then come the events of `types`, or of
        all types, in order and each at least once, and Heartbeats in between. To continue later, keep the `sequence` of
        the last message that you handled. A lost connection is resumed behind the message before the one that you wait
        for; when the node no longer keeps the events since, another Snapshot comes in their place.
        """
        sequence = resume_after
        backoff = _Backoff()
        connected = False
        while True:
            request = event_service_pb2.WatchEventsRequest(resume_after=sequence, types=types)
            try:
                async with contextlib.aclosing(self._stream(request)) as stream:
                    async for message in stream:
                        connected = True
                        backoff.reset()
                        sequence = message.sequence
                        yield message
            except ClientError as error:
                if error.reason == _EVENTS_GONE and sequence is not None:
                    sequence = None
                    continue
                if error.code is not grpc.StatusCode.UNAVAILABLE and error.reason != _TOO_SLOW:
                    raise
                # Who has never got through may have the wrong address.
                if not connected and backoff.waits >= _ATTEMPTS - 1:
                    raise
            await backoff.wait()

    async def _stream(self, request: event_service_pb2.WatchEventsRequest) -> AsyncGenerator[WatchMessage]:
        """The messages of one stream, the snapshot as one.

        Raises:
            ClientError: the stream was lost or refused.
        """
        call = self._events.WatchEvents(request, metadata=self._metadata)
        calls: list[call_service_pb2.Call] = []
        try:
            while True:
                async with asyncio.timeout(SILENCE_S):
                    response = await call.read()
                if not isinstance(response, event_service_pb2.WatchEventsResponse):
                    raise ClientError(grpc.StatusCode.UNAVAILABLE, "", "the node ended the stream")
                match response.WhichOneof("message"):
                    case "snapshot":
                        calls += response.snapshot.calls
                        if response.snapshot.complete:
                            yield event_service_pb2.Snapshot(
                                calls=calls, complete=True, sequence=response.snapshot.sequence
                            )
                            calls = []
                    case "event":
                        yield response.event
                    case "heartbeat":
                        yield response.heartbeat
        except TimeoutError:
            raise ClientError(grpc.StatusCode.UNAVAILABLE, "", f"nothing was heard for {SILENCE_S:g} s") from None
        except grpc.aio.AioRpcError as error:
            raise _client_error(error) from error
        finally:
            call.cancel()

    async def _ask(self, verb: Callable[..., Awaitable[Response]], request: object) -> Response:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout_s
        backoff = _Backoff()
        unavailable: ClientError | None = None
        while True:
            try:
                return await verb(request, timeout=max(0.0, deadline - loop.time()), metadata=self._metadata)
            except grpc.aio.AioRpcError as error:
                failure = _client_error(error)
                if failure.code is grpc.StatusCode.DEADLINE_EXCEEDED and not failure.reason and unavailable is not None:
                    # That time is up says less than what it was spent on.
                    raise unavailable from error
                if failure.code is not grpc.StatusCode.UNAVAILABLE or failure.reason or backoff.waits >= _ATTEMPTS - 1:
                    raise failure from error
                unavailable = failure
            await backoff.wait()


class _Backoff:
    """Waits twice as long each time, up to a bound, and never quite as long as others do."""

    def __init__(self) -> None:
        self.waits = 0

    def reset(self) -> None:
        self.waits = 0

    async def wait(self) -> None:
        span_s = min(_BACKOFF_MOST_S, _BACKOFF_FIRST_S * 2.0 ** min(self.waits, 10))
        self.waits += 1
        await asyncio.sleep(span_s * random.uniform(0.5, 1.0))  # noqa: S311 - spread, not secrecy


def _client_error(error: grpc.aio.AioRpcError) -> ClientError:
    reason, retry_after_s = "", None
    # Whatever stands between the node and us may have made the error, details and all.
    with contextlib.suppress(ValueError, DecodeError):
        status = rpc_status.from_call(error)  # type: ignore[arg-type]  # it has what of a call is asked for
        for detail in () if status is None else status.details:
            info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            if detail.Unpack(info) and info.domain == _DOMAIN:
                reason = info.reason
            elif detail.Unpack(retry):
                retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return ClientError(error.code(), reason, error.details() or "", retry_after_s)
