"""Session descriptions as a phone writes and reads them: one format a line (RFC 8866, RFC 3264)."""

from collections.abc import Sequence
from dataclasses import dataclass

from sippbx.softphone.errors import MalformedError
from sippbx.softphone.media import RtpEndpoint

OPPOSITE = {"sendrecv": "sendrecv", "sendonly": "recvonly", "recvonly": "sendonly", "inactive": "inactive"}


@dataclass(frozen=True, slots=True)
class RemoteLine:
    """One line of the far end's description; port 0 is a refused line."""

    kind: str
    host: str
    port: int
    rtcp_port: int
    direction: str


def describe(host: str, lines: Sequence[RtpEndpoint], *, identity: tuple[int, int], direction: str = "sendrecv") -> str:
    """An offer or answer with a line for each endpoint; `identity` is session id and version."""
    session, version = identity
    family = "IP6" if ":" in host else "IP4"
    text = ["v=0", f"o=- {session} {version} IN {family} {host}", "s=-", f"c=IN {family} {host}", "t=0 0"]
    for line in lines:
        number = line.media.payload_type
        text += [
            f"m={line.media.kind} {line.port} RTP/AVP {number}",
            f"a=rtpmap:{number} {line.media.encoding}",
            f"a={direction}",
        ]
    return "\r\n".join(text) + "\r\n"


def read(body: str) -> list[RemoteLine]:
    """The lines of a description.

    Raises:
        MalformedError: a line has no port or no address.
    """
    session, *sections = ("\n" + body.replace("\r\n", "\n")).split("\nm=")
    lines = []
    for section in sections:
        try:
            kind, port = section.split()[:2]
            host = (_value(section, "c=") or _value(session, "c=")).split()[2]
            rtcp = _value(section, "a=rtcp:").split()
            direction = next((word for word in OPPOSITE if f"\na={word}\n" in section + "\n"), "sendrecv")
            lines.append(RemoteLine(kind, host, int(port), int(rtcp[0]) if rtcp else int(port) + 1, direction))
        except (ValueError, IndexError):
            raise MalformedError(f"no port or address in m={section[:80]!r}") from None
    return lines


def _value(section: str, prefix: str) -> str:
    return next((line.removeprefix(prefix) for line in section.split("\n") if line.startswith(prefix)), "")
