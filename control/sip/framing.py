"""Messages out of a stream of octets (RFC 3261 sections 7.5, 18.3), and pings between them (RFC 5626 section 4.4.1).

A message ends where its Content-Length says, and nothing else tells where the next one begins: a stream that has lost
its way is never found again, so the first fault is the last thing that is read from it.
"""

import re
from enum import Enum
from typing import Final

from control.sip.message import MAX_MESSAGE_BYTES

MAX_HEAD_BYTES: Final = 32_768
PONG: Final = b"\r\n"

_BREAK: Final = b"\r\n"
_PING: Final = b"\r\n\r\n"
# As control.sip.message has it: bare line feeds are tolerated.
_END_OF_HEAD: Final = re.compile(rb"\n\r?\n")
_LENGTHS: Final = re.compile(rb"\n(?:content-length|l)[ \t]*:((?:[^\r\n]|\r?\n[ \t])*)", re.IGNORECASE)
_NUMBER: Final = re.compile(rb"[0-9]{1,9}")


class KeepAlive(Enum):
    """What stands between messages and is to be answered."""

    PING = "ping"


class Framer:
    """Cuts one direction of one connection into messages.

    It holds no more than one message that is not complete, and the chunk fed last. `broken` says why nothing more can
    be read; what `next` gave last is then the head of the message at fault, if there was a whole one, which the stack
    will refuse.
    """

    __slots__ = ("_buffer", "_scanned", "_total", "broken")

    def __init__(self) -> None:
        self.broken: str | None = None
        self._buffer = bytearray()
        self._scanned = 0  # octets known not to end the head
        self._total = 0  # length of the message at the front, once its head is there

    @property
    def started(self) -> bool:
        """Whether there is a part of a message, of which the rest must come."""
        return bool(self._buffer) and self._buffer[0] not in _BREAK

    def feed(self, data: bytes) -> None:
        """Take what was read."""
        if self.broken is None:
            self._buffer += data

    def next(self) -> bytes | KeepAlive | None:
        """The next message or ping; None until more was fed, or for ever when the stream is broken."""
        buffer = self._buffer
        while buffer[:1] == b"\r":
            if buffer[:4] == _PING:
                del buffer[:4]
                return KeepAlive.PING
            if _PING.startswith(buffer):
                return None  # perhaps the begin of a ping
            if buffer[:2] != _BREAK:
                break
            del buffer[:2]  # a pong, or what section 7.5 tolerates before a start line
        if not buffer:
            return None
        if not self._total and (end := self._read_head()) is not None:
            return end
        if not self._total or len(buffer) < self._total:
            return None
        return self._take(self._total)

    def _read_head(self) -> bytes | None:
        """Find the length of the message; the head alone when it cannot be had."""
        buffer = self._buffer
        if not 0x21 <= buffer[0] <= 0x7E:
            return self._break("it is not SIP")
        found = _END_OF_HEAD.search(buffer, max(0, self._scanned - 2))
        end = found.end() if found else len(buffer)
        if end > MAX_HEAD_BYTES:
            return self._break(f"a header of more than {MAX_HEAD_BYTES} octets")
        if found is None:
            self._scanned = len(buffer)
            return None
        lengths = {value.strip() for value in _LENGTHS.findall(buffer, 0, end)}
        if not lengths:
            return self._break("a message without Content-Length", end)
        length = lengths.pop()
        if lengths or not _NUMBER.fullmatch(length):
            return self._break("a Content-Length that is not one number", end)
        if end + int(length) > MAX_MESSAGE_BYTES:
            return self._break(f"a message of more than {MAX_MESSAGE_BYTES} octets", end)
        self._total = end + int(length)
        return None

    def _break(self, why: str, head: int = 0) -> bytes | None:
        self.broken = why
        last = self._take(head) if head else None
        self._buffer.clear()
        return last

    def _take(self, count: int) -> bytes:
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        self._scanned = self._total = 0
        return taken
