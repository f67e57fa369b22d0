"""SIP messages as a phone needs them: build text, read text (RFC 3261 section 7).

Left out: folding on output, header parameters with quoted semicolons, anything but UTF-8.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from sippbx.softphone.errors import MalformedError

SIP_VERSION = "SIP/2.0"
COMPACT_NAMES = {
    "v": "via",
    "f": "from",
    "t": "to",
    "i": "call-id",
    "m": "contact",
    "k": "supported",
    "l": "content-length",
}
_FOLD = re.compile(r"\r?\n[ \t]+")
_URI = re.compile(r"<([^>]*)>|([^;\s]+)")
_HOST_PORT = re.compile(r"^sips?:(?:[^@]*@)?(\[[^\]]+\]|[^:;?>]+)(?::(\d+))?")


@dataclass(frozen=True, slots=True)
class SipMessage:
    """A request or a response. Header names keep their spelling; look-ups ignore case and know the compact forms."""

    start_line: str
    headers: tuple[tuple[str, str], ...]
    body: str = ""

    @classmethod
    def parse(cls, data: bytes) -> "SipMessage":
        """Read one datagram.

        Raises:
            MalformedError: it has no start line, or a header line has no colon.
        """
        raw_head, _, raw_body = data.partition(b"\r\n\r\n")
        head = raw_head.decode("utf-8", "surrogateescape")
        start_line, *lines = _FOLD.sub(" ", head).split("\r\n")
        if SIP_VERSION not in start_line:
            raise MalformedError(f"not a SIP start line: {start_line[:80]!r}")
        headers = []
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon:
                raise MalformedError(f"not a header line: {line[:80]!r}")
            headers.append((name.strip(), value.strip()))
        message = cls(start_line, tuple(headers))
        # What exceeds Content-Length is no part of the message (RFC 3261 section 18.3).
        length = message.get("Content-Length")
        body = raw_body if length is None or not length.isdecimal() else raw_body[: int(length)]
        return replace(message, body=body.decode("utf-8", "surrogateescape"))

    def encode(self) -> bytes:
        """The datagram, with the Content-Length that belongs to the body."""
        body = self.body.encode("utf-8", "surrogateescape")
        kept = [f"{name}: {value}" for name, value in self.headers if name.lower() not in {"content-length", "l"}]
        lines = [self.start_line, *kept, f"Content-Length: {len(body)}"]
        return "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n" + body

    @property
    def is_request(self) -> bool:
        """Whether this is a request."""
        return not self.start_line.startswith(SIP_VERSION)

    @property
    def method(self) -> str:
        """The method of the request, or of the request that this response answers."""
        return self.start_line.split(" ", 1)[0] if self.is_request else self.require("CSeq").split()[-1]

    @property
    def uri(self) -> str:
        """The Request-URI."""
        return self.start_line.split(" ")[1]

    @property
    def status(self) -> int:
        """The status code of a response; 0 for a request."""
        return 0 if self.is_request else int(self.start_line.split(" ")[1])

    @property
    def reason(self) -> str:
        """The reason phrase of a response."""
        return self.start_line.split(" ", 2)[2]

    @property
    def cseq(self) -> int:
        """The sequence number of CSeq."""
        return int(self.require("CSeq").split()[0])

    @property
    def branch(self) -> str:
        """The branch of the topmost Via."""
        return parameter(self.require("Via"), "branch") or ""

    def get_all(self, name: str) -> list[str]:
        """The values of all header lines of this name, from the top."""
        wanted = name.lower()
        return [value for key, value in self.headers if COMPACT_NAMES.get(key.lower(), key.lower()) == wanted]

    def get(self, name: str) -> str | None:
        """The value of the first header line of this name."""
        return next(iter(self.get_all(name)), None)

    def require(self, name: str) -> str:
        """The value of the first header line of this name.

        Raises:
            MalformedError: there is none.
        """
        value = self.get(name)
        if value is None:
            raise MalformedError(f"no {name} in {self.start_line!r}")
        return value

    def tag(self, name: str) -> str:
        """The tag of From or To, "" where it has none."""
        return parameter(self.require(name), "tag") or ""


def request(method: str, uri: str, headers: Iterable[tuple[str, str]], body: str = "") -> SipMessage:
    """A request with these headers."""
    return SipMessage(f"{method} {uri} {SIP_VERSION}", tuple(headers), body)


def response(
    to: SipMessage, status: int, reason: str, *, to_tag: str = "", extra: Iterable[tuple[str, str]] = (), body: str = ""
) -> SipMessage:
    """The response to a request: Via lines, From, To, Call-ID and CSeq are copied (RFC 3261 section 8.2.6.2)."""
    to_value = to.require("To")
    if to_tag and not to.tag("To"):
        to_value += f";tag={to_tag}"
    headers = [("Via", value) for value in to.get_all("Via")]
    headers += [("Record-Route", value) for value in to.get_all("Record-Route")]
    headers += [("From", to.require("From")), ("To", to_value)]
    headers += [(name, to.require(name)) for name in ("Call-ID", "CSeq")]
    return SipMessage(f"{SIP_VERSION} {status} {reason}", (*headers, *extra), body)


def parameter(value: str, name: str) -> str | None:
    """A parameter of a header value, outside angle brackets; "" where it has no value, None where it is absent."""
    for part in value.rpartition(">")[2].split(";")[0 if ">" in value else 1 :]:
        key, _, content = part.strip().partition("=")
        if key.lower() == name:
            return content.strip().strip('"')
    return None


def uri_of(value: str) -> str:
    """The URI of a name-addr or addr-spec.

    Raises:
        MalformedError: there is none.
    """
    found = _URI.search(value)
    if found is None:
        raise MalformedError(f"no URI in {value[:80]!r}")
    return found[1] if found[1] is not None else found[2]


def host_port_of(uri: str) -> tuple[str, int]:
    """Host without brackets and port, 5060 where the URI names none (RFC 3261 section 19.1.2).

    Raises:
        MalformedError: it is not a SIP URI.
    """
    found = _HOST_PORT.match(uri)
    if found is None:
        raise MalformedError(f"not a SIP URI: {uri[:80]!r}")
    return found[1].strip("[]"), int(found[2] or 5060)


def uri_host(host: str) -> str:
    """A host as URIs write it: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host
