"""SIP over TCP and TLS: all connections of one listener, whoever opened them (RFC 3261 section 18).

A connection is found by the remote address of a flow, whoever opened it; where there is none one is opened when
something is to be sent. A connection that is gone, or that could not be had, is told of by its flow, after which
whatever was sent along it before counts as lost. Addresses are not judged here and nothing is sent again: those rules
belong to the SIP stack. An IPv6 listener serves IPv6 alone.
"""

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Final

import structlog

from control.settings.sections import ConnectionSettings
from control.sip.address import Address, Flow, Transport
from control.transport.connection import Connection
from control.transport.tls import TlsContexts

CLOSE_PATIENCE_S: Final = 1.0

_ACCEPTED_AT_ONCE: Final = 32
_REST_S: Final = 1.0
_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_TLS_SHUTDOWN_S: Final = 2.0

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class StreamCounters:
    """What went through the connections of one listener since its start."""

    received: int = 0
    sent: int = 0
    connections_accepted: int = 0
    connections_opened: int = 0
    connections_refused: int = 0  # by the limits
    connections_failed: int = 0  # TLS handshakes, and attempts of ours
    connections_cut: int = 0  # by us, because of what the peer did or did not do
    dropped_unsendable: int = 0
    accept_errors: int = 0
    handler_errors: int = 0


class StreamTransport:
    """Hands on each message with the flow it came along, and sends along flows; owns its listening socket.

    `failed` is told of flows whose connection is gone. It may send, as `receive` may.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        listener: str,
        receive: Callable[[bytes, Flow], None],
        failed: Callable[[Flow], None],
        limits: ConnectionSettings,
        tls: TlsContexts | None = None,
    ) -> None:
        sock.setblocking(False)
        sockname = sock.getsockname()
        self.local = Address(sockname[0], sockname[1])
        self.counters = StreamCounters()
        self._socket = sock
        self._listener = listener
        self._transport = Transport.TCP if tls is None else Transport.TLS
        self._receive = receive
        self._failed = failed
        self._limits = limits
        self._tls = tls
        # From the moment on that it takes a descriptor; by address once it can be used, or will be.
        self._connections: set[Connection] = set()
        self._current: dict[Address, Connection] = {}
        self._of_source: dict[bytes, set[Connection]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._rest: asyncio.TimerHandle | None = None
        self._empty = asyncio.Event()

    def __len__(self) -> int:
        """Connections, those included that are being made."""
        return len(self._connections)

    def start(self) -> None:
        """Begin to accept, on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket, self._accept)

    async def close(self) -> None:
        """Stop and close this process's hold on the socket, and all connections once their messages have left.

        A peer that does not take them within a second loses them. Nothing is told of flows any more.
        """
        if self._rest is not None:
            self._rest.cancel()
        if self._loop is not None:
            self._loop.remove_reader(self._socket)
        self._loop = None
        self._socket.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in list(self._connections):
            if connection.is_open:
                connection.close("stopped")
        if await self._is_empty_in_time():
            return
        for connection in list(self._connections):
            connection.abort()
        if not await self._is_empty_in_time():
            _log.error("transport.connections_left", listener=self._listener, connections=len(self._connections))

    def send(self, data: bytes, flow: Flow) -> bool:
        """Send one message to the flow's peer, over a new connection if there is none.

        False when it is known not to leave; `failed` follows then, too.
        """
        connection = self._current.get(flow.remote) or self._open(flow.remote)
        if connection is not None and connection.send(data):
            self.counters.sent += 1
            return True
        self.counters.dropped_unsendable += 1
        return False

    def is_connected(self, flow: Flow) -> bool:
        """Whether there is a connection to the flow's peer now."""
        connection = self._current.get(flow.remote)
        return connection is not None and connection.is_open

    # ---- connections that peers open -------------------------------------------------------------------------------

    def _accept(self) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                sock, sockaddr = self._socket.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self.counters.accept_errors += 1
                if error.errno in _EXHAUSTED:
                    self._take_a_rest(error)
                    return
                continue  # the peer was gone before we came to it (accept(2), ERRORS)
            self._admit(sock, Address(sockaddr[0].partition("%")[0], sockaddr[1]))

    def _take_a_rest(self, error: OSError) -> None:
        """Let connections wait in the socket: no other thing can be done without descriptors."""
        advice = "raise the limit of open files above sip.connections.max_open"
        _log.warning("transport.accept_failed", listener=self._listener, error=error.strerror, advice=advice)
        if self._loop is not None:
            self._loop.remove_reader(self._socket)
            self._rest = self._loop.call_later(_REST_S, self.start)

    def _admit(self, sock: socket.socket, remote: Address) -> None:
        of_source = len(self._of_source.get(_source_of(remote), ()))
        if len(self._connections) >= self._limits.max_open or of_source >= self._limits.max_per_source:
            sock.close()
            self.counters.connections_refused += 1
            _log.debug("transport.connection_refused", listener=self._listener, remote=str(remote), of_source=of_source)
            return
        connection = self._enter(remote, accepted=True)
        self._run(self._take_in(connection, sock))

    async def _take_in(self, connection: Connection, sock: socket.socket) -> None:
        tls = self._tls
        try:
            sock.setblocking(False)
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection,
                sock,
                ssl=tls.server if tls else None,
                ssl_handshake_timeout=self._limits.message_timeout_s if tls else None,
                ssl_shutdown_timeout=_TLS_SHUTDOWN_S if tls else None,
            )
        except OSError as error:
            self._not_made(connection, error)
        except asyncio.CancelledError:
            self._forget(connection)
            raise

    # ---- connections of ours ---------------------------------------------------------------------------------------

    def _open(self, remote: Address) -> Connection | None:
        if self._loop is None:
            return None
        if len(self._connections) >= self._limits.max_open:
            self.counters.connections_refused += 1
            self._loop.call_soon(self._tell, remote)
            return None
        connection = self._current[remote] = self._enter(remote, accepted=False)
        self._run(self._connect(connection))
        return connection

    async def _connect(self, connection: Connection) -> None:
        remote = connection.remote
        peer = self._tls.towards(remote) if self._tls else None
        try:
            async with asyncio.timeout(self._limits.connect_timeout_s):
                await asyncio.get_running_loop().create_connection(
                    lambda: connection,
                    remote.host,
                    remote.port,
                    ssl=peer.context if peer else None,
                    server_hostname=peer.name if peer else None,
                    ssl_handshake_timeout=self._limits.connect_timeout_s if peer else None,
                    ssl_shutdown_timeout=_TLS_SHUTDOWN_S if peer else None,
                    # Peers trust an address: the one that the listener is bound to, if it is.
                    local_addr=None if self.local.host in ("0.0.0.0", "::") else (self.local.host, 0),
                )
        except OSError as error:
            self._not_made(connection, error)
        except asyncio.CancelledError:
            self._forget(connection)
            raise

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, name=f"connection-of-{self._listener}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- what connections tell -------------------------------------------------------------------------------------

    def made(self, connection: Connection) -> None:
        """A connection is open; of two to one address the later one is used for sending."""
        self._current[connection.remote] = connection
        if connection.accepted:
            self.counters.connections_accepted += 1
        else:
            self.counters.connections_opened += 1
        _log.debug("transport.connected", listener=self._listener, remote=str(connection.remote))

    def received(self, connection: Connection, message: bytes) -> None:
        """A message came."""
        self.counters.received += 1
        try:
            self._receive(message, Flow(self._transport, self._listener, connection.remote))
        except Exception:  # noqa: BLE001 - the boundary
            # One message that trips over a bug must not take the connection, and other people's calls, with it.
            self.counters.handler_errors += 1
            _log.exception("transport.message_failed", listener=self._listener, remote=str(connection.remote))

    def closing(self, connection: Connection, reason: str) -> None:
        """A connection is being closed by us."""
        if self._loop is not None:
            self.counters.connections_cut += 1
            _log.info("transport.connection_cut", listener=self._listener, remote=str(connection.remote), reason=reason)
        self._retire(connection)

    def gone(self, connection: Connection) -> None:
        """A connection is closed."""
        _log.debug("transport.disconnected", listener=self._listener, remote=str(connection.remote))
        self._forget(connection)

    def _not_made(self, connection: Connection, error: OSError) -> None:
        self.counters.connections_failed += 1
        about = {"listener": self._listener, "remote": str(connection.remote), "error": str(error) or "timed out"}
        if connection.accepted:
            _log.debug("transport.handshake_failed", **about)
        else:
            _log.warning("transport.connect_failed", **about)
        self._forget(connection)

    # ---- tables ----------------------------------------------------------------------------------------------------

    def _enter(self, remote: Address, *, accepted: bool) -> Connection:
        connection = Connection(self, remote, self._limits, accepted=accepted)
        self._connections.add(connection)
        if accepted:
            self._of_source.setdefault(_source_of(remote), set()).add(connection)
        return connection

    def _forget(self, connection: Connection) -> None:
        self._connections.discard(connection)
        source = _source_of(connection.remote)
        if (of_source := self._of_source.get(source)) is not None:
            of_source.discard(connection)
            if not of_source:
                del self._of_source[source]
        if not self._connections:
            self._empty.set()
        self._retire(connection)

    def _retire(self, connection: Connection) -> None:
        """Send over it no more, and tell."""
        if self._current.get(connection.remote) is connection:
            del self._current[connection.remote]
            self._tell(connection.remote)

    def _tell(self, remote: Address) -> None:
        if self._loop is None:
            return
        try:
            self._failed(Flow(self._transport, self._listener, remote))
        except Exception:  # noqa: BLE001 - the boundary
            self.counters.handler_errors += 1
            _log.exception("transport.failure_untold", listener=self._listener, remote=str(remote))

    async def _is_empty_in_time(self) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_PATIENCE_S):
                while self._connections:
                    self._empty.clear()
                    await self._empty.wait()
        return not self._connections


def _source_of(remote: Address) -> bytes:
    """Who counts as one source: an IPv4 address, or the IPv6 network of one link (RFC 4291 section 2.5.4)."""
    return ip_address(remote.host).packed[:8]
