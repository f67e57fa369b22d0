"""SIP messages: framing, header fields, and what routing needs of them (RFC 3261 sections 7, 8.1.1, 8.2.6, 18.3).

Parsing is to routing depth: start line, header index and the fields without which no response can be built or matched.
All other fields are text until asked for; one that is unknown or malformed fails nobody but who asks for its value.
Text is UTF-8 in which other octets survive as surrogates, so what came in goes out octet for octet. A field name is
written in its standard spelling, and fields of one name are written together, in their order (section 7.3.1).
Left out: message bodies (see control.sip.sdp) and framing of byte streams.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from control.sip.errors import LocalProtocolError, RemoteProtocolError
from control.sip.headers import METHODS, CSeq, NameAddr, Via, is_token, parse_decimal, split_commas
from control.sip.names import KEYS, SPELLINGS, key_of

T = TypeVar("T")

MAX_MESSAGE_BYTES: Final = 65535
MAX_HEADERS: Final = 128
MAX_EXPIRES_S: Final = 2**32 - 1
MAX_FORWARDS: Final = 255

REASON_PHRASES: Final[dict[int, str]] = {
    100: "Trying",
    180: "Ringing",
    181: "Call Is Being Forwarded",
    182: "Queued",
    183: "Session Progress",
    199: "Early Dialog Terminated",
    200: "OK",
    202: "Accepted",
    204: "No Notification",
    300: "Multiple Choices",
    301: "Moved Permanently",
    302: "Moved Temporarily",
    305: "Use Proxy",
    380: "Alternative Service",
    400: "Bad Request",
    401: "Unauthorized",
    402: "Payment Required",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    406: "Not Acceptable",
    407: "Proxy Authentication Required",
    408: "Request Timeout",
    410: "Gone",
    412: "Conditional Request Failed",
    413: "Request Entity Too Large",
    414: "Request-URI Too Long",
    415: "Unsupported Media Type",
    416: "Unsupported URI Scheme",
    417: "Unknown Resource-Priority",
    420: "Bad Extension",
    421: "Extension Required",
    422: "Session Interval Too Small",
    423: "Interval Too Brief",
    424: "Bad Location Information",
    425: "Bad Alert Message",
    428: "Use Identity Header",
    429: "Provide Referrer Identity",
    430: "Flow Failed",
    433: "Anonymity Disallowed",
    436: "Bad Identity Info",
    437: "Unsupported Credential",
    438: "Invalid Identity Header",
    439: "First Hop Lacks Outbound Support",
    440: "Max-Breadth Exceeded",
    469: "Bad Info Package",
    470: "Consent Needed",
    480: "Temporarily Unavailable",
    481: "Call/Transaction Does Not Exist",
    482: "Loop Detected",
    483: "Too Many Hops",
    484: "Address Incomplete",
    485: "Ambiguous",
    486: "Busy Here",
    487: "Request Terminated",
    488: "Not Acceptable Here",
    489: "Bad Event",
    491: "Request Pending",
    493: "Undecipherable",
    494: "Security Agreement Required",
    500: "Server Internal Error",
    501: "Not Implemented",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Server Time-out",
    505: "Version Not Supported",
    513: "Message Too Large",
    555: "Push Notification Service Not Supported",
    580: "Precondition Failure",
    600: "Busy Everywhere",
    603: "Decline",
    604: "Does Not Exist Anywhere",
    606: "Not Acceptable",
    607: "Unwanted",
    608: "Rejected",
}

_CLASS_PHRASES: Final = {1: "Progress", 2: "Success", 3: "Redirect", 4: "Client Error", 5: "Server Error", 6: "Refused"}

_WSP: Final = " \t"
_END_OF_HEAD: Final = re.compile(rb"\r?\n\r?\n")
_VERSION: Final = re.compile(r"SIP/[0-9]+\.[0-9]+", re.IGNORECASE)
_SINGLE: Final = ("from", "to", "call-id", "cseq")


class Headers:
    """The header fields of a message: an ordered multimap with case-insensitive names and compact forms expanded.

    Keeps the typed value of a field next to it until the field changes.
    """

    __slots__ = ("_parsed", "_spelling", "_values")

    def __init__(self, items: Iterable[tuple[str, str]] = ()) -> None:
        self._values: dict[str, list[str]] = {}
        self._spelling: dict[str, str] = {}
        self._parsed: dict[str, Any] = {}
        for name, value in items:
            self.add(name, value)

    @classmethod
    def parse(cls, lines: list[str]) -> Headers:
        """Index header lines, folded ones too (RFC 3261 section 7.3.1).

        A line without a colon or a name is dropped: nobody can ask for it.
        """
        headers = cls()
        values = headers._values
        keys = KEYS
        present: list[str] | None = None
        for line in lines:
            name, colon, value = line.partition(":")
            key = keys.get(name)
            if key is None:
                if line[:1] in _WSP:
                    if present is not None:
                        present[-1] = f"{present[-1]} {line.strip(_WSP)}".strip(_WSP)
                    continue
                key = key_of(name)
                if not colon or not key:
                    present = None
                    continue
                headers._keep_spelling(key, name)
            present = values.get(key)
            if present is None:
                values[key] = present = [value.strip(_WSP)]
            else:
                present.append(value.strip(_WSP))
        return headers

    def get(self, name: str) -> str | None:
        """The first value of `name`, or None."""
        values = self._values.get(key_of(name))
        return values[0] if values else None

    def get_all(self, name: str) -> list[str]:
        """The values of `name`, one for each header line."""
        return list(self._values.get(key_of(name), ()))

    def get_list(self, name: str) -> list[str]:
        """The comma-separated elements of all lines of `name`, in order (RFC 3261 section 7.3.1)."""
        elements: list[str] = []
        for value in self._values.get(key_of(name), ()):
            elements += split_commas(value)
        return elements

    def add(self, name: str, value: str) -> None:
        """Append a line."""
        self._values.setdefault(self._changed(name), []).append(value)

    def insert(self, name: str, value: str) -> None:
        """Put a line in front of the first one of that name, or at the top of the message."""
        key = self._changed(name)
        present = self._values.get(key)
        if present is None:
            self._values = {key: [value], **self._values}
        else:
            present.insert(0, value)

    def set(self, name: str, value: str) -> None:
        """Replace all lines of that name by one, in their place."""
        self._values[self._changed(name)] = [value]

    def set_all(self, name: str, values: list[str]) -> None:
        """Replace all lines of that name by these, in their place; none removes the name."""
        if values:
            self._values[self._changed(name)] = list(values)
        else:
            self.remove(name)

    def remove(self, name: str) -> None:
        """Remove all lines of that name, if there are any."""
        self._values.pop(self._changed(name), None)

    def items(self) -> Iterator[tuple[str, str]]:
        """Name and value of each line, as they are written."""
        for key, values in self._values.items():
            name = SPELLINGS.get(key) or self._spelling[key]
            for value in values:
                yield name, value

    def copy(self) -> Headers:
        """An independent copy."""
        copy = Headers()
        copy._values = {key: values[:] for key, values in self._values.items()}
        copy._spelling = self._spelling.copy()
        copy._parsed = self._parsed.copy()
        return copy

    def parsed(self, key: str, parse: Callable[[Headers], T]) -> T:
        """What `parse` makes of these headers, remembered until the field `key` (lower case, long form) changes."""
        value: T | None = self._parsed.get(key)
        if value is None:
            value = self._parsed[key] = parse(self)
        return value

    def copy_from(self, other: Headers, *names: str) -> None:
        """Take over all lines of these names, as they are."""
        for name in names:
            self.set_all(name, other._values.get(key_of(name), []))

    def require(self, key: str) -> str:
        """The first value of the field `key` (lower case, long form).

        Raises:
            RemoteProtocolError: 400, there is none.
        """
        values = self._values.get(key)
        if not values:
            raise RemoteProtocolError(400, "missing header field", SPELLINGS.get(key, key))
        return values[0]

    def forbid_repetition(self, key: str) -> None:
        """Check that there is one line at most of a field that may be there once.

        Raises:
            RemoteProtocolError: 400, there are more: readers might pick different ones.
        """
        if len(self._values.get(key, "?")) != 1:
            raise RemoteProtocolError(400, "more than one header field", SPELLINGS[key])

    def _changed(self, name: str) -> str:
        """The key of a name about to be changed."""
        key = key_of(name)
        self._parsed.pop(key, None)
        self._keep_spelling(key, name)
        return key

    def _keep_spelling(self, key: str, name: str) -> None:
        if key not in SPELLINGS:
            self._spelling.setdefault(key, name.strip(_WSP))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and key_of(name) in self._values

    def __len__(self) -> int:
        return sum(map(len, self._values.values()))

    def __eq__(self, other: object) -> bool:
        return self._values == other._values if isinstance(other, Headers) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Headers({list(self.items())!r})"


def _read(key: str, parse: Callable[[str], T], text: str) -> T:
    try:
        return parse(text)
    except RemoteProtocolError as error:
        raise RemoteProtocolError(error.status, error.message, SPELLINGS[key]) from error


def _read_all(key: str, parse: Callable[[str], T], headers: Headers) -> list[T]:
    return [_read(key, parse, element) for element in headers.get_list(key)]


def _parse_via(headers: Headers) -> Via:
    text = headers.require("via")
    if "," in text:
        text = next(iter(split_commas(text)), "")
    return _read("via", Via.parse, text)


def _parse_from(headers: Headers) -> NameAddr:
    return _read("from", NameAddr.parse, headers.require("from"))


def _parse_to(headers: Headers) -> NameAddr:
    return _read("to", NameAddr.parse, headers.require("to"))


def _parse_cseq(headers: Headers) -> CSeq:
    return CSeq.parse(headers.require("cseq"))


def _parse_contacts(headers: Headers) -> list[NameAddr]:
    return [] if headers.get("contact") == "*" else _read_all("contact", NameAddr.parse, headers)


def _parse_max_forwards(headers: Headers) -> int | None:
    text = headers.get("max-forwards")
    if text is None:
        return None
    value = parse_decimal(text, MAX_FORWARDS)
    if value is None:
        raise RemoteProtocolError(400, "not a number up to 255", "Max-Forwards")
    return value


def _parse_content_type(headers: Headers) -> str:
    return (headers.get("content-type") or "").partition(";")[0].strip(_WSP).lower()


@dataclass(slots=True)
class Message:
    """What requests and responses share. The typed values are parsed when first asked for.

    Each of them raises RemoteProtocolError(400) when the field is malformed, or missing where it is mandatory.
    """

    headers: Headers
    body: bytes

    @property
    def via(self) -> Via:
        """The topmost Via value."""
        return self.headers.parsed("via", _parse_via)

    @property
    def vias(self) -> list[Via]:
        """All Via values, topmost first."""
        return _read_all("via", Via.parse, self.headers)

    @property
    def from_(self) -> NameAddr:
        """The From value."""
        return self.headers.parsed("from", _parse_from)

    @property
    def to(self) -> NameAddr:
        """The To value."""
        return self.headers.parsed("to", _parse_to)

    @property
    def call_id(self) -> str:
        """The Call-ID value, as it is."""
        return self.headers.require("call-id")

    @property
    def cseq(self) -> CSeq:
        """The CSeq value."""
        return self.headers.parsed("cseq", _parse_cseq)

    @property
    def contacts(self) -> list[NameAddr]:
        """All Contact values; none for `*`, see `is_wildcard_contact`."""
        return list(self.headers.parsed("contact", _parse_contacts))

    @property
    def contact(self) -> NameAddr | None:
        """The first Contact value."""
        contacts = self.headers.parsed("contact", _parse_contacts)
        return contacts[0] if contacts else None

    @property
    def is_wildcard_contact(self) -> bool:
        """Whether Contact is `*`: all bindings (RFC 3261 section 10.2.2)."""
        return self.headers.get("contact") == "*"

    @property
    def content_type(self) -> str:
        """The media type of the body in lower case, without parameters; "" when not given."""
        return self.headers.parsed("content-type", _parse_content_type)

    @property
    def max_forwards(self) -> int | None:
        """The hops left, from 0 to 255."""
        return self.headers.parsed("max-forwards", _parse_max_forwards)

    @property
    def require(self) -> frozenset[str]:
        """The option tags that the sender insists on."""
        return frozenset(self.headers.get_list("require"))

    @property
    def supported(self) -> frozenset[str]:
        """The option tags that the sender understands."""
        return frozenset(self.headers.get_list("supported"))

    @property
    def allow(self) -> frozenset[str]:
        """The methods that the sender accepts."""
        return frozenset(self.headers.get_list("allow"))

    @property
    def expires(self) -> int | None:
        """Seconds; None when absent or malformed, 2**32 - 1 at most (section 20.19)."""
        text = self.headers.get("expires")
        if text is None or not (text.isascii() and text.isdigit()):
            return None
        value = parse_decimal(text, MAX_EXPIRES_S)
        return MAX_EXPIRES_S if value is None else value

    @property
    def route(self) -> list[NameAddr]:
        """The Route values, next hop first."""
        return _read_all("route", NameAddr.parse, self.headers)

    @property
    def record_route(self) -> list[NameAddr]:
        """The Record-Route values, as they stand."""
        return _read_all("record-route", NameAddr.parse, self.headers)

    @property
    def user_agent(self) -> str | None:
        """The User-Agent value, for people."""
        return self.headers.get("user-agent")

    def _encode(self, start_line: str) -> bytes:
        lines = [start_line]
        for name, value in self.headers.items():
            if name != "Content-Length":
                lines.append(f"{name}: {value}")
        lines.append(f"Content-Length: {len(self.body)}\r\n\r\n")
        head = "\r\n".join(lines)
        breaks = len(lines) + 1
        if head.count("\n") != breaks or head.count("\r") != breaks:
            raise LocalProtocolError("line break in a start line or header field")
        return head.encode("utf-8", "surrogateescape") + self.body


@dataclass(slots=True, init=False)
class Request(Message):
    """A SIP request; `uri` is the Request-URI as text."""

    method: str
    uri: str

    def __init__(self, method: str, uri: str, headers: Headers, body: bytes = b"") -> None:
        self.method = method
        self.uri = uri
        self.headers = headers
        self.body = body

    def encode(self) -> bytes:
        """The request as it goes on the wire, with the right Content-Length.

        Raises:
            LocalProtocolError: a field holds a line break, which would let its author add fields of his own.
        """
        return self._encode(f"{self.method} {self.uri} SIP/2.0")


@dataclass(slots=True, init=False)
class Response(Message):
    """A SIP response."""

    status: int
    reason: str

    def __init__(self, status: int, reason: str, headers: Headers, body: bytes = b"") -> None:
        self.status = status
        self.reason = reason
        self.headers = headers
        self.body = body

    def encode(self) -> bytes:
        """The response as it goes on the wire, with the right Content-Length.

        Raises:
            LocalProtocolError: a field holds a line break, which would let its author add fields of his own.
        """
        return self._encode(f"SIP/2.0 {self.status} {self.reason}")


def build_request(
    method: str, uri: str, *, from_: str, to: str, call_id: str, cseq: int, max_forwards: int = 70
) -> Request:
    """A request with the fields that each must have, save Via, which the transaction layer adds.

    See RFC 3261 section 8.1.1.
    """
    headers = Headers()
    headers.add("Max-Forwards", str(max_forwards))
    headers.add("From", from_)
    headers.add("To", to)
    headers.add("Call-ID", call_id)
    headers.add("CSeq", f"{cseq} {method}")
    return Request(method, uri, headers)


def build_response(request: Request, status: int, reason: str | None = None, *, to_tag: str | None = None) -> Response:
    """The response to `request` with what it must copy (RFC 3261 section 8.2.6.2): Via, From, To, Call-ID, CSeq.

    `to_tag` is added where To has no tag yet; an unreadable To is echoed as it came. A 100 gets Timestamp, too.
    Record-Route is the business of whoever creates a dialog (section 12.1.1).
    """
    headers = Headers()
    headers.copy_from(request.headers, "Via", "From", "To", "Call-ID", "CSeq")
    if to_tag is not None and _lacks_tag(request):
        headers.set("To", f"{request.headers.get('To')};tag={to_tag}")
    if status == 100:
        headers.copy_from(request.headers, "Timestamp")
    if reason is None:
        reason = REASON_PHRASES.get(status) or _CLASS_PHRASES[status // 100]
    return Response(status, reason, headers)


def _lacks_tag(request: Request) -> bool:
    try:
        return request.to.tag is None
    except RemoteProtocolError:
        return False


def parse_message(data: bytes) -> Request | Response:
    """The message in one datagram, checked to routing depth.

    Bare line feeds and folded lines are tolerated, octets after the Content-Length are cut off.

    Raises:
        RemoteProtocolError: 505 for another version than SIP/2.0, 513 above MAX_MESSAGE_BYTES, else 400; with `request`
            set when the message is a request that can be answered.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise RemoteProtocolError(513, f"more than {MAX_MESSAGE_BYTES} octets")
    lines, body = _split_lines(data)
    start_line = lines[0]
    too_many = len(lines) > MAX_HEADERS + 1
    headers = Headers.parse(lines[1 : MAX_HEADERS + 1])
    if start_line[:4].upper() == "SIP/":
        response = _parse_status_line(start_line, headers)
        if too_many:
            raise RemoteProtocolError(400, f"more than {MAX_HEADERS} header fields")
        _check(response)
        response.body = _cut_body(headers, body)
        return response
    method, _, rest = start_line.partition(" ")
    uri, _, version = rest.rpartition(" ")
    request = Request(method, uri, headers)
    try:
        if too_many:
            raise RemoteProtocolError(400, f"more than {MAX_HEADERS} header fields")
        _check_request_line(request, version)
        _check(request)
        if request.cseq.method != method:
            raise RemoteProtocolError(400, "method differs from the request's", "CSeq")
        request.max_forwards  # noqa: B018  loops cannot be stopped without it
        request.body = _cut_body(headers, body)
    except RemoteProtocolError as error:
        answerable = request if _is_answerable(request) else None
        raise RemoteProtocolError(error.status, error.message, error.header, answerable) from error
    return request


def _split_lines(data: bytes) -> tuple[list[str], bytes]:
    """Start line and header lines, and what follows the empty line."""
    if data[:1] in b"\r\n":
        data = data.lstrip(b"\r\n")  # RFC 3261 section 7.5
    end = data.find(b"\r\n\r\n")
    head = data[: max(end, 0)].decode("utf-8", "surrogateescape")
    body = data[end + 4 :]
    lines = head.split("\r\n")
    if end < 0 or head.count("\n") != len(lines) - 1:
        match = _END_OF_HEAD.search(data)
        if match is None:
            raise RemoteProtocolError(400, "no empty line after the header")
        head = data[: match.start()].decode("utf-8", "surrogateescape").replace("\r\n", "\n").replace("\n", "\r\n")
        body = data[match.end() :]
        lines = head.split("\r\n")
    if head.count("\r") != len(lines) - 1:
        raise RemoteProtocolError(400, "carriage return without line feed")
    return lines, body


def _check_request_line(request: Request, version: str) -> None:
    if version != "SIP/2.0" and version.upper() != "SIP/2.0":
        if _VERSION.fullmatch(version):
            raise RemoteProtocolError(505, "only SIP/2.0 is spoken here")
        raise RemoteProtocolError(400, "malformed request line")
    uri = request.uri
    if request.method not in METHODS and not is_token(request.method):
        raise RemoteProtocolError(400, "malformed method")
    if not uri or uri[0] == "<" or " " in uri or "\t" in uri:
        raise RemoteProtocolError(400, "malformed request line")


def _parse_status_line(line: str, headers: Headers) -> Response:
    version, _, rest = line.partition(" ")
    code, _, reason = rest.partition(" ")
    status = parse_decimal(code, 699)
    if status is None or status < 100 or len(code) != 3:
        raise RemoteProtocolError(400, "malformed status line")
    if version.upper() != "SIP/2.0":
        raise RemoteProtocolError(505, "only SIP/2.0 is spoken here")
    return Response(status, reason, headers)


def _check(message: Message) -> None:
    """Demand what matching and answering need: top Via, From, To, Call-ID and CSeq, each readable."""
    headers = message.headers
    message.via  # noqa: B018  parsed, or it raises
    for key in _SINGLE:
        headers.forbid_repetition(key)
    message.from_  # noqa: B018
    message.to  # noqa: B018
    message.cseq  # noqa: B018
    if not message.call_id:
        raise RemoteProtocolError(400, "empty", "Call-ID")


def _cut_body(headers: Headers, rest: bytes) -> bytes:
    """The body by Content-Length; without one it is all that is left of the datagram (RFC 3261 section 18.3)."""
    lengths = headers.get_all("Content-Length")
    if not lengths:
        return rest
    length = parse_decimal(lengths[0], MAX_MESSAGE_BYTES)
    if length is None or (len(lengths) > 1 and len(set(lengths)) > 1):
        raise RemoteProtocolError(400, "not one number", "Content-Length")
    if length > len(rest):
        raise RemoteProtocolError(400, "more than the datagram holds", "Content-Length")
    return rest[:length]


def _is_answerable(request: Request) -> bool:
    """Whether a response can be built that finds its way and its transaction, and whether there may be one."""
    if request.method == "ACK" or not all(key in request.headers for key in _SINGLE):
        return False
    try:
        request.via  # noqa: B018
    except RemoteProtocolError:
        return False
    return True
