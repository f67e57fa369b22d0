"""TLS contexts of SIP listeners, made anew when their files change (RFC 3261 section 26.3.1, RFC 5922 section 7).

A connection keeps the context that it was made with, so certificates are replaced without dropping any.
"""

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog

from control.settings.sections import ListenerTlsSettings, TrunkTlsSettings
from control.sip.address import Address

RELOAD_INTERVAL_S = 30.0

_log = structlog.get_logger(__name__)


class TlsError(Exception):
    """A certificate or a key cannot be used; the text names the files and says why."""


@dataclass(frozen=True, slots=True)
class PeerTls:
    """How to speak TLS to a peer: its certificate must have `name`, which is a host name or a numeric address."""

    context: ssl.SSLContext
    name: str


class TlsContexts:
    """What one listener shows, and what it demands of `peers`, by their addresses, when it connects to them.

    A peer at another port of a known host is held to the same; any other to its numeric address and this host's CAs.
    """

    def __init__(self, listener: str, settings: ListenerTlsSettings, peers: Mapping[Address, TrunkTlsSettings]) -> None:
        """Raises TlsError when a file cannot be used."""
        self.listener = listener
        self._settings = settings
        self._peers = peers
        self._of_host = {address.host: tls for address, tls in reversed(list(peers.items()))}
        self._files = {settings.certificate_path, settings.private_key_path}
        self._files |= {path for path in (settings.client_ca_path, *(tls.ca_path for tls in peers.values())) if path}
        self.load()

    def load(self) -> None:
        """Read all files; what was read before stays in use when one of them cannot be used.

        Raises:
            TlsError: see there.
        """
        seen = self._stamps()
        server = self._with_certificate(ssl.PROTOCOL_TLS_SERVER)
        if self._settings.client_ca_path is not None:
            _load_ca(server, self._settings.client_ca_path)
            server.verify_mode = ssl.CERT_REQUIRED
        authorities = {None, *(tls.ca_path for tls in self._peers.values())}
        clients = {path: self._client(path) for path in authorities}
        self.server, self._clients, self._seen = server, clients, seen

    def changed(self) -> bool:
        """Whether a file is another one than `load` read last."""
        return self._stamps() != self._seen

    def towards(self, remote: Address) -> PeerTls:
        """What to demand of whoever answers there."""
        tls = self._peers.get(remote) or self._of_host.get(remote.host) or TrunkTlsSettings()
        return PeerTls(self._clients[tls.ca_path], tls.server_name or remote.host)

    def _client(self, ca_path: Path | None) -> ssl.SSLContext:
        context = self._with_certificate(ssl.PROTOCOL_TLS_CLIENT)
        if ca_path is None:
            context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        else:
            _load_ca(context, ca_path)
        return context

    def _with_certificate(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION  # costs us more than who asks for it
        certificate, key = self._settings.certificate_path, self._settings.private_key_path
        try:
            context.load_cert_chain(certificate, key, password=_no_passphrase)
        except (OSError, ValueError) as error:
            raise TlsError(f"cannot use {certificate} with {key} for listener {self.listener!r}: {error}") from error
        return context

    def _stamps(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(_stamp(path) for path in sorted(self._files))


async def keep_current(
    contexts: Iterable[TlsContexts],
    hangup: asyncio.Event,
    *,
    failed: Callable[[], None],
    interval_s: float = RELOAD_INTERVAL_S,
) -> None:
    """Load what has changed, every `interval_s` seconds and when `hangup` is set; runs until cancelled.

    Files that cannot be used are told of once, by the log and `failed`, and tried again after the next change.
    """
    told: dict[str, str] = {}
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(interval_s):  # wait_for would swallow a cancellation that comes with the signal
                await hangup.wait()
        asked = hangup.is_set()
        hangup.clear()
        for each in contexts:
            try:
                if asked or await asyncio.to_thread(each.changed):
                    await asyncio.to_thread(each.load)
                    told.pop(each.listener, None)
                    _log.info("transport.certificates_loaded", listener=each.listener)
            except TlsError as error:
                if asked or told.get(each.listener) != str(error):
                    told[each.listener] = str(error)
                    failed()
                    _log.error(
                        "transport.certificates_unusable", error=str(error), advice="the former ones stay in use"
                    )


def _load_ca(context: ssl.SSLContext, path: Path) -> None:
    try:
        context.load_verify_locations(path)
    except OSError as error:
        raise TlsError(f"cannot use the CA certificates in {path}: {error}") from error


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _no_passphrase() -> str:
    # OpenSSL would ask on the terminal.
    raise ValueError("the private key has a passphrase; store it without")
