"""The worker of the userspace engine: a process that relays packets and does nothing else.

    python -m dataplane.engine.worker CONTROL_FD SILENCE_S RECEIVE_BUFFER_BYTES

One thread, one epoll. CONTROL_FD is its end of a stream socket pair to the engine: requests come in, replies and events
go out. Requests are carried out between rounds of packets, for at most _CONTROL_BUDGET_S a round, so that neither side
waits for the other; figures are collected in small steps that go behind waiting requests. A packet costs no allocation
but its source address, and nothing is logged for it.

The worker ends when its parent does: the socket closes, and the kernel kills it should it be stuck. It leaves no
reference cycles behind (MediaSession cuts those between ports), so the garbage collector is off.
"""

import ctypes
import gc
import select
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from time import monotonic
from typing import Final

from dataplane.engine.wire import (
    Applied,
    Apply,
    Collect,
    Collected,
    FrameBuffer,
    Message,
    Refused,
    Remove,
    Removed,
    SessionStreams,
    decode,
    encode,
)
from dataplane.session.relay import MAX_PACKET_BYTES, Component, MediaSession, RelayPort, StreamEvent
from dataplane.session.spec import Leg, PortPlan

_CONTROL_BUDGET_S: Final = 0.001
_EVENTS_A_ROUND: Final = 128
_SESSIONS_A_PIECE: Final = 8
_SWEEP_INTERVAL_S: Final = 0.1
_SWEEPS_A_PASS: Final = 10
_READ_BYTES: Final = 1 << 16
# From <linux/prctl.h>.
_PR_SET_PDEATHSIG: Final = 1

# One buffer for every packet, and a ready slice of it for every size. The octet more tells a packet that was cut.
_BUFFER: Final = bytearray(MAX_PACKET_BYTES + 1)
_SLICES: Final = [memoryview(_BUFFER)[:size] for size in range(MAX_PACKET_BYTES + 2)]


class _BindError(Exception):
    def __init__(self, address: str, port: int, errno: int) -> None:
        super().__init__(address, port, errno)
        self.address = address
        self.port = port
        self.errno = errno


class _Pair:
    """The two bound sockets of a relay port, by component."""

    def __init__(self, plan: PortPlan, receive_buffer_bytes: int) -> None:
        self.address = plan.local_address
        rtp = _bind(plan.local_address, plan.rtp_port, receive_buffer_bytes)
        try:
            rtcp = _bind(plan.local_address, plan.rtcp_port, receive_buffer_bytes)
        except _BindError:
            rtp.close()
            raise
        self.sockets = (rtp, rtcp)

    def close(self) -> None:
        for bound in self.sockets:
            bound.close()


def _bind(address: str, port: int, receive_buffer_bytes: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        bound = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise _BindError(address, port, error.errno or 0) from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind((address, port))
    except OSError as error:
        bound.close()
        raise _BindError(address, port, error.errno or 0) from None
    return bound


def _relay(port: RelayPort, component: Component, here: _Pair, there: _Pair) -> Callable[[float], None]:
    """Return what to call, with the time, when the socket of `component` is readable: it relays one packet."""
    receive_into = here.sockets[component].recvfrom_into
    receive = port.receive_rtp if component is Component.RTP else port.receive_rtcp
    send = tuple(bound.sendto for bound in there.sockets)
    buffer, slices = _BUFFER, _SLICES

    def on_readable(now: float) -> None:
        try:
            size, source = receive_into(buffer)
        except OSError:  # what made it readable is gone: a bad checksum, say
            return
        forward = receive(buffer, size, source, now)
        if forward is not None:
            try:
                send[forward.component](slices[size], forward.destination)
            except OSError:
                port.send_failed(component, buffer, size)

    return on_readable


class Worker:
    """The sessions, their sockets and the conversation with the engine."""

    def __init__(self, control: socket.socket, silence_s: float, receive_buffer_bytes: int) -> None:
        self._control = control
        self._silence_s = silence_s
        self._receive_buffer_bytes = receive_buffer_bytes
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[float], None]] = {}
        self._sessions: dict[str, MediaSession] = {}
        self._pairs: dict[str, dict[tuple[Leg, int], _Pair]] = {}
        self._outbox: list[StreamEvent] = []
        self._requests: deque[Apply | Remove] = deque()
        self._collections: deque[Iterator[Collected]] = deque()
        self._frames = FrameBuffer()
        self._unsent = bytearray()
        self._sweep: Iterator[MediaSession] = iter(())
        self._sweep_size = 0
        self._sweep_at = 0.0
        self._running = True

    def run(self) -> None:
        """Relay until the engine closes its end."""
        control_fd = self._control.fileno()
        self._control.setblocking(False)
        self._handlers[control_fd] = self._converse
        self._epoll.register(control_fd, select.EPOLLIN)
        handlers, poll = self._handlers, self._epoll.poll
        while self._running:
            ready = poll(0 if self._has_work() else _SWEEP_INTERVAL_S, _EVENTS_A_ROUND)
            now = monotonic()
            for fd, _ in ready:
                handlers[fd](now)
            if self._has_work():
                self._work(now + _CONTROL_BUDGET_S)
            if now >= self._sweep_at:
                self._check_silence(now)
            if self._outbox:
                for event in self._outbox:
                    self._send(event)
                self._outbox.clear()

    def _converse(self, _now: float) -> None:
        """Read requests and write what is waiting; the socket is ready for one of them."""
        if self._unsent:
            self._flush()
        try:
            data = self._control.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._running = False
        for body in self._frames.feed(data):
            match decode(body):
                case Apply() | Remove() as request:
                    self._requests.append(request)
                case Collect(request_id, session_ids):
                    self._collections.append(self._collect(request_id, session_ids))
                case other:
                    raise ValueError(f"a worker is not told {type(other).__name__}")

    def _has_work(self) -> bool:
        return bool(self._requests) or (bool(self._collections) and not self._unsent)

    def _work(self, until: float) -> None:
        """Carry out requests until the time is up, at least one, and one step of collecting figures."""
        while self._requests:
            request = self._requests.popleft()
            match request:
                case Apply():
                    self._apply(request)
                case Remove(request_id, session_id):
                    self._remove(request_id, session_id)
            if monotonic() >= until:
                break
        if self._collections and not self._unsent:
            piece = next(self._collections[0])
            self._send(piece)
            if piece.last:
                self._collections.popleft()

    def _apply(self, request: Apply) -> None:
        plan = request.plan
        old = self._pairs.get(plan.session_id, {})
        pairs: dict[tuple[Leg, int], _Pair] = {}
        bound: list[_Pair] = []
        try:
            for port in plan.ports:
                pair = old.get((port.leg, port.line))
                if pair is None or pair.address != port.local_address:
                    pair = _Pair(port, self._receive_buffer_bytes)
                    bound.append(pair)
                pairs[port.leg, port.line] = pair
        except _BindError as error:
            for pair in bound:
                pair.close()
            self._send(Refused(request.request_id, error.address, error.port, error.errno))
            return
        session = self._sessions.get(plan.session_id)
        if session is None:
            session = self._sessions[plan.session_id] = MediaSession(plan.session_id, self._outbox)
        session.apply(plan, monotonic(), request.learned, request.carried)
        self._pairs[plan.session_id] = pairs
        for pair in old.values():
            if pair not in pairs.values():
                self._let_go(pair)
        for (leg, line), relay_port in session.ports.items():
            here, there = pairs[leg, line], pairs[leg.opposite, line]
            for component in Component:
                self._handlers[here.sockets[component].fileno()] = _relay(relay_port, component, here, there)
        for pair in bound:
            for new in pair.sockets:
                self._epoll.register(new.fileno(), select.EPOLLIN)
        self._send(Applied(request.request_id))

    def _remove(self, request_id: int, session_id: str) -> None:
        for pair in self._pairs.pop(session_id, {}).values():
            self._let_go(pair)
        session = self._sessions.pop(session_id, None)
        self._send(Removed(request_id, session.close() if session is not None else ()))

    def _let_go(self, pair: _Pair) -> None:
        for bound in pair.sockets:
            del self._handlers[bound.fileno()]
            self._epoll.unregister(bound.fileno())
        pair.close()

    def _collect(self, request_id: int, session_ids: tuple[str, ...] | None) -> Iterator[Collected]:
        wanted = list(self._sessions) if session_ids is None else list(session_ids)
        for start in range(0, len(wanted), _SESSIONS_A_PIECE):
            names = wanted[start : start + _SESSIONS_A_PIECE]
            found = ((name, self._sessions[name]) for name in names if name in self._sessions)
            yield Collected(
                request_id,
                tuple(SessionStreams(name, session.snapshot()) for name, session in found),
                last=start + _SESSIONS_A_PIECE >= len(wanted),
            )
        if not wanted:
            yield Collected(request_id, (), last=True)

    def _check_silence(self, now: float) -> None:
        """Look at the next few sessions, so that all are seen in a second or so and no round is long."""
        self._sweep_at = now + _SWEEP_INTERVAL_S
        checked = 0
        for session in islice(self._sweep, self._sweep_size):
            session.check_silence(now, self._silence_s)
            checked += 1
        if checked < self._sweep_size or not self._sweep_size:
            sessions = list(self._sessions.values())
            self._sweep = iter(sessions)
            self._sweep_size = -(-len(sessions) // _SWEEPS_A_PASS)

    def _send(self, message: Message) -> None:
        # What can wait here is bounded: the engine bounds its requests, streams have few events, and figures wait
        # until the rest is gone.
        self._unsent += encode(message)
        self._flush()

    def _flush(self) -> None:
        try:
            sent = self._control.send(self._unsent)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._running = False
            return
        del self._unsent[:sent]
        events = select.EPOLLIN | select.EPOLLOUT if self._unsent else select.EPOLLIN
        self._epoll.modify(self._control.fileno(), events)


def main(arguments: list[str]) -> None:
    """Run the worker as its module's docstring says."""
    control_fd, silence_s, receive_buffer_bytes = arguments
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The engine decides when a worker ends; a terminal's Ctrl-C goes to the whole process group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    worker = Worker(socket.socket(fileno=int(control_fd)), float(silence_s), int(receive_buffer_bytes))
    gc.collect()
    gc.freeze()
    gc.disable()
    worker.run()


if __name__ == "__main__":
    main(sys.argv[1:])
