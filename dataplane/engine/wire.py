"""How the userspace engine and its worker talk: frames of JSON over a stream socket pair.

A frame is its length in four octets, network order, and a JSON array: the message's class name and its fields in order,
values nested alike. Both ends are the same program, so there are no versions. Only the classes in `Message` can arise.
"""

import dataclasses
import json
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Union, get_args, get_origin, get_type_hints

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
    body = json.dumps([type(message).__name__, _plain(message)], separators=(",", ":")).encode()
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


def _plain(value: object) -> Any:
    if dataclasses.is_dataclass(value):
        return [_plain(getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    return value


def _decoder_of(hint: Any) -> Callable[[Any], Any]:
    """Make a function that turns plain data back into a value of this type, known from its annotation."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not types.NoneType)
        decode_inner = _decoder_of(inner)
        return lambda value: None if value is None else decode_inner(value)
    if origin is tuple and arguments[-1] is Ellipsis:
        decode_item = _decoder_of(arguments[0])
        return lambda value: tuple(map(decode_item, value))
    if origin is tuple:
        decoders = [_decoder_of(argument) for argument in arguments]
        return lambda value: tuple(decoder(item) for decoder, item in zip(decoders, value, strict=True))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        fields = [_decoder_of(hints[field.name]) for field in dataclasses.fields(hint)]
        return lambda value: hint(*(decoder(item) for decoder, item in zip(fields, value, strict=True)))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint
    return lambda value: value


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
_DECODERS: Final = {message.__name__: _decoder_of(message) for message in _MESSAGES}
