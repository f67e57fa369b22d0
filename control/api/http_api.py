"""The HTTP API: JSON for programs that would rather not speak gRPC. Errors are problem details (control.api.problem).

    GET   /healthz                     200 "ok", or 503 with the reasons for not taking calls, one a line; needs no key
    GET   /v1/calls                    calls that have not ended, the oldest first; page_size, page_token
    GET   /v1/calls/{call_id}          one call, running or ended
    PUT   /v1/calls/{call_id}          starts a call between {"caller": .., "callee": ..}: 201, or 200 if it is known
    POST  /v1/calls/{call_id}/hangup   ends a call
    GET   /v1/registrations            phones that are registered; user, page_size, page_token
    GET   /v1/cdrs                     call detail records, the newest first; page_size, page_token
    GET   /v1/node                     how the node is
    POST  /v1/node/drain               no new calls from now on

Every other path needs `Authorization: Bearer KEY`, also where there is nothing. A request has `request_timeout_s` to
arrive and be answered, and as long again to be read by its client; a connection may be idle for as long. Everything
that a client can make the node hold is bounded: connections, headers, bodies, queries.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence

import structlog
from aiohttp import hdrs, web

from control.api.auth import ApiKeys
from control.api.documents import (
    call_document,
    dump,
    node_document,
    page_document,
    registration_document,
)
from control.api.errors import ApiBindError, ApiError, ApiErrorKind
from control.api.http_connection import Connection, Refusal, tls_context
from control.api.problem import ERROR_PREFIX, Problem, of_api_error, of_http_exception
from control.api.requests import JSON, PAGE_KEYS, Nothing, OriginateBody, body_of, page_of, query_of
from control.api.service import ControlService
from control.events.cdr import cdr_document
from control.metrics import ControlMetrics
from control.settings.sections import ApiSettings

HEALTH_PATH = "/healthz"
MAX_CONNECTIONS = 1000
STOP_TIMEOUT_S = 2.0

OTHER = "other"
METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})

_ERROR_ID_BYTES = 8
_CLIENT = web.RequestKey("client", str)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_log = structlog.get_logger(__name__)


class HttpApi:
    """Serves the control service over HTTP, or HTTPS where there is a certificate.

    `unready` gives the reasons for not taking calls, none when they are taken.
    """

    def __init__(
        self,
        settings: ApiSettings,
        service: ControlService,
        keys: ApiKeys,
        metrics: ControlMetrics,
        unready: Callable[[], Sequence[str]],
    ) -> None:
        self._http = settings.http
        self._tls = settings.tls
        self._service = service
        self._keys = keys
        self._metrics = metrics
        self._unready = unready
        self._runner: web.AppRunner | None = None
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        """The bound port, which differs from the wanted one when that was 0; 0 while stopped."""
        return int(self._server.sockets[0].getsockname()[1]) if self._server and self._server.sockets else 0

    async def start(self) -> None:
        """Bind and serve.

        Raises:
            ApiBindError: the port cannot be bound, or the certificate not be used.
        """
        context = None if self._tls is None else tls_context(self._tls)
        application = web.Application(middlewares=[self._serve], client_max_size=self._http.max_body_bytes)
        application.add_routes(
            [
                web.get(HEALTH_PATH, self._health),
                web.get("/v1/calls", self._list_calls),
                web.get("/v1/calls/{call_id}", self._get_call),
                web.put("/v1/calls/{call_id}", self._originate_call),
                web.post("/v1/calls/{call_id}/hangup", self._hang_up_call),
                web.get("/v1/registrations", self._list_registrations),
                web.get("/v1/cdrs", self._list_records),
                web.get("/v1/node", self._get_node),
                web.post("/v1/node/drain", self._drain),
            ]
        )
        runner = web.AppRunner(application, handle_signals=False, shutdown_timeout=STOP_TIMEOUT_S)
        await runner.setup()
        timeout_s = self._http.request_timeout_s
        try:
            self._server = await asyncio.get_running_loop().create_server(
                lambda: self._connection(runner),
                self._http.bind,
                self._http.port,
                ssl=context,
                ssl_handshake_timeout=timeout_s if context else None,
                ssl_shutdown_timeout=timeout_s if context else None,
                reuse_address=True,
            )
        except OSError as error:
            await runner.cleanup()
            raise ApiBindError(
                f"cannot serve the HTTP API on {self._http.bind} TCP port {self._http.port}: {error.strerror}"
            ) from error
        self._runner = runner

    async def stop(self) -> None:
        """Answer the requests under way, for a moment, and close; does nothing when it is not running."""
        server, self._server = self._server, None
        runner, self._runner = self._runner, None
        if server is not None:
            server.close()
        if runner is not None:
            await runner.cleanup()

    def _connection(self, runner: web.AppRunner) -> asyncio.Protocol:
        server = runner.server
        if server is None or len(server.connections) >= MAX_CONNECTIONS:
            return Refusal()
        return Connection(server, timeout_s=self._http.request_timeout_s, malformed=self._count_malformed)

    def _count_malformed(self) -> None:
        self._metrics.http_request(OTHER, OTHER, 400, 0.0)

    @web.middleware
    async def _serve(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer one request, whatever happens, and see the answer off."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        resource = request.match_info.route.resource
        route = OTHER if resource is None else resource.canonical
        method = request.method if request.method in METHODS else OTHER
        try:
            async with asyncio.timeout(self._http.request_timeout_s):
                response = await self._answer(request, handler, route)
        except TimeoutError:
            response = self._too_late(request).response(_instance(request))
        response.headers[hdrs.CACHE_CONTROL] = "no-store"
        response.headers[hdrs.SERVER] = "sippbx"
        response.headers["X-Content-Type-Options"] = "nosniff"
        # Sent here and not by aiohttp, which would wait for ever for a client that does not read.
        try:
            async with asyncio.timeout(self._http.request_timeout_s):
                await response.prepare(request)
                await response.write_eof()
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
        except ConnectionError:
            pass
        self._metrics.http_request(route, method, response.status, loop.time() - begun)
        return response

    async def _answer(self, request: web.Request, handler: Handler, route: str) -> web.StreamResponse:
        instance = _instance(request)
        try:
            if route != HEALTH_PATH:
                request[_CLIENT] = self._keys.client_of(request.headers.get(hdrs.AUTHORIZATION))
            return await handler(request)
        except Problem as problem:
            return problem.response(instance)
        except ApiError as error:
            return of_api_error(error).response(instance)
        except web.HTTPException as error:
            return of_http_exception(error, request.method).response(instance)
        except Exception:  # noqa: BLE001 -- the boundary
            error_id = secrets.token_hex(_ERROR_ID_BYTES)
            self._metrics.error("api", "internal")
            _log.exception("api.request_failed", error_id=error_id, route=route, method=request.method)
            detail = f"the node failed on this request; its log says more about error {error_id}"
            return Problem(500, "internal-error", detail).response(ERROR_PREFIX + error_id)

    def _too_late(self, request: web.Request) -> Problem:
        limit_s = f"{self._http.request_timeout_s:g} s"
        if not request.content.is_eof():
            return Problem(408, "request-timeout", f"the request did not arrive within {limit_s}", closes=True)
        return Problem(504, "timeout", f"there was no result within {limit_s}; ask again for what became of it")

    async def _health(self, _request: web.Request) -> web.Response:
        reasons = self._unready()
        if reasons:
            return web.Response(status=503, text="".join(f"{reason}\n" for reason in reasons))
        return web.Response(text="ok\n")

    async def _list_calls(self, request: web.Request) -> web.Response:
        page = self._service.list_calls(*page_of(query_of(request, *PAGE_KEYS)))
        return _json(page_document("calls", page, call_document))

    async def _get_call(self, request: web.Request) -> web.Response:
        query_of(request)
        return _json(call_document(await self._service.get_call(request.match_info["call_id"])))

    async def _originate_call(self, request: web.Request) -> web.Response:
        query_of(request)
        call_id = request.match_info["call_id"]
        body = await body_of(request, OriginateBody, self._http.max_body_bytes)
        repeated = await self._has_call(call_id)
        call = await self._service.originate(call_id, body.caller, body.callee, client=request[_CLIENT])
        return _json(call_document(call), status=200 if repeated else 201)

    async def _has_call(self, call_id: str) -> bool:
        try:
            await self._service.get_call(call_id)
        except ApiError as error:
            if error.kind in {ApiErrorKind.NOT_FOUND, ApiErrorKind.INVALID_ARGUMENT}:
                return False
            raise
        return True

    async def _hang_up_call(self, request: web.Request) -> web.Response:
        await self._take_nothing(request)
        call = await self._service.hang_up(request.match_info["call_id"], client=request[_CLIENT])
        return _json(call_document(call))

    async def _list_registrations(self, request: web.Request) -> web.Response:
        query = query_of(request, "user", *PAGE_KEYS)
        page = self._service.list_registrations(query.get("user", ""), *page_of(query))
        return _json(page_document("registrations", page, registration_document))

    async def _list_records(self, request: web.Request) -> web.Response:
        page = await self._service.list_records(*page_of(query_of(request, *PAGE_KEYS)))
        return _json(page_document("cdrs", page, cdr_document))

    async def _get_node(self, request: web.Request) -> web.Response:
        query_of(request)
        return _json(node_document(self._service.node()))

    async def _drain(self, request: web.Request) -> web.Response:
        await self._take_nothing(request)
        return _json(node_document(self._service.drain(client=request[_CLIENT])))

    async def _take_nothing(self, request: web.Request) -> None:
        """Refuse what a later version may understand and this one would ignore."""
        query_of(request)
        await body_of(request, Nothing, self._http.max_body_bytes)


def _json(document: object, status: int = 200) -> web.Response:
    return web.Response(status=status, body=dump(document), content_type=JSON)


def _instance(request: web.Request) -> str:
    return request.rel_url.raw_path
