"""How the userspace engine and its worker talk: frames of JSON over a stream socket pair.

A frame is its length in four octets, network order, and a JSON array: the message's class name and its fields in order,
values nested alike. Both ends are the same program, so there are no versions. Only the classes in `Message` can arise.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from dataplane.session.plain import decoder_of, plain
from dataplane.session.relay import (
    FirstPacket,
    LearnedSource,
    Resumed,
    Silence,
    SourceLatched,
    StreamEvent,
    StreamSnapshot,
)
from dataplane.session.spec import RelayPlan

HEADER_BYTES: Final = 4
MAX_FRAME_BYTES: Final = 1 << 24


@dataclass(frozen=True, slots=True)
class Apply:
    """Carry out a plan; answered by Applied or Refused. The last two restore a session that another worker had."""

    request_id: int
    plan: RelayPlan
    learned: tuple[LearnedSource, ...] = ()
    carried: tuple[StreamSnapshot, ...] = ()


@dataclass(frozen=True, slots=True)
class Remove:
    """Let go of a session; answered by Removed."""

    request_id: int
    session_id: str


@dataclass(frozen=True, slots=True)
class Collect:
    """Tell the figures of these sessions, or of all; answered by several Collected."""

    request_id: int
    session_ids: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Applied:
    """The plan is in force."""

    request_id: int


@dataclass(frozen=True, slots=True)
class Refused:
    """A port could not be bound; nothing was changed."""

    request_id: int
    address: str
    port: int
    errno: int


@dataclass(frozen=True, slots=True)
class Removed:
    """The session is gone; these were its figures."""

    request_id: int
    streams: tuple[StreamSnapshot, ...]


@dataclass(frozen=True, slots=True)
class SessionStreams:
    """The figures of one session."""

    session_id: str
    streams: tuple[StreamSnapshot, ...]


@dataclass(frozen=True, slots=True)
class Collected:
    """Some of the figures asked for; the last piece says so."""

    request_id: int
    sessions: tuple[SessionStreams, ...]
    last: bool


Request = Apply | Remove | Collect
Reply = Applied | Refused | Removed | Collected
Message = Request | Reply | StreamEvent


def encode(message: Message) -> bytes:
    """Return the frame of a message."""
    body = json.dumps([type(message).__name__, plain(message)], separators=(",", ":")).encode()
    return len(body).to_bytes(HEADER_BYTES, "big") + body


def decode(body: bytes) -> Message:
    """Return the message in a frame's body. Raises ValueError for what `encode` did not make."""
    name, fields = json.loads(body)
    decoder = _DECODERS.get(name)
    if decoder is None:
        raise ValueError(f"no message is called {name!r}")
    message: Message = decoder(fields)
    return message


class FrameBuffer:
    """Cuts what a stream socket delivers into frames."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Add what was received and yield the bodies of all frames that are whole. Raises ValueError past the limit."""
        self._data += data
        while len(self._data) >= HEADER_BYTES:
            end = HEADER_BYTES + int.from_bytes(self._data[:HEADER_BYTES], "big")
            if end > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {end} octets")
            if len(self._data) < end:
                return
            body = bytes(self._data[HEADER_BYTES:end])
            del self._data[:end]
            yield body


_MESSAGES: Final = (
    Apply,
    Remove,
    Collect,
    Applied,
    Refused,
    Removed,
    Collected,
    FirstPacket,
    SourceLatched,
    Silence,
    Resumed,
)
_DECODERS: Final = {message.__name__: decoder_of(message) for message in _MESSAGES}
