"""SIP over UDP: one bound socket, drained in bursts (RFC 3261 section 18).

The reader takes up to a fixed number of datagrams a wakeup, so that a burst costs one `epoll` and cannot starve the
loop. Nothing is parsed here, no address is judged and nothing is sent again: those rules belong to the SIP stack.
IPv4-mapped addresses are not used: an IPv6 listener serves IPv6 alone.
"""

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

import structlog

from control.sip.address import Address, Flow, Transport

MAX_DATAGRAM_BYTES = 65_507

_BURST = 64
_MAX_QUEUED = 1_024
_MAX_SCOPES = 1_024
# linux/sock_diag.h: getsockopt(SO_MEMINFO) gives nine counters of which the last is the datagrams that found no room.
_SO_MEMINFO = 55
_MEMINFO = struct.Struct("9I")

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class UdpCounters:
    """What went through one socket since its start, in datagrams."""

    received: int = 0
    sent: int = 0
    queued: int = 0
    dropped_queue_full: int = 0
    dropped_oversized: int = 0
    receive_errors: int = 0
    send_errors: int = 0
    handler_errors: int = 0


class _Sending(Enum):
    DONE = auto()
    NO_ROOM = auto()
    FAILED = auto()


class UdpTransport:
    """Hands on each datagram with the flow it came along, and sends along flows; owns its bound socket.

    Sending never blocks: what the kernel does not take at once waits, in order, in a bounded queue.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        listener: str,
        receive: Callable[[bytes, Flow], None],
        burst: int = _BURST,
        max_queued: int = _MAX_QUEUED,
    ) -> None:
        sock.setblocking(False)
        sockname = sock.getsockname()
        self.local = Address(sockname[0], sockname[1])
        self.counters = UdpCounters()
        self._socket = sock
        self._listener = listener
        self._receive = receive
        self._burst = burst
        self._max_queued = max_queued
        self._ipv6 = sock.family == socket.AF_INET6
        self._scope = sockname[3] if self._ipv6 else 0
        self._scopes: dict[str, int] = {}
        self._waiting: deque[tuple[bytes, Address]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin to read, on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket, self._drain)

    def pause(self) -> None:
        """Read no more; what arrives waits in the socket. Sending goes on."""
        if self._loop is not None:
            self._loop.remove_reader(self._socket)

    def close(self) -> None:
        """Stop and close this process's hold on the socket; what still waits to be sent is dropped."""
        if self._loop is not None:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._loop = None
        self._waiting.clear()
        self._socket.close()

    def send(self, data: bytes, flow: Flow) -> bool:
        """Send one datagram to the flow's peer; False when it is known not to leave, the reason being counted."""
        if len(data) > MAX_DATAGRAM_BYTES:
            self.counters.dropped_oversized += 1
            _log.warning("transport.datagram_refused", listener=self._listener, size_bytes=len(data))
            return False
        if self._waiting:
            return self._queue(data, flow.remote)
        match self._send_now(data, flow.remote):
            case _Sending.NO_ROOM:
                if self._loop is not None:
                    self._loop.add_writer(self._socket, self._flush)
                return self._queue(data, flow.remote)
            case outcome:
                return outcome is _Sending.DONE

    def kernel_drops(self) -> int:
        """Datagrams that the kernel threw away because the receive buffer was full; 0 where it does not tell."""
        try:
            raw = self._socket.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size)
        except OSError:
            return 0
        return int(_MEMINFO.unpack(raw)[8]) if len(raw) == _MEMINFO.size else 0

    def _drain(self) -> None:
        for _ in range(self._burst):
            try:
                data, sockaddr = self._socket.recvfrom(65_535)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                # An ICMP error about something sent earlier: it says nothing about what may still be read.
                self.counters.receive_errors += 1
                _log.debug("transport.receive_failed", listener=self._listener, error=str(error))
                continue
            self.counters.received += 1
            host = sockaddr[0]
            if self._ipv6 and sockaddr[3]:
                host = host.partition("%")[0]
                self._remember_scope(host, sockaddr[3])
            flow = Flow(Transport.UDP, self._listener, Address(host, sockaddr[1]))
            try:
                self._receive(data, flow)
            except Exception:  # noqa: BLE001 - the boundary
                # The boundary of the read callback: one datagram that trips over a bug must not take the others with
                # it.
                self.counters.handler_errors += 1
                _log.exception("transport.datagram_failed", listener=self._listener, remote=str(flow.remote))

    def _remember_scope(self, host: str, scope: int) -> None:
        """Link-local peers are answered through the interface they were heard on, which SIP cannot express."""
        if host not in self._scopes and len(self._scopes) >= _MAX_SCOPES:
            del self._scopes[next(iter(self._scopes))]
        self._scopes[host] = scope

    def _send_now(self, data: bytes, remote: Address) -> "_Sending":
        destination: tuple[str, int] | tuple[str, int, int, int] = (remote.host, remote.port)
        if self._ipv6 and remote.host[:4].lower() == "fe80":
            destination = (remote.host, remote.port, 0, self._scopes.get(remote.host, self._scope))
        try:
            self._socket.sendto(data, destination)
        except (BlockingIOError, InterruptedError):
            return _Sending.NO_ROOM
        except (OSError, OverflowError) as error:
            self.counters.send_errors += 1
            _log.debug("transport.send_failed", listener=self._listener, remote=str(remote), error=str(error))
            return _Sending.FAILED
        self.counters.sent += 1
        return _Sending.DONE

    def _queue(self, data: bytes, remote: Address) -> bool:
        if len(self._waiting) >= self._max_queued:
            self.counters.dropped_queue_full += 1
            return False
        self.counters.queued += 1
        self._waiting.append((data, remote))
        return True

    def _flush(self) -> None:
        while self._waiting:
            if self._send_now(*self._waiting[0]) is _Sending.NO_ROOM:
                return
            self._waiting.popleft()
        if self._loop is not None:
            self._loop.remove_writer(self._socket)
