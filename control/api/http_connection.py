"""Connections of the HTTP API: bounded in number and in time, and polite to what is not HTTP."""

import asyncio
import logging
import ssl
from collections.abc import Callable
from typing import Any

from aiohttp import web

from control.api.errors import ApiBindError
from control.api.problem import Problem
from control.settings.sections import TlsSettings

# A body that was refused is read for so long, so that the client, still sending, finds the answer.
LINGER_S = 2.0

_log = logging.getLogger(__name__)


class Connection(web.RequestHandler):
    """One connection. It has `timeout_s` for the head of each request; `malformed` is told of what is not HTTP."""

    __slots__ = ("_malformed",)

    def __init__(self, server: web.Server, *, timeout_s: float, malformed: Callable[[], None]) -> None:
        self._malformed = malformed
        # The keep-alive timer runs from the start of the connection and until the head is there.
        options: dict[str, Any] = {"access_log": None, "logger": _log}
        loop = asyncio.get_running_loop()
        super().__init__(server, loop=loop, keepalive_timeout=timeout_s, lingering_time=LINGER_S, **options)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what could not be read as HTTP; the log is not told, because anybody can send that."""
        if status == 500:
            return super().handle_error(request, status, exc, message)
        self._malformed()
        first_line = (message or "it cannot be read").partition("\n")[0].rstrip(":")
        return Problem(status, "bad-http", f"this is not HTTP: {first_line}", closes=True).response("/")


class Refusal(asyncio.Protocol):
    """The end of a connection that is one too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Close it, unread."""
        transport.close()


def tls_context(settings: TlsSettings) -> ssl.SSLContext:
    """TLS 1.2 and newer with the certificate of the settings.

    Raises:
        ApiBindError: the certificate or its key cannot be used.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(settings.certificate_path, settings.private_key_path, password=_no_passphrase)
    except (OSError, ValueError) as error:
        raise ApiBindError(
            f"cannot use api.tls, {settings.certificate_path} with {settings.private_key_path}: {error}"
        ) from error
    return context


def _no_passphrase() -> str:
    # OpenSSL would ask on the terminal.
    raise ValueError("the private key has a passphrase; store it without")
