"""SIP messages for load: as much of RFC 3261's grammar as the PBX writes, cheaply."""

import hashlib
import re
import secrets
from dataclasses import dataclass

HostPort = tuple[str, int]

_MEDIA_HOST = re.compile(r"^c=IN IP[46] (\S+)", re.MULTILINE)
_MEDIA_PORT = re.compile(r"^m=audio (\d+)", re.MULTILINE)
_SESSION_NAME = re.compile(r"^s=(.*?)\r?$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Account:
    """A user of the PBX."""

    user: str
    password: str


class Message:
    """A parsed message: enough of it to keep a dialog."""

    __slots__ = ("body", "headers", "start")

    def __init__(self, data: bytes) -> None:
        head, _, body = data.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        self.start = lines[0]
        self.body = body.decode()
        self.headers: dict[str, list[str]] = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            self.headers.setdefault(name.strip().lower(), []).append(value.strip())

    def __getitem__(self, name: str) -> str:
        return self.headers[name][0]

    def get(self, name: str) -> str:
        """The first header of that name, "" without one."""
        values = self.headers.get(name)
        return values[0] if values else ""

    @property
    def status(self) -> int:
        """A response's status, 0 for a request."""
        return int(self.start.split(" ", 2)[1]) if self.start.startswith("SIP/") else 0

    @property
    def method(self) -> str:
        """The method of the request, or of the one that a response answers."""
        return self["cseq"].split()[1]

    @property
    def rtp(self) -> HostPort:
        """Where the SDP wants audio."""
        host, port = _MEDIA_HOST.search(self.body), _MEDIA_PORT.search(self.body)
        if host is None or port is None:
            raise ValueError(f"no audio in the SDP of {self.start!r}")
        return host[1], int(port[1])

    @property
    def name(self) -> str:
        """The name of the SDP session."""
        found = _SESSION_NAME.search(self.body)
        return found[1] if found else ""

    def response(self, status: int, reason: str, *, tag: str = "", extra: str = "", body: str = "") -> bytes:
        """A response to this request."""
        vias = "".join(f"Via: {via}\r\n" for via in self.headers["via"])
        routes = "".join(f"Record-Route: {route}\r\n" for route in self.headers.get("record-route", ()))
        to = self["to"] if ";tag=" in self["to"] or not tag else f"{self['to']};tag={tag}"
        return (
            f"SIP/2.0 {status} {reason}\r\n{vias}{routes}From: {self['from']}\r\nTo: {to}\r\n"
            f"Call-ID: {self['call-id']}\r\nCSeq: {self['cseq']}\r\n{extra}"
            f"Content-Length: {len(body)}\r\n\r\n{body}"
        ).encode()


def branch_of(via: str) -> str:
    """The transaction's branch in a Via."""
    return via.partition("branch=")[2].partition(";")[0].strip()


def host_of(address: HostPort) -> str:
    """The host as a URI writes it."""
    return f"[{address[0]}]" if ":" in address[0] else address[0]


def audio_sdp(name: str, rtp: HostPort) -> str:
    """An offer or answer of one PCMU line in a session of this name."""
    kind = "IP6" if ":" in rtp[0] else "IP4"
    return (
        f"v=0\r\no=- 1 1 IN {kind} {rtp[0]}\r\ns={name}\r\nc=IN {kind} {rtp[0]}\r\nt=0 0\r\n"
        f"m=audio {rtp[1]} RTP/AVP 0\r\na=rtpmap:0 PCMU/8000\r\na=sendrecv\r\n"
    )


def authorization(challenge: Message, method: str, uri: str, account: Account) -> str:
    """The header that answers a digest challenge (RFC 7616 section 3.4), by its first algorithm that we know."""
    proxy = challenge.status == 407
    for value in challenge.headers["proxy-authenticate" if proxy else "www-authenticate"]:
        given = {key: quoted or plain for key, quoted, plain in re.findall(r'(\w+)=(?:"([^"]*)"|([^\s,]+))', value)}
        algorithm = given.get("algorithm", "MD5")
        if algorithm in {"MD5", "SHA-256"}:
            break
    else:
        raise RuntimeError("no digest algorithm in common")

    def digest(text: str) -> str:
        return hashlib.new(algorithm.replace("-", ""), text.encode(), usedforsecurity=False).hexdigest()

    cnonce = secrets.token_hex(8)
    ha1, ha2 = digest(f"{account.user}:{given['realm']}:{account.password}"), digest(f"{method}:{uri}")
    proof = digest(f"{ha1}:{given['nonce']}:00000001:{cnonce}:auth:{ha2}")
    opaque = f', opaque="{given["opaque"]}"' if "opaque" in given else ""
    return (
        f'{"Proxy-" if proxy else ""}Authorization: Digest username="{account.user}", realm="{given["realm"]}", '
        f'nonce="{given["nonce"]}", uri="{uri}", response="{proof}", algorithm={algorithm}, cnonce="{cnonce}", '
        f"qop=auth, nc=00000001{opaque}\r\n"
    )
