"""Session descriptions: reading, writing, and anchoring their media at this PBX (RFC 8866, 3264, 3605, 5761).

Lines that the PBX has no opinion on are kept as they came, in order. Reading tolerates bare line feeds, a missing last
line end and missing `s=` and `t=`. Left out: what attributes mean beyond direction, RTCP and payload types; times;
multicast (a TTL is dropped).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from control.sip.address import Address
from control.sip.errors import RemoteProtocolError
from control.sip.headers import MAX_PORT, parse_decimal

MAX_MEDIA_LINES: Final = 32
MAX_PAYLOAD_TYPE: Final = 127
MAX_CLOCK_RATE: Final = 2**31 - 1

_NULL_ADDRESSES: Final = ("0.0.0.0", "::")
# What tells of the far end's hosts and people, or of ways to its media that lead around us.
_REVEALING_LINES: Final = ("u=", "e=", "p=", "k=")
_REVEALING_ATTRIBUTES: Final = ("candidate", "remote-candidates", "end-of-candidates", "source-filter", "tool")


class Direction(StrEnum):
    """Which way media flows on a line, seen from the author of the description (RFC 3264 section 5.1)."""

    SENDRECV = "sendrecv"
    SENDONLY = "sendonly"
    RECVONLY = "recvonly"
    INACTIVE = "inactive"

    @property
    def sends(self) -> bool:
        """Whether the author sends."""
        return self in (Direction.SENDRECV, Direction.SENDONLY)

    @property
    def receives(self) -> bool:
        """Whether the author receives."""
        return self in (Direction.SENDRECV, Direction.RECVONLY)

    @property
    def reversed(self) -> Direction:
        """The same flow seen from the other end."""
        return _REVERSED.get(self, self)


_REVERSED: Final = {Direction.SENDONLY: Direction.RECVONLY, Direction.RECVONLY: Direction.SENDONLY}


@dataclass(frozen=True, slots=True)
class PayloadType:
    """An RTP payload type, its encoding and its clock rate in Hz."""

    number: int
    encoding_name: str
    clock_rate: int


# RFC 3551 section 6, tables 4 and 5.
_STATIC_PAYLOAD_TYPES: Final = {
    number: PayloadType(number, name, rate)
    for number, name, rate in (
        (0, "PCMU", 8000),
        (3, "GSM", 8000),
        (4, "G723", 8000),
        (5, "DVI4", 8000),
        (6, "DVI4", 16000),
        (7, "LPC", 8000),
        (8, "PCMA", 8000),
        (9, "G722", 8000),
        (10, "L16", 44100),
        (11, "L16", 44100),
        (12, "QCELP", 8000),
        (13, "CN", 8000),
        (14, "MPA", 90000),
        (15, "G728", 8000),
        (16, "DVI4", 11025),
        (17, "DVI4", 22050),
        (18, "G729", 8000),
        (25, "CelB", 90000),
        (26, "JPEG", 90000),
        (28, "nv", 90000),
        (31, "H261", 90000),
        (32, "MPV", 90000),
        (33, "MP2T", 90000),
        (34, "H263", 90000),
    )
}


@dataclass(frozen=True, slots=True)
class Origin:
    """The author, and the identity and version of the description (RFC 8866 section 5.2).

    `session_version` is a number wherever the peer kept to the grammar.
    """

    username: str
    session_id: str
    session_version: int | str
    address: str

    @classmethod
    def parse(cls, text: str) -> Origin:
        """Read the value of an `o=` line.

        Raises:
            RemoteProtocolError: 400, not six fields of network type IN.
        """
        fields = text.split()
        if len(fields) != 6 or fields[3] != "IN":
            raise RemoteProtocolError(400, "malformed o= line in SDP")
        version = parse_decimal(fields[2], 2**64 - 1)
        return cls(fields[0], fields[1], fields[2] if version is None else version, fields[5])

    def __str__(self) -> str:
        return f"{self.username} {self.session_id} {self.session_version} {_network_address(self.address)}"


@dataclass(frozen=True, slots=True)
class MediaDescription:
    """One `m=` line and what belongs to it.

    `address` is that of its own `c=`, None where the session's counts. `lines` are all other lines as they came.
    """

    kind: str
    port: int
    protocol: str
    formats: tuple[str, ...]
    address: str | None = None
    lines: tuple[str, ...] = ()
    port_count: int = 1

    @classmethod
    def parse(cls, lines: Sequence[str]) -> MediaDescription:
        """Read an `m=` line and the lines up to the next one.

        Raises:
            RemoteProtocolError: 400, malformed `m=` or `c=` line.
        """
        fields = lines[0][2:].split()
        if len(fields) < 3:
            raise RemoteProtocolError(400, "malformed m= line in SDP")
        kind, port_text, protocol, *formats = fields
        port_text, slash, count_text = port_text.partition("/")
        port = parse_decimal(port_text, MAX_PORT)
        count = parse_decimal(count_text, MAX_PORT) if slash else 1
        if port is None or not count or (port and not formats):
            raise RemoteProtocolError(400, "malformed m= line in SDP")
        address, others = _take_address(lines[1:])
        return cls(kind, port, protocol, tuple(formats), address, others, count)

    def attribute(self, name: str) -> str | None:
        """The value of the first `a=name`, "" when it has none, None when there is no such attribute."""
        return _attribute(self.lines, name)

    @property
    def direction(self) -> Direction | None:
        """The direction that the line itself states."""
        return _direction(self.lines)

    @property
    def rtcp(self) -> tuple[int, str | None] | None:
        """Port and address of `a=rtcp` (RFC 3605); the address is None when it is the line's own."""
        fields = (self.attribute("rtcp") or "").split()
        port = parse_decimal(fields[0], MAX_PORT) if len(fields) in (1, 4) else None
        return (port, fields[3] if len(fields) == 4 else None) if port else None

    @property
    def rtcp_mux(self) -> bool:
        """Whether RTP and RTCP may share the port (RFC 5761 section 5.1.1)."""
        return self.attribute("rtcp-mux") is not None

    @property
    def payload_types(self) -> tuple[PayloadType, ...]:
        """The payload types of an RTP line, in order of preference.

        A dynamic one that no `a=rtpmap` explains has no encoding name and the usual clock rate of its kind.
        """
        if "RTP/" not in self.protocol.upper():
            return ()
        mapped: dict[int, PayloadType] = {}
        for value in _attributes(self.lines, "rtpmap"):
            payload_type = _parse_rtpmap(value)
            if payload_type is not None:
                mapped.setdefault(payload_type.number, payload_type)
        found: dict[int, PayloadType] = {}
        for text in self.formats:
            number = parse_decimal(text, MAX_PAYLOAD_TYPE)
            if number is not None:
                unexplained = PayloadType(number, "", 8000 if self.kind == "audio" else 90000)
                found[number] = mapped.get(number) or _STATIC_PAYLOAD_TYPES.get(number) or unexplained
        return tuple(found.values())

    def encode_lines(self) -> Iterator[str]:
        """The lines as they are written, without their ends."""
        port = str(self.port) if self.port_count == 1 else f"{self.port}/{self.port_count}"
        yield " ".join((f"m={self.kind}", port, self.protocol, *self.formats))
        yield from _with_address(self.lines, self.address, ("i=",))


@dataclass(frozen=True, slots=True)
class SessionDescription:
    """A session description; `lines` are the session-level lines but `v=`, `o=`, `s=` and `c=`, as they came."""

    origin: Origin
    session_name: str
    address: str | None
    lines: tuple[str, ...]
    media: tuple[MediaDescription, ...]

    @classmethod
    def parse(cls, body: bytes) -> SessionDescription:
        """Read a description.

        Raises:
            RemoteProtocolError: 400, the text is no session description; the message tells what is wrong.
        """
        lines = _split_lines(body)
        if lines[:1] != ["v=0"]:
            raise RemoteProtocolError(400, "SDP does not start with v=0")
        starts = [i for i, line in enumerate(lines) if line.startswith("m=")]
        if len(starts) > MAX_MEDIA_LINES:
            raise RemoteProtocolError(400, f"more than {MAX_MEDIA_LINES} m= lines in SDP")
        ends = [*starts, len(lines)][1:]
        media = tuple(MediaDescription.parse(lines[start:end]) for start, end in zip(starts, ends, strict=True))
        origin: Origin | None = None
        session_name = "-"
        others = []
        for line in lines[1 : starts[0] if starts else None]:
            if line.startswith("o="):
                origin = Origin.parse(line[2:])
            elif line.startswith("s="):
                session_name = line[2:] or "-"
            else:
                others.append(line)
        if origin is None:
            raise RemoteProtocolError(400, "no o= line in SDP")
        address, kept = _take_address(others)
        if address is None and any(line.port and line.address is None for line in media):
            raise RemoteProtocolError(400, "no c= line in SDP for a line in use")
        return cls(origin, session_name, address, _with_time(kept), media)

    def encode(self) -> bytes:
        """The description as a message body."""
        lines = ["v=0", f"o={self.origin}", f"s={self.session_name}"]
        lines += _with_address(self.lines, self.address, ("i=", "u=", "e=", "p="))
        for media in self.media:
            lines += media.encode_lines()
        return ("\r\n".join(lines) + "\r\n").encode("utf-8", "surrogateescape")

    def address_of(self, i: int) -> str | None:
        """The connection address of line `i`: its own, else the session's."""
        return self.media[i].address or self.address

    def direction_of(self, i: int) -> Direction:
        """The direction of line `i`: its own, else the session's, else sendrecv (RFC 8866 section 6.7).

        An author whose address is 0.0.0.0 holds in the old style: it receives nothing (RFC 3264 section 8.4).
        """
        direction = self.media[i].direction or _direction(self.lines) or Direction.SENDRECV
        if self.address_of(i) in _NULL_ADDRESSES:
            return Direction.SENDONLY if direction.sends else Direction.INACTIVE
        return direction

    def with_direction(self, direction: Direction) -> SessionDescription:
        """The same description with this direction on each line, whatever it said before."""
        stated = tuple(f"a={word}" for word in Direction)

        def without(lines: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(line for line in lines if line not in stated)

        media = tuple(replace(line, lines=(*without(line.lines), f"a={direction}")) for line in self.media)
        return replace(self, lines=without(self.lines), media=media)

    def rtp_address_of(self, i: int) -> Address | None:
        """Where the author of line `i` wants RTP; None on port 0, in an old-style hold and for a host name."""
        return self._address(i, self.media[i].port, None)

    def rtcp_address_of(self, i: int, *, mux: bool | None = None) -> Address | None:
        """Where the author of line `i` wants RTCP; None where RTP has no address either.

        `mux` tells what was agreed; without it, `a=rtcp-mux` in this description decides (RFC 5761 section 5.1.1).
        """
        media = self.media[i]
        if not media.port or (media.rtcp_mux if mux is None else mux):
            return self._address(i, media.port, None)
        port, address = media.rtcp or (media.port + 1, None)
        return self._address(i, port, address)

    def _address(self, i: int, port: int, address: str | None) -> Address | None:
        host = address or self.address_of(i)
        if not 0 < port <= MAX_PORT or host is None or host in _NULL_ADDRESSES or not _is_numeric(host):
            return None
        return Address(host, port)


def anchor(
    sdp: SessionDescription, *, origin: Origin, address: str, ports: Sequence[tuple[int, int] | None]
) -> SessionDescription:
    """The description `sdp` as ours: its media at `address`, nothing left that tells of the hosts behind it.

    `ports` has an RTP and RTCP port for each line, or None for a line to be rejected; a line that was on port 0 stays
    there.

    Raises:
        ValueError: `ports` does not have an entry for each line.
    """
    return SessionDescription(
        origin,
        sdp.session_name,
        address,
        tuple(line for line in sdp.lines if not _is_revealing(line)),
        tuple(_anchor_line(sdp, i, pair) for i, (_, pair) in enumerate(zip(sdp.media, ports, strict=True))),
    )


def _anchor_line(sdp: SessionDescription, i: int, ports: tuple[int, int] | None) -> MediaDescription:
    media = sdp.media[i]
    lines = [line for line in media.lines if not _is_revealing(line)]
    if sdp.address_of(i) in _NULL_ADDRESSES:
        # Our address takes the place of the one that said hold, so the direction has to say it.
        lines = [line for line in lines if line[2:] not in tuple(Direction)]
        lines.append(f"a={sdp.direction_of(i)}")
    rtp_port, rtcp_port = ports if ports is not None and media.port else (0, 0)
    stated = [at for at, line in enumerate(lines) if line.startswith("a=rtcp:")]
    for at in reversed(stated):
        del lines[at]
    if rtp_port and (stated or (rtcp_port != rtp_port + 1 and not media.rtcp_mux)):
        lines.insert(stated[0] if stated else len(lines), f"a=rtcp:{rtcp_port}")
    return replace(media, port=rtp_port, address=None, lines=tuple(lines), port_count=1)


def _is_revealing(line: str) -> bool:
    if line.startswith("a="):
        name = line[2:].partition(":")[0]
        return name.startswith("ice-") or name in _REVEALING_ATTRIBUTES
    return line.startswith(_REVEALING_LINES)


def _split_lines(body: bytes) -> list[str]:
    text = body.decode("utf-8", "surrogateescape").replace("\r\n", "\n")
    if "\r" in text or "\0" in text:
        raise RemoteProtocolError(400, "stray control character in SDP")
    lines = [line for line in text.split("\n") if line]
    for line in lines:
        if line[1:2] != "=":
            raise RemoteProtocolError(400, "SDP line without a type")
    return lines


def _take_address(lines: Sequence[str]) -> tuple[str | None, tuple[str, ...]]:
    """The address of the first `c=` line, and the lines that are no `c=` lines."""
    address = None
    others = []
    for line in lines:
        if not line.startswith("c="):
            others.append(line)
            continue
        fields = line[2:].split()
        host = fields[2].partition("/")[0] if len(fields) == 3 and fields[0] == "IN" else ""
        if not host:
            raise RemoteProtocolError(400, "malformed c= line in SDP")
        address = address or host
    return address, tuple(others)


def _with_address(lines: Sequence[str], address: str | None, before: tuple[str, ...]) -> Iterator[str]:
    """`lines` with a `c=` line at its place, behind leading lines of the types `before`."""
    at = next((i for i, line in enumerate(lines) if not line.startswith(before)), len(lines))
    yield from lines[:at]
    if address is not None:
        yield f"c={_network_address(address)}"
    yield from lines[at:]


def _with_time(lines: tuple[str, ...]) -> tuple[str, ...]:
    """`lines` with the `t=` line that every description must have (RFC 8866 section 5.9)."""
    if any(line.startswith("t=") for line in lines):
        return lines
    at = next((i for i, line in enumerate(lines) if not line.startswith(("i=", "u=", "e=", "p=", "b="))), len(lines))
    return (*lines[:at], "t=0 0", *lines[at:])


def _network_address(address: str) -> str:
    return f"IN {'IP6' if ':' in address else 'IP4'} {address}"


def _is_numeric(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return "%" not in host


def _attributes(lines: Sequence[str], name: str) -> Iterator[str]:
    flag, prefix = f"a={name}", f"a={name}:"
    for line in lines:
        if line.startswith(prefix):
            yield line[len(prefix) :]
        elif line == flag:
            yield ""


def _attribute(lines: Sequence[str], name: str) -> str | None:
    return next(_attributes(lines, name), None)


def _direction(lines: Sequence[str]) -> Direction | None:
    return next((direction for line in lines for direction in Direction if line == f"a={direction}"), None)


def _parse_rtpmap(value: str) -> PayloadType | None:
    number_text, _, encoding = value.partition(" ")
    name, _, rest = encoding.strip().partition("/")
    number = parse_decimal(number_text, MAX_PAYLOAD_TYPE)
    rate = parse_decimal(rest.partition("/")[0], MAX_CLOCK_RATE)
    return PayloadType(number, name, rate) if number is not None and rate and name else None
