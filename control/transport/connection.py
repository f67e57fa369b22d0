"""One TCP or TLS connection with its framing, deadlines and bounds; control.transport.stream has them all."""

import asyncio
import socket
from typing import Protocol, cast

from control.settings.sections import ConnectionSettings
from control.sip.address import Address
from control.sip.framing import PONG, Framer, KeepAlive

# How many messages one connection may bring before others have their turn.
BURST = 64
# A peer that is gone without a word: found after a minute and a half of silence, and by what it does not acknowledge.
_KEEPALIVE = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 3}
_UNACKNOWLEDGED_MS = 20_000


class Owner(Protocol):
    """Whom a connection belongs to."""

    def made(self, connection: "Connection") -> None:
        """It is open."""

    def received(self, connection: "Connection", message: bytes) -> None:
        """It brought a message."""

    def closing(self, connection: "Connection", reason: str) -> None:
        """It is being closed by us, and no longer to be used; never called from within `send`."""

    def gone(self, connection: "Connection") -> None:
        """It is closed, whoever did it."""


class Connection(asyncio.Protocol):
    """Octets in, messages out, and the other way round. Until it is open, what is sent waits.

    A peer must send its first message, and the rest of each that it begins, within `message_timeout_s`; then it may
    be silent for `idle_timeout_s`. One that leaves more than `max_unsent_bytes` unread is cut off.
    """

    def __init__(self, owner: Owner, remote: Address, limits: ConnectionSettings, *, accepted: bool) -> None:
        self.remote = remote
        self.accepted = accepted
        self._owner = owner
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._framer = Framer()
        self._transport: asyncio.Transport | None = None
        self._waiting: list[bytes] = []
        self._overflowed = False
        self._is_gone = False
        self._proven = not accepted  # a message came, or we chose the peer
        self._opened_at = self._active_at = self._loop.time()
        self._begun_at: float | None = None
        self._alarm: asyncio.TimerHandle | None = None

    @property
    def is_open(self) -> bool:
        """Whether what is sent now would leave."""
        return self._transport is not None and not self._transport.is_closing()

    def send(self, data: bytes) -> bool:
        """Send, or let it wait until the connection is open; False when the connection cannot, or cannot any more."""
        if self._overflowed or self._is_gone:
            return False
        if self._transport is None:
            self._overflowed = sum(map(len, self._waiting)) + len(data) > self._limits.max_unsent_bytes
            if not self._overflowed:
                self._waiting.append(data)
            return not self._overflowed
        if self._transport.is_closing():
            return False
        self._transport.write(data)
        self._active_at = self._loop.time()
        if self._transport.get_write_buffer_size() > self._limits.max_unsent_bytes:
            self._overflowed = True
            self._transport.abort()
        return not self._overflowed

    def close(self, reason: str) -> None:
        """Close it after what was sent; `reason` is for the log."""
        if self._transport is not None and not self._transport.is_closing():
            self._owner.closing(self, reason)
            self._transport.close()

    def abort(self) -> None:
        """Close it now."""
        if self._transport is not None:
            self._transport.abort()

    # ---- what the event loop tells ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open: send what waited."""
        self._transport = cast("asyncio.Transport", transport)
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED_MS)
        self._opened_at = self._active_at = self._loop.time()
        waiting, self._waiting = self._waiting, []
        self._owner.made(self)
        if self._overflowed:
            self._transport.abort()
            return
        for data in waiting:
            self.send(data)
        self._arm()

    def data_received(self, data: bytes) -> None:
        """Take octets."""
        self._active_at = self._loop.time()
        self._framer.feed(data)
        self._drain()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 -- of the protocol
        """It is closed."""
        self._is_gone = True
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        self._owner.gone(self)

    # ---- the inside ------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Hand on what is complete, a burst at a time."""
        transport = self._transport
        for _ in range(BURST):
            if transport is None or transport.is_closing():
                return
            frame = self._framer.next()
            if frame is None:
                break
            self._begun_at = None
            if isinstance(frame, KeepAlive):
                self.send(PONG)
            else:
                self._proven = True
                self._owner.received(self, frame)
        else:
            if transport is not None:
                transport.pause_reading()
                self._loop.call_soon(self._go_on)
            return
        if self._framer.broken is not None:
            self.close(self._framer.broken)
            return
        if not self._framer.started:
            self._begun_at = None
        elif self._begun_at is None:
            self._begun_at = self._active_at
        self._arm()

    def _go_on(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()
            self._drain()

    def _deadline(self) -> tuple[float, str]:
        if self._begun_at is not None:
            return self._begun_at + self._limits.message_timeout_s, "a message that took too long"
        if not self._proven:
            return self._opened_at + self._limits.message_timeout_s, "no message"
        return self._active_at + self._limits.idle_timeout_s, "idle"

    def _arm(self) -> None:
        """See to it that the alarm rings no later than the deadline; one that rings too early is set again."""
        deadline, _ = self._deadline()
        if self._is_gone or (self._alarm is not None and self._alarm.when() <= deadline):
            return
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = self._loop.call_at(deadline, self._ring)

    def _ring(self) -> None:
        alarm, self._alarm = self._alarm, None
        deadline, reason = self._deadline()
        if alarm is not None and deadline <= max(alarm.when(), self._loop.time()):
            self.close(reason)
        else:
            self._arm()
