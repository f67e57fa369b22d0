"""RTP of a phone: numbered frames out, exact bookkeeping of what comes in (RFC 3550 sections 5.1 and 6.4).

Every payload names its stream and its frame, and the rest of it follows from these two. So a receiver can tell each
lost, repeated, reordered, foreign and damaged packet without being told what was sent. Nothing here is audible speech.
"""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from sippbx.softphone.errors import DeadlineError, SoftphoneError

_RTP_HEADER = struct.Struct("!BBHII")
_FRAME = struct.Struct("!II")
_SENDER_REPORT = struct.Struct("!BBHIQIII")
_SDES = struct.Struct("!BBHIBB")
_RTP_VERSION = 0x80
_MARKER = 0x80
_SENDER_REPORT_TYPE = 200
_SDES_TYPE = 202
_CNAME_ITEM = 1
_SDES_END = bytes(4)
_MAX_DATAGRAM_BYTES = 65535
_FILLER = bytes(range(256)) * 8


@dataclass(frozen=True, slots=True)
class RtpFormat:
    """What a line sends: one packet of `payload_bytes` each `interval_s` seconds."""

    kind: str
    payload_type: int
    encoding: str
    clock_rate: int
    payload_bytes: int
    interval_s: float


PCMU = RtpFormat("audio", 0, "PCMU/8000", 8000, 160, 0.02)
H264 = RtpFormat("video", 96, "H264/90000", 90000, 900, 0.04)
FORMATS = {"audio": PCMU, "video": H264}


@dataclass(slots=True)
class RtpReport:
    """What one endpoint sent and what it received, counted in packets.

    `lost` and `reordered` are against the frame numbers in the payloads, from the first frame to the highest one seen.
    `damaged` are packets whose header or content is not what a phone like this one sends.
    """

    sent: int = 0
    received: int = 0
    duplicates: int = 0
    reordered: int = 0
    damaged: int = 0
    rtcp_sent: int = 0
    rtcp_received: int = 0
    highest_frame: int = -1
    frames: set[int] = field(default_factory=set)
    streams: set[int] = field(default_factory=set)
    sources: set[tuple[str, int]] = field(default_factory=set)

    @property
    def lost(self) -> int:
        """Frames below the highest one that never came."""
        return self.highest_frame + 1 - len(self.frames)

    def missing_of(self, sent: int) -> list[int]:
        """Which of the frames 0 to `sent` - 1 did not arrive."""
        return [frame for frame in range(sent) if frame not in self.frames]


def frame_payload(stream: int, frame: int, length: int) -> bytes:
    """The payload of a frame: stream and frame number, then octets that follow from both and differ between frames."""
    first = (stream + frame) & 0xFF
    return _FRAME.pack(stream, frame) + _FILLER[first : first + length - _FRAME.size]


class RtpEndpoint:
    """A pair of UDP sockets, RTP on an even port and RTCP on the next, that sends one stream and counts what arrives.

    `stream` is the number in the payloads and the SSRC of what is sent. Port 0 takes a free even port whose successor
    is free, too. It needs a running event loop.

    Raises:
        OSError: the address or the port cannot be had.
    """

    def __init__(self, host: str, port: int = 0, *, media: RtpFormat = PCMU, stream: int = 1) -> None:
        self.media = media
        self.stream = stream
        self.report = RtpReport()
        self.remote: tuple[str, int] | None = None
        self.remote_rtcp: tuple[str, int] | None = None
        self._rtp, self._rtcp = _bind_pair(host, port)
        self._sender: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._rtp, self._drain, self._rtp, self._receive_rtp)
        self._loop.add_reader(self._rtcp, self._drain, self._rtcp, self._receive_rtcp)

    @property
    def port(self) -> int:
        """The local RTP port."""
        port: int = self._rtp.getsockname()[1]
        return port

    def connect(self, host: str, port: int, rtcp_port: int | None = None) -> None:
        """Send to this address from now on."""
        self.remote = (host, port)
        self.remote_rtcp = (host, port + 1 if rtcp_port is None else rtcp_port)

    def send_frame(self) -> None:
        """Send the next frame.

        Raises:
            SoftphoneError: nobody said where to.
        """
        frame = self.report.sent
        second = self.media.payload_type | (_MARKER if frame == 0 else 0)
        header = _RTP_HEADER.pack(_RTP_VERSION, second, frame & 0xFFFF, self._timestamp(), self.stream)
        self._send(self._rtp, header + frame_payload(self.stream, frame, self.media.payload_bytes), self.remote)
        self.report.sent += 1

    def send_sender_report(self) -> None:
        """Send an RTCP sender report with an SDES CNAME (RFC 3550 sections 6.4.1 and 6.5.1).

        Raises:
            SoftphoneError: nobody said where to.
        """
        packets = self.report.sent & 0xFFFFFFFF
        octets = self.report.sent * self.media.payload_bytes & 0xFFFFFFFF
        report = (_RTP_VERSION, _SENDER_REPORT_TYPE, 6, self.stream, 0, self._timestamp(), packets, octets)
        name = b"phone-%08x" % self.stream
        description = (_RTP_VERSION | 1, _SDES_TYPE, 6, self.stream, _CNAME_ITEM, len(name))
        packet = _SENDER_REPORT.pack(*report) + _SDES.pack(*description) + name + _SDES_END
        self._send(self._rtcp, packet, self.remote_rtcp)
        self.report.rtcp_sent += 1

    async def send_frames(self, count: int) -> None:
        """Send `count` frames at the pace of the format, the first at once."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        for _ in range(count):
            self.send_frame()
            due += self.media.interval_s
            await asyncio.sleep(max(0.0, due - loop.time()))

    def start_sending(self) -> None:
        """Send frames in the background, a sender report every 50 of them, until `stop_sending`."""
        if self._sender is None:
            self._sender = asyncio.get_running_loop().create_task(self._send_for_ever())

    async def stop_sending(self) -> None:
        """Stop what `start_sending` began."""
        if self._sender is not None:
            self._sender.cancel()
            await asyncio.wait([self._sender])
            self._sender = None

    async def wait_for(self, packets: int, deadline_s: float, *, rtcp_packets: int = 0) -> None:
        """Wait until so many RTP and RTCP packets have arrived.

        Raises:
            DeadlineError: they have not, in time.
        """
        end = self._loop.time() + deadline_s
        while self.report.received < packets or self.report.rtcp_received < rtcp_packets:
            if self._loop.time() > end:
                came, wanted = (self.report.received, self.report.rtcp_received), (packets, rtcp_packets)
                raise DeadlineError(f"after {deadline_s} s {came} RTP and RTCP packets have arrived, not {wanted}")
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        """Stop sending and give the ports back; may be repeated."""
        await self.stop_sending()
        for sock in (self._rtp, self._rtcp):
            if sock.fileno() >= 0:
                self._loop.remove_reader(sock)
                sock.close()

    def _timestamp(self) -> int:
        return int(self.report.sent * self.media.interval_s * self.media.clock_rate) & 0xFFFFFFFF

    @staticmethod
    def _send(sock: socket.socket, packet: bytes, remote: tuple[str, int] | None) -> None:
        if remote is None:
            raise SoftphoneError("RTP cannot be sent before the far end's address is known")
        # A relay that is gone answers with ICMP, which Linux reports on the next call; RTP does not care.
        with contextlib.suppress(ConnectionRefusedError, BlockingIOError):
            sock.sendto(packet, remote)

    @staticmethod
    def _drain(sock: socket.socket, receive: Callable[[bytes, tuple[str, int]], None]) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionRefusedError):
            while True:
                data, source = sock.recvfrom(_MAX_DATAGRAM_BYTES)
                receive(data, (source[0], source[1]))

    async def _send_for_ever(self) -> None:
        while True:
            await self.send_frames(50)
            self.send_sender_report()

    def _receive_rtp(self, data: bytes, source: tuple[str, int]) -> None:
        report = self.report
        report.received += 1
        report.sources.add(source)
        if len(data) < _RTP_HEADER.size + _FRAME.size:
            report.damaged += 1
            return
        first, second, sequence, _, ssrc = _RTP_HEADER.unpack_from(data)
        stream, frame = _FRAME.unpack_from(data, _RTP_HEADER.size)
        header = first, second & ~_MARKER, sequence, ssrc
        payload = frame_payload(stream, frame, self.media.payload_bytes)
        if header != (_RTP_VERSION, self.media.payload_type, frame & 0xFFFF, stream) or data[12:] != payload:
            report.damaged += 1
            return
        report.streams.add(stream)
        if frame in report.frames:
            report.duplicates += 1
        elif frame < report.highest_frame:
            report.reordered += 1
        report.frames.add(frame)
        report.highest_frame = max(report.highest_frame, frame)

    def _receive_rtcp(self, _: bytes, source: tuple[str, int]) -> None:
        self.report.rtcp_received += 1
        self.report.sources.add(source)


def _bind_pair(host: str, port: int) -> tuple[socket.socket, socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for attempt in range(32, 0, -1):
        rtp, rtcp = socket.socket(family, socket.SOCK_DGRAM), socket.socket(family, socket.SOCK_DGRAM)
        try:
            rtp.setblocking(False)
            rtcp.setblocking(False)
            rtp.bind((host, port))
            chosen = rtp.getsockname()[1]
            if chosen % 2 == 0:
                rtcp.bind((host, chosen + 1))
                return rtp, rtcp
        except OSError:
            if port or attempt == 1:
                rtp.close()
                rtcp.close()
                raise
        rtp.close()
        rtcp.close()
    raise OSError(f"no pair of free UDP ports on {host}")
