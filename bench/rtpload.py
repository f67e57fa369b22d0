"""An RTP generator and receiver that is cheap enough not to be what is measured, and exact about loss.

A pair is two sockets, one at each end of a path: each sends a stream of 172-byte packets (G.711, 20 ms) to its remote
address and expects the stream of the other. Each packet carries its stream, a 32-bit sequence number and the time at
which it was sent, so every lost, repeated, reordered or misdelivered packet is known by number. Arrival is stamped by
the kernel (SO_TIMESTAMPNS), so a receiver that is busy does not count as delay of the path.

The generator is a process of its own (`python -m bench.rtpload`), one thread around epoll and a timerfd; `RtpLoad`
drives it. Streams have phases spread evenly over the packet interval. A direct pair (`direct_pair`) runs from socket to
socket with nothing between: the reference that tells what of a delay is the machine's and the generator's own.
"""

import asyncio
import contextlib
import ctypes
import json
import os
import select
import socket
import struct
import sys
import time
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

INTERVAL_S = 0.02
SLOT_S = 0.001
PAYLOAD_BYTES = 160
SAMPLES_PER_PACKET = 160
DRAIN_S = 0.5
ANSWER_TIMEOUT_S = 10.0
MAX_MISSING_LISTED = 50
NS = 1_000_000_000

# After the two fixed octets of the RTP header (RFC 3550 section 5.1): sequence number, timestamp, SSRC; then ours:
# stream, sequence number of 32 bits, time sent in ns.
_STAMP = struct.Struct(">HIIIIQ")
_STAMP_AT = 2
_PATTERN_AT = _STAMP_AT + _STAMP.size
_TIMESPEC = struct.Struct("qq")
_SO_TIMESTAMPNS = 35
_ANCILLARY_BYTES = socket.CMSG_SPACE(_TIMESPEC.size)

HostPort = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two ends of a path. `a_remote` is where end a sends to: the relay's address, or b itself when `direct`."""

    a_local: HostPort
    a_remote: HostPort
    b_local: HostPort
    b_remote: HostPort
    direct: bool = False


def direct_pair(a_local: HostPort, b_local: HostPort) -> Pair:
    """A pair with no relay between its ends: the reference."""
    return Pair(a_local, b_local, b_local, a_local, direct=True)


@dataclass(frozen=True, slots=True)
class StreamReport:
    """One direction of a pair. `missing` are the first lost numbers, `longest_gap_s` is between two arrivals."""

    pair: int
    direct: bool
    sent: int
    received: int
    lost: int
    duplicates: int
    reordered: int
    longest_gap_s: float
    missing: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Latency:
    """Time from sending to arrival, in microseconds; `count` is the number of packets measured."""

    count: int
    p50_us: float
    p99_us: float
    p999_us: float
    max_us: float


@dataclass(frozen=True, slots=True)
class RtpReport:
    """What became of all streams.

    `foreign` are packets at a socket whose stream they are not, or with altered content; `late_slots` are the
    milliseconds that the generator itself slept through and made up for afterwards.
    """

    streams: tuple[StreamReport, ...]
    relayed: Latency
    direct: Latency
    foreign: int
    send_errors: int
    late_slots: int

    def total(self, field: str, *, direct: bool = False) -> int:
        """The sum of one field over the relayed (or the direct) streams."""
        return sum(int(getattr(stream, field)) for stream in self.streams if stream.direct == direct)


class RtpLoad:
    """Runs the generator, as an async context manager: `add` starts pairs, `measure` opens the window of interest."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._one_at_a_time = asyncio.Lock()

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "bench.rtpload",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 26,
        )
        await self._ask({"do": "hello"})
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._process is not None
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        await self._process.wait()

    @property
    def pid(self) -> int:
        """The generator's process."""
        assert self._process is not None
        return self._process.pid

    async def add(self, pairs: Sequence[Pair]) -> list[int]:
        """Bind the sockets of these pairs, then let their streams run; returns the numbers of the pairs.

        Raises:
            RuntimeError: an address cannot be bound.
        """
        answer = await self._ask({"do": "add", "pairs": [asdict(pair) for pair in pairs]})
        return [int(number) for number in answer["numbers"]]

    async def silence(self, numbers: Sequence[int]) -> None:
        """Stop the streams of these pairs; what is under way is still received."""
        await self._ask({"do": "silence", "numbers": list(numbers)})

    async def close(self, numbers: Sequence[int]) -> None:
        """Close the sockets of these pairs, which have been silenced; the report keeps what they have seen."""
        await self._ask({"do": "close", "numbers": list(numbers)})

    async def measure(self) -> None:
        """Forget the delays measured so far: the window of interest begins. Loss counts from each stream's start."""
        await self._ask({"do": "measure"})

    async def finish(self) -> RtpReport:
        """Stop sending, wait for what is under way, and report."""
        answer = await self._ask({"do": "finish"})
        streams = tuple(StreamReport(**{**row, "missing": tuple(row["missing"])}) for row in answer.pop("streams"))
        relayed, direct = Latency(**answer.pop("relayed")), Latency(**answer.pop("direct"))
        return RtpReport(streams=streams, relayed=relayed, direct=direct, **answer)

    async def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        async with asyncio.timeout(ANSWER_TIMEOUT_S), self._one_at_a_time:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            line = await self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the generator ended"}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer


class _End:
    """One socket of a pair: the stream it sends, and what it has received of the other's."""

    __slots__ = (
        "direct",
        "duplicates",
        "expected",
        "highest",
        "last_arrival_ns",
        "longest_gap_ns",
        "packet",
        "pair",
        "remote",
        "reordered",
        "seen",
        "sent",
        "socket",
        "stream",
    )

    def __init__(self, stream: int, expected: int, *, local: HostPort, remote: HostPort, direct: bool) -> None:
        self.pair, self.stream, self.expected, self.remote, self.direct = stream // 2, stream, expected, remote, direct
        family = socket.AF_INET6 if ":" in local[0] else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)
        self.socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self.socket.bind(local)
        self.packet = bytearray(b"\x80\x00" + bytes(_STAMP.size) + _pattern(stream))
        self.seen = bytearray()
        self.sent = self.duplicates = self.reordered = self.last_arrival_ns = self.longest_gap_ns = 0
        self.highest = -1

    def send(self) -> bool:
        number = self.sent
        self.sent = number + 1
        _STAMP.pack_into(
            self.packet,
            _STAMP_AT,
            number & 0xFFFF,
            number * SAMPLES_PER_PACKET & 0xFFFFFFFF,
            0x5EED0000 | self.stream,
            self.stream,
            number,
            time.time_ns(),
        )
        try:
            self.socket.sendto(self.packet, self.remote)
        except OSError:
            return False
        return True

    def note(self, number: int, arrival_ns: int) -> None:
        seen = self.seen
        if number >= len(seen):
            seen.extend(bytes(number + 1000 - len(seen)))
        if seen[number]:
            self.duplicates += 1
            return
        seen[number] = 1
        if number > self.highest:
            self.highest = number
        else:
            self.reordered += 1
        gap = arrival_ns - self.last_arrival_ns
        if gap > self.longest_gap_ns and self.last_arrival_ns:
            self.longest_gap_ns = gap
        self.last_arrival_ns = arrival_ns


class _Generator:
    """The loop: sends what is due in each slot, receives in between, obeys commands from standard input."""

    def __init__(self) -> None:
        self._ends: list[_End] = []
        self._slots: list[list[_End]] = [[] for _ in range(round(INTERVAL_S / SLOT_S))]
        self._by_descriptor: dict[int, _End] = {}
        self._relayed, self._direct = array("q"), array("q")
        self._foreign = self._send_errors = self._late_slots = self._tick = 0
        self._hushed = False
        self._epoll = select.epoll()
        self._timer = _periodic_timer(SLOT_S)
        self._epoll.register(self._timer, select.EPOLLIN)
        self._epoll.register(sys.stdin.fileno(), select.EPOLLIN)
        os.set_blocking(sys.stdin.fileno(), False)
        self._commands = b""

    def run(self) -> None:
        buffer = bytearray(2048)
        while True:
            for descriptor, _ in self._epoll.poll():
                if descriptor == self._timer:
                    self._send_due()
                elif (end := self._by_descriptor.get(descriptor)) is not None:
                    self._receive(end, buffer)
                elif not self._obey():
                    return

    def _send_due(self) -> None:
        try:
            ticks = int.from_bytes(os.read(self._timer, 8), sys.byteorder)
        except BlockingIOError:
            return  # `_drain` was called in between, and has read it
        self._late_slots += ticks - 1
        for _ in range(ticks):
            self._tick += 1
            if self._hushed:
                continue
            for end in self._slots[self._tick % len(self._slots)]:
                if not end.send():
                    self._send_errors += 1

    def _receive(self, end: _End, buffer: bytearray) -> None:
        try:
            size, ancillary, _, _ = end.socket.recvmsg_into((buffer,), _ANCILLARY_BYTES)
        except OSError:
            return
        _, _, _, stream, number, sent_ns = _STAMP.unpack_from(buffer, _STAMP_AT)
        if stream != end.expected or size != _PATTERN_AT + len(_pattern(0)) or buffer[size - 4 : size] != _tail(stream):
            self._foreign += 1
            return
        seconds, nanoseconds = _TIMESPEC.unpack(ancillary[0][2])
        arrival_ns = seconds * NS + nanoseconds
        end.note(number, arrival_ns)
        (self._direct if end.direct else self._relayed).append(arrival_ns - sent_ns)

    def _obey(self) -> bool:
        """Carry out the commands that have come; False when there is nobody left to give any."""
        data = os.read(sys.stdin.fileno(), 1 << 20)
        self._commands += data
        while b"\n" in self._commands:
            line, _, self._commands = self._commands.partition(b"\n")
            command = json.loads(line)
            try:
                answer = self._carry_out(command)
            except OSError as error:
                answer = {"error": str(error)}
            print(json.dumps(answer), flush=True)
        return bool(data)

    def _carry_out(self, command: dict[str, Any]) -> dict[str, Any]:
        match command["do"]:
            case "add":
                return {"numbers": [self._add(_pair(row)) for row in command["pairs"]]}
            case "silence":
                silent = {end for number in command["numbers"] for end in self._pair_ends(number)}
                self._slots = [[end for end in slot if end not in silent] for slot in self._slots]
            case "close":
                for number in command["numbers"]:
                    for end in self._pair_ends(number):
                        del self._by_descriptor[end.socket.fileno()]
                        end.socket.close()
            case "measure":
                self._relayed, self._direct = array("q"), array("q")
            case "finish":
                self._drain()
                return self._report()
            case _:
                pass
        return {}

    def _pair_ends(self, number: int) -> list[_End]:
        return self._ends[2 * number : 2 * number + 2]

    def _add(self, pair: Pair) -> int:
        number = len(self._ends)
        a = _End(number, number + 1, local=pair.a_local, remote=pair.a_remote, direct=pair.direct)
        b = _End(number + 1, number, local=pair.b_local, remote=pair.b_remote, direct=pair.direct)
        for end in (a, b):
            self._ends.append(end)
            self._by_descriptor[end.socket.fileno()] = end
            self._epoll.register(end.socket.fileno(), select.EPOLLIN)
            min(self._slots, key=len).append(end)
        return number // 2

    def _drain(self) -> None:
        self._hushed = True
        buffer = bytearray(2048)
        until = time.monotonic() + DRAIN_S
        while (left := until - time.monotonic()) > 0:
            for descriptor, _ in self._epoll.poll(left):
                if descriptor == self._timer:
                    os.read(self._timer, 8)
                elif (end := self._by_descriptor.get(descriptor)) is not None:
                    self._receive(end, buffer)

    def _report(self) -> dict[str, Any]:
        return {
            "streams": [asdict(_stream_report(end, self._ends[end.expected])) for end in self._ends],
            "relayed": asdict(_latency(self._relayed)),
            "direct": asdict(_latency(self._direct)),
            "foreign": self._foreign,
            "send_errors": self._send_errors,
            "late_slots": self._late_slots,
        }


def _pair(row: dict[str, Any]) -> Pair:
    """A pair from its JSON form, in which tuples are lists."""
    a_local, a_remote, b_local, b_remote = (
        (str(row[name][0]), int(row[name][1])) for name in ("a_local", "a_remote", "b_local", "b_remote")
    )
    return Pair(a_local, a_remote, b_local, b_remote, direct=bool(row["direct"]))


def _pattern(stream: int) -> bytes:
    """The payload after the stamp: fills the packet to 172 octets and ends with what only this stream ends with."""
    fill = PAYLOAD_BYTES + 12 - _PATTERN_AT - 4
    return bytes((stream + offset) & 0xFF for offset in range(fill)) + _tail(stream)


def _tail(stream: int) -> bytes:
    return (stream * 2654435761 & 0xFFFFFFFF).to_bytes(4, "big")


def _stream_report(sender: _End, receiver: _End) -> StreamReport:
    seen = receiver.seen[: sender.sent].ljust(sender.sent, b"\0")
    received = sum(seen)
    return StreamReport(
        pair=sender.pair,
        direct=sender.direct,
        sent=sender.sent,
        received=received,
        lost=sender.sent - received,
        duplicates=receiver.duplicates,
        reordered=receiver.reordered,
        longest_gap_s=receiver.longest_gap_ns / NS,
        missing=tuple(number for number, flag in enumerate(seen) if not flag)[:MAX_MISSING_LISTED],
    )


def _latency(nanoseconds: Sequence[int]) -> Latency:
    ordered = sorted(nanoseconds)
    count = len(ordered)
    if not count:
        return Latency(0, 0.0, 0.0, 0.0, 0.0)
    p50, p99, p999 = (ordered[min(count - 1, int(count * share))] / 1000 for share in (0.5, 0.99, 0.999))
    return Latency(count, p50, p99, p999, ordered[-1] / 1000)


def _periodic_timer(period_s: float) -> int:
    """A timerfd that fires each `period_s`; its reads tell how many periods have passed, so none is lost."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor: int = libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
    period_ns = round(period_s * NS)
    setting = struct.pack("qqqq", 0, period_ns, 0, period_ns)
    if descriptor < 0 or libc.timerfd_settime(descriptor, 0, setting, None) < 0:
        raise OSError(ctypes.get_errno(), "timerfd")
    return descriptor


if __name__ == "__main__":
    _Generator().run()
