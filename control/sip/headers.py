"""Values of SIP header fields: URIs, addresses, Via, CSeq, RAck (RFC 3261 sections 19.1, 20 and 25; RFC 3262).

Each value is frozen; `X.parse(text)` reads it and `str(x)` writes it so that parsing again gives an equal value.
Parsing is lenient where receivers must be (white space, unknown parameters, other URI schemes) and strict where two
readers could disagree about who is meant. Names of parameters keep their spelling and are compared without case.
Left out: comparison of URIs (section 19.1.4) and the comments of RFC 2543 in Via.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import unquote

from control.sip.errors import RemoteProtocolError

Params = tuple[tuple[str, str | None], ...]

METHODS: Final = frozenset(
    "INVITE ACK BYE CANCEL OPTIONS REGISTER PRACK UPDATE INFO REFER SUBSCRIBE NOTIFY MESSAGE PUBLISH".split()  # noqa: SIM905
)
MAX_CSEQ: Final = 2**31 - 1
MAX_PORT: Final = 65535

_WSP: Final = " \t"
_HOST: Final = r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9._-]+))"
_SIP_URI: Final = re.compile(
    r"(?:(?P<user>[^:@\s<>\"]+)(?::(?P<password>[^@\s<>\"]*))?@)?"
    + _HOST
    + r"(?::(?P<port>[0-9]{1,5}))?(?P<params>;[^?\s<>\"]*)?(?:\?(?P<headers>[^\s<>\"]*))?"
)
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
_OPAQUE: Final = re.compile(r"[^\s<>\"]+")
_SENT_PROTOCOL: Final = re.compile(
    r"SIP[ \t]*/[ \t]*[0-9]\.[0-9][ \t]*/[ \t]*([A-Za-z0-9.!%*_+`'~-]+)[ \t]+", re.IGNORECASE
)
_SENT_BY: Final = re.compile(_HOST + r"(?:[ \t]*:[ \t]*(?P<port>[0-9]{1,5}))?")
_QUOTED: Final = re.compile(r'"([^"\\]*(?:\\.[^"\\]*)*)"', re.DOTALL)
_QUOTED_PAIR: Final = re.compile(r"\\(.)", re.DOTALL)
_STRUCTURE: Final = re.compile(r'[\\"<>,;]')
_TOKEN: Final = re.compile(r"[A-Za-z0-9.!%*_+`'~-]+")


def is_token(text: str) -> bool:
    """Whether `text` is a token (RFC 3261 section 25.1): the alphabet of methods, tags and parameter names."""
    return _TOKEN.fullmatch(text) is not None


def parse_decimal(text: str, maximum: int) -> int | None:
    """The value of 1*DIGIT up to `maximum`, or None for anything else; safe for digits of any number and script."""
    if text.isdigit() and text.isascii() and len(text) <= 20 and (value := int(text)) <= maximum:
        return value
    return None


def quote(text: str) -> str:
    """`text` as a quoted-string (RFC 3261 section 25.1)."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def unquote_string(text: str) -> str:
    """The content of a quoted-string; a text without quotes is returned as it is."""
    if len(text) >= 2 and text[0] == '"' and text[-1] == '"':
        text = text[1:-1]
        return _QUOTED_PAIR.sub(r"\1", text) if "\\" in text else text
    return text


def split_commas(text: str) -> list[str]:
    """The elements of a comma-separated value; commas in quoted strings and between angle brackets do not count.

    Elements are stripped of white space, empty ones are dropped.
    """
    return [element for part in _split(text, ",") if (element := part.strip(_WSP))]


def parse_params(text: str) -> Params:
    """The parameters in `;name=value;flag`, in order; a leading semicolon is optional, quoted values stay quoted.

    Raises:
        RemoteProtocolError: 400, a parameter has no name.
    """
    params: list[tuple[str, str | None]] = []
    for part in _split(text, ";"):
        name, equals, value = part.partition("=")
        name = name.strip(_WSP)
        if name:
            params.append((name, value.strip(_WSP) if equals else None))
        elif equals:
            raise RemoteProtocolError(400, "parameter without a name")
    return tuple(params)


def _split(text: str, separator: str) -> list[str]:
    """`text` cut at each separator outside quoted strings and angle brackets; one pass, whatever a peer sends."""
    if separator not in text:
        return [text]
    if '"' not in text and "<" not in text:
        return text.split(separator)
    parts = []
    start = 0
    escaped_at = -1
    closing = ""
    for mark in _STRUCTURE.finditer(text):
        character = mark.group()
        at = mark.start()
        if closing:
            if character == "\\" and closing == '"' and at != escaped_at:
                escaped_at = at + 1
            elif character == closing and at != escaped_at:
                closing = ""
        elif character == '"':
            closing = '"'
        elif character == "<":
            closing = ">"
        elif character == separator:
            parts.append(text[start:at])
            start = at + 1
    parts.append(text[start:])
    return parts


def _find_param(params: Params, name: str) -> str | None:
    for key, value in params:
        if key == name or key.lower() == name:
            return unquote_string(value) if value is not None else ""
    return None


def _format_params(params: Params) -> str:
    return "".join([f";{name}" if value is None else f";{name}={value}" for name, value in params])


def _replace_param(params: Params, name: str, value: str | None) -> Params:
    """`params` with `name` set: in the place of its first occurrence, else at the end."""
    position = next((i for i, (key, _) in enumerate(params) if key.lower() == name), len(params))
    others = [param for param in params if param[0].lower() != name]
    others.insert(position, (name, value))
    return tuple(others)


def _parse_port(text: str) -> int:
    port = int(text)
    if port > MAX_PORT:
        raise RemoteProtocolError(400, f"port {port} out of range")
    return port


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


@dataclass(frozen=True, slots=True)
class Uri:
    """A URI (RFC 3261 section 19.1).

    `host` of IPv6 is kept without brackets; `user`, `password`, `params` and `headers` are kept escaped, as on the
    wire. A URI of another scheme than sip and sips (tel:, urn:, ...) has an empty host and its text after the colon in
    `opaque`.
    """

    scheme: str
    user: str | None
    host: str
    port: int | None = None
    params: Params = ()
    headers: str = ""
    password: str | None = None
    opaque: str = ""

    @classmethod
    def parse(cls, text: str) -> Uri:
        """Read a URI, without angle brackets around it.

        Raises:
            RemoteProtocolError: 400, `text` is no URI.
        """
        scheme, colon, rest = text.partition(":")
        if scheme != "sip":
            scheme = scheme.lower()
            if not colon or not _SCHEME.fullmatch(scheme):
                raise RemoteProtocolError(400, "URI without a scheme")
            if scheme not in ("sip", "sips"):
                if not _OPAQUE.fullmatch(rest):
                    raise RemoteProtocolError(400, f"malformed {scheme} URI")
                return cls(scheme, None, "", opaque=rest)
        match = _SIP_URI.fullmatch(rest)
        if match is None:
            raise RemoteProtocolError(400, f"malformed {scheme} URI")
        user, password, v6, host, port, params, headers = match.groups()
        return cls(
            scheme,
            user,
            v6 or host,
            _parse_port(port) if port else None,
            parse_params(params) if params else (),
            headers or "",
            password,
        )

    def __str__(self) -> str:
        if self.opaque:
            return f"{self.scheme}:{self.opaque}"
        text = f"{self.scheme}:"
        if self.user is not None:
            text += f"{self.user}@" if self.password is None else f"{self.user}:{self.password}@"
        text += _bracketed(self.host)
        if self.port is not None:
            text += f":{self.port}"
        if self.params:
            text += _format_params(self.params)
        return f"{text}?{self.headers}" if self.headers else text

    @property
    def username(self) -> str | None:
        """The user part with its escapes resolved (section 19.1.2)."""
        user = self.user
        return unquote(user, errors="surrogateescape") if user is not None and "%" in user else user

    def param(self, name: str) -> str | None:
        """The value of a URI parameter, "" when it has none, None when it is absent; `name` in lower case."""
        return _find_param(self.params, name) if self.params else None


@dataclass(frozen=True, slots=True)
class NameAddr:
    """A URI with display name and header parameters: From, To, Contact, Route (RFC 3261 section 20.10).

    `display_name` is unquoted text. Without angle brackets all parameters belong to the header field, not to the URI.
    """

    uri: Uri
    display_name: str | None = None
    params: Params = ()

    @classmethod
    def parse(cls, text: str) -> NameAddr:
        """Read one name-addr or addr-spec with its header parameters, without white space around it.

        Raises:
            RemoteProtocolError: 400, `text` is neither.
        """
        display_name = None
        if text[:1] == '"':
            match = _QUOTED.match(text)
            if match is None:
                raise RemoteProtocolError(400, "unterminated quoted string")
            display_name = match[1] if "\\" not in match[1] else _QUOTED_PAIR.sub(r"\1", match[1])
            before, bracket, rest = text[match.end() :].partition("<")
            if not bracket or before.strip(_WSP):
                raise RemoteProtocolError(400, "display name without an address in angle brackets")
        else:
            before, bracket, rest = text.partition("<")
            if not bracket:
                return cls._parse_addr_spec(text)
            if before:
                display_name = before.strip(_WSP) or None
                if '"' in before:
                    raise RemoteProtocolError(400, "stray quotation mark in display name")
        addr_spec, bracket, tail = rest.partition(">")
        if not bracket:
            raise RemoteProtocolError(400, "unterminated angle bracket")
        if tail and tail[0] != ";":
            tail = tail.strip(_WSP)
            if tail and tail[0] != ";":
                raise RemoteProtocolError(400, "text after the address")
        return cls(Uri.parse(addr_spec), display_name, parse_params(tail) if tail else ())

    @classmethod
    def _parse_addr_spec(cls, text: str) -> NameAddr:
        addr_spec, semicolon, tail = text.partition(";")
        if "?" in addr_spec or "," in addr_spec:
            raise RemoteProtocolError(400, "address with ? or comma needs angle brackets")
        return cls(Uri.parse(addr_spec.strip(_WSP)), None, parse_params(tail) if semicolon else ())

    def __str__(self) -> str:
        text = f"<{self.uri}>" if self.display_name is None else f"{quote(self.display_name)} <{self.uri}>"
        return text + _format_params(self.params) if self.params else text

    @property
    def tag(self) -> str | None:
        """The tag parameter (section 19.3); None when absent or empty."""
        return _find_param(self.params, "tag") or None

    def with_tag(self, tag: str) -> NameAddr:
        """The same address with this tag."""
        return replace(self, params=_replace_param(self.params, "tag", tag))

    def param(self, name: str) -> str | None:
        """The value of a header parameter, unquoted; "" when it has none, None when absent; `name` in lower case."""
        return _find_param(self.params, name)


@dataclass(frozen=True, slots=True)
class Via:
    """One Via value (RFC 3261 section 20.42). `transport` is in upper case, `host` of IPv6 without brackets.

    The version is read over, so that a request of another one can be answered, and written as 2.0.
    """

    transport: str
    host: str
    port: int | None = None
    params: Params = ()

    @classmethod
    def parse(cls, text: str) -> Via:
        """Read one Via value.

        Raises:
            RemoteProtocolError: 400, `text` is no Via value.
        """
        if text.startswith("SIP/2.0/UDP "):
            transport, rest = "UDP", text[12:]
        else:
            protocol = _SENT_PROTOCOL.match(text)
            if protocol is None:
                raise RemoteProtocolError(400, "malformed sent-protocol", "Via")
            transport, rest = protocol[1].upper(), text[protocol.end() :]
        sent_by, _, tail = rest.partition(";")
        match = _SENT_BY.fullmatch(sent_by.strip(_WSP))
        if match is None:
            raise RemoteProtocolError(400, "malformed sent-by", "Via")
        v6, host, port = match.groups()
        return cls(transport, v6 or host, _parse_port(port) if port else None, parse_params(tail) if tail else ())

    def __str__(self) -> str:
        port = "" if self.port is None else f":{self.port}"
        return f"SIP/2.0/{self.transport} {_bracketed(self.host)}{port}{_format_params(self.params)}"

    @property
    def branch(self) -> str:
        """The branch parameter; "" when absent, as RFC 2543 allowed (section 17.2.3)."""
        return _find_param(self.params, "branch") or ""

    @property
    def received(self) -> str | None:
        """The numeric source that the receiver noted, without brackets (section 18.2.1)."""
        value = _find_param(self.params, "received")
        return value.strip("[]") if value else None

    @property
    def rport(self) -> str | None:
        """The source port that the receiver noted, "" when it was only asked for, None when absent (RFC 3581)."""
        return _find_param(self.params, "rport")

    def param(self, name: str) -> str | None:
        """The value of a Via parameter, unquoted; "" when it has none, None when absent; `name` in lower case."""
        return _find_param(self.params, name)

    def with_params(self, **params: str) -> Via:
        """The same value with these parameters set, in place where they were already."""
        merged = self.params
        for name, value in params.items():
            merged = _replace_param(merged, name, value or None)
        return replace(self, params=merged)


@dataclass(frozen=True, slots=True)
class CSeq:
    """A CSeq value (RFC 3261 section 20.16); `number` is below 2**31, `method` is case-sensitive."""

    number: int
    method: str

    @classmethod
    def parse(cls, text: str) -> CSeq:
        """Read a CSeq value.

        Raises:
            RemoteProtocolError: 400, not a number below 2**31 and a method.
        """
        parts = text.split()
        number = parse_decimal(parts[0], MAX_CSEQ) if len(parts) == 2 else None
        if number is None or (parts[1] not in METHODS and not is_token(parts[1])):
            raise RemoteProtocolError(400, "malformed sequence number or method", "CSeq")
        return cls(number, parts[1])

    def __str__(self) -> str:
        return f"{self.number} {self.method}"


@dataclass(frozen=True, slots=True)
class RAck:
    """A RAck value: the RSeq and CSeq of the provisional response that a PRACK acknowledges (RFC 3262 section 7.2)."""

    rseq: int
    cseq: int
    method: str

    @classmethod
    def parse(cls, text: str) -> RAck:
        """Read a RAck value.

        Raises:
            RemoteProtocolError: 400, not an RSeq from 1 to 2**32 - 1 followed by a CSeq value.
        """
        parts = text.split(None, 1)
        rseq = parse_decimal(parts[0], 2**32 - 1) if len(parts) == 2 else None
        if not rseq:
            raise RemoteProtocolError(400, "malformed response number", "RAck")
        cseq = CSeq.parse(parts[1])
        return cls(rseq, cseq.number, cseq.method)

    def __str__(self) -> str:
        return f"{self.rseq} {self.cseq} {self.method}"
