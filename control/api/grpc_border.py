"""The border of the gRPC API: every request passes it on its way in, and every error on its way out.

Who has no API key gets no further, save to the health service. A request has a deadline, whatever its client wants, and
no more than a bounded number are worked on at once. Errors carry a google.rpc.ErrorInfo with the reason, and a
google.rpc.RetryInfo where it is known when another try makes sense.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import structlog
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_health.v1.health import SERVICE_NAME as HEALTH
from grpc_status import rpc_status

from control.api.auth import ApiKeys
from control.api.errors import ApiError, ApiErrorKind
from control.metrics import ControlMetrics

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]
else:
    # Generic for type checkers alone.
    Handler = grpc.RpcMethodHandler

DOMAIN = "sippbx"
OTHER = "other"
REQUEST_TIMEOUT_S = 10.0
MAX_REQUESTS = 256
MAX_HEALTH_WATCHERS = 100

_ABORT_TIMEOUT_S = 1.0
_ERROR_ID_BYTES = 8

Context = grpc.aio.ServicerContext[Any, Any]
Work = Callable[[], Awaitable[Any]]

client_name: ContextVar[str] = ContextVar("client_name")
"""The name of the API key of the request that is worked on."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Failure:
    """What a client is told instead of an answer."""

    code: grpc.StatusCode
    reason: str
    detail: str
    retry_after_s: int | None = None


class Border(grpc.aio.ServerInterceptor):
    """Wraps the handlers of all methods, which raise `ApiError` and know nothing of keys, limits, codes and metrics."""

    def __init__(self, keys: ApiKeys, metrics: ControlMetrics, *, request_timeout_s: float = REQUEST_TIMEOUT_S) -> None:
        self._keys = keys
        self._metrics = metrics
        self._request_timeout_s = request_timeout_s
        self._requests = 0
        self._health_watchers = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Give the handler that checks first and answers for errors."""
        handler = await continuation(handler_call_details)
        service, _, method = handler_call_details.method.lstrip("/").rpartition("/")
        if service == HEALTH and handler is not None:
            return self._health(handler)
        label = method if handler is not None else OTHER
        try:
            client = self._keys.client_of(_authorization(handler_call_details))
        except ApiError as error:
            return self._refusal(label, _failure_of(error))
        if handler is None:
            self._metrics.grpc_request(OTHER, grpc.StatusCode.UNIMPLEMENTED.name, 0.0)
            return None
        return self._guarded(handler, label, client)

    def _health(self, handler: Handler) -> Handler:
        """Free for all, and so bounded where it holds something."""
        if handler.unary_stream is None:
            return handler
        watch: Any = handler.unary_stream

        async def serve(request: Any, context: Context) -> None:
            if self._health_watchers >= MAX_HEALTH_WATCHERS:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many clients watch the health")
            self._health_watchers += 1
            try:
                await watch(request, context)
            finally:
                self._health_watchers -= 1

        return grpc.unary_stream_rpc_method_handler(serve, handler.request_deserializer, handler.response_serializer)

    def _refusal(self, label: str, failure: _Failure) -> Handler:
        async def refuse(_requests: Any, context: Context) -> None:
            self._metrics.grpc_request(label, failure.code.name, 0.0)
            await _abort(context, failure)

        # As if a stream of requests came, whatever comes: then nothing is waited for, nor read.
        return grpc.stream_unary_rpc_method_handler(refuse)

    def _guarded(self, handler: Handler, label: str, client: str) -> Handler:
        serializers = handler.request_deserializer, handler.response_serializer
        if handler.unary_stream is not None:
            stream: Any = handler.unary_stream

            async def serve_stream(request: Any, context: Context) -> None:
                client_name.set(client)
                await self._answer(label, context, lambda: stream(request, context))

            return grpc.unary_stream_rpc_method_handler(serve_stream, *serializers)
        unary: Any = handler.unary_unary

        async def serve(request: Any, context: Context) -> Any:
            client_name.set(client)
            return await self._answer(label, context, lambda: self._in_time(lambda: unary(request, context)))

        return grpc.unary_unary_rpc_method_handler(serve, *serializers)

    async def _in_time(self, work: Work) -> Any:
        if self._requests >= MAX_REQUESTS:
            detail = f"{MAX_REQUESTS} requests are worked on already"
            raise ApiError(ApiErrorKind.RESOURCE_EXHAUSTED, "too-many-requests", detail, retry_after_s=1)
        self._requests += 1
        try:
            async with asyncio.timeout(self._request_timeout_s):
                return await work()
        finally:
            self._requests -= 1

    async def _answer(self, label: str, context: Context, work: Work) -> Any:
        begun = time.monotonic()
        try:
            answer = await work()
        except asyncio.CancelledError:
            self._observe(label, grpc.StatusCode.CANCELLED, begun)
            raise
        except ApiError as error:
            failure = _failure_of(error)
        except TimeoutError:
            detail = f"there was no result within {self._request_timeout_s:g} s; repeat it to learn what became of it"
            failure = _Failure(grpc.StatusCode.DEADLINE_EXCEEDED, "timeout", detail)
        except Exception:  # noqa: BLE001 - the boundary
            # The boundary between a request and the rest of the process.
            error_id = secrets.token_hex(_ERROR_ID_BYTES)
            self._metrics.error("api", "internal")
            _log.exception("api.request_failed", error_id=error_id, method=label)
            detail = f"the node failed on this request; its log says more about error {error_id}"
            failure = _Failure(grpc.StatusCode.INTERNAL, "internal-error", detail)
        else:
            self._observe(label, grpc.StatusCode.OK, begun)
            return answer
        self._observe(label, failure.code, begun)
        await _abort(context, failure)
        return None

    def _observe(self, label: str, code: grpc.StatusCode, begun: float) -> None:
        self._metrics.grpc_request(label, code.name, time.monotonic() - begun)


def _authorization(details: grpc.HandlerCallDetails) -> str | None:
    for key, value in details.invocation_metadata or ():
        if key == "authorization":
            return value if isinstance(value, str) else None
    return None


def _failure_of(error: ApiError) -> _Failure:
    return _Failure(grpc.StatusCode[error.kind.name], error.reason, error.detail, error.retry_after_s)


async def _abort(context: Context, failure: _Failure) -> None:
    """End the RPC with an error.

    A client that reads nothing does not read this either; then the error waits for it without us.
    """
    # It may quote what came from the wire (PEP 383).
    message = failure.detail.encode("utf-8", "replace").decode()
    status = status_pb2.Status(code=failure.code.value[0], message=message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=failure.reason, domain=DOMAIN))
    if failure.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=failure.retry_after_s))
        status.details.add().Pack(retry)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_ABORT_TIMEOUT_S):
            await context.abort_with_status(rpc_status.to_status(status))
