"""The HTTP server for probes and scrapes: /livez, /readyz and /metrics.

/livez answers as long as the event loop runs and asks nobody else, so that an orchestrator never restarts a plane for
another's fault. /readyz answers 200 or 503 with the reasons, one a line.
"""

from collections.abc import Callable, Sequence

import prometheus_client
from aiohttp import hdrs, web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

STOP_TIMEOUT_S = 2.0


class ProbeError(Exception):
    """The port cannot be bound; the text names it."""


class ProbeServer:
    """Serves one plane's probes.

    `unready` gives the reasons for not being ready, none when it is. It and the collectors of `registry` are called in
    the event loop's thread.
    """

    def __init__(
        self, host: str, port: int, *, registry: CollectorRegistry, unready: Callable[[], Sequence[str]]
    ) -> None:
        # Doubles the series and is asked for by nobody.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self._host = host
        self._port = port
        self._registry = registry
        self._unready = unready
        self._runner: web.AppRunner | None = None

    @property
    def port(self) -> int:
        """The bound port, which differs from the wanted one when that was 0; 0 while stopped."""
        addresses = self._runner.addresses if self._runner else []
        return int(addresses[0][1]) if addresses else 0

    async def start(self) -> None:
        """Binds and serves.

        Raises:
            ProbeError: when the port cannot be bound.
        """
        application = web.Application()
        application.router.add_get("/livez", self._livez)
        application.router.add_get("/readyz", self._readyz)
        application.router.add_get("/metrics", self._metrics)
        runner = web.AppRunner(application, access_log=None, handle_signals=False, shutdown_timeout=STOP_TIMEOUT_S)
        await runner.setup()
        try:
            await web.TCPSite(runner, self._host, self._port).start()
        except OSError as error:
            await runner.cleanup()
            raise ProbeError(f"cannot serve metrics on {self._host} port {self._port}: {error.strerror}") from error
        self._runner = runner

    async def stop(self) -> None:
        """Answers the requests under way and closes; does nothing when it is not running."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def _livez(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _request: web.Request) -> web.Response:
        reasons = self._unready()
        if reasons:
            return web.Response(status=503, text="".join(f"{reason}\n" for reason in reasons))
        return web.Response(text="ok\n")

    async def _metrics(self, request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get(hdrs.ACCEPT, ""))
        return web.Response(body=encode(self._registry), headers={hdrs.CONTENT_TYPE: content_type})
