"""Builders of SIP messages as peers write them; all arguments have defaults, so that a test names what it is about."""

from collections.abc import Iterable

from control.sip.address import Address, Flow, Transport
from control.sip.message import Request, Response, build_response, parse_message

PEER = Address("192.0.2.10", 5060)
OURS = Address("198.51.100.1", 5060)


def flow(host: str = PEER.host, port: int = PEER.port, listener: str = "main") -> Flow:
    """The way to a peer over UDP."""
    return Flow(Transport.UDP, listener, Address(host, port))


def sdp(host: str = PEER.host, port: int = 40000, *, direction: str = "sendrecv", version: int = 1) -> bytes:
    """A description of one audio line in PCMU and telephone events."""
    family = "IP6" if ":" in host else "IP4"
    lines = (
        "v=0",
        f"o=- 1 {version} IN {family} {host}",
        "s=-",
        f"c=IN {family} {host}",
        "t=0 0",
        f"m=audio {port} RTP/AVP 0 101",
        "a=rtpmap:101 telephone-event/8000",
        f"a={direction}",
    )
    return "".join(f"{line}\r\n" for line in lines).encode()


def request_bytes(
    method: str = "INVITE",
    *,
    uri: str = "sip:1002@example.test",
    via: str | None = None,
    branch: str = "z9hG4bK-1",
    call_id: str = "call-1@192.0.2.10",
    cseq: int = 1,
    from_: str = "<sip:1001@example.test>;tag=from-1",
    to: str = "<sip:1002@example.test>",
    max_forwards: int | None = 70,
    contact: str | None = "<sip:1001@192.0.2.10:5060>",
    headers: Iterable[tuple[str, str]] = (),
    body: bytes = b"",
) -> bytes:
    """A request in the octets of a datagram."""
    fields = [("Via", via if via is not None else f"SIP/2.0/UDP {PEER};branch={branch}")]
    if max_forwards is not None:
        fields.append(("Max-Forwards", str(max_forwards)))
    fields += [("From", from_), ("To", to), ("Call-ID", call_id), ("CSeq", f"{cseq} {method}")]
    if contact is not None:
        fields.append(("Contact", contact))
    fields += headers
    if body:
        fields.append(("Content-Type", "application/sdp"))
    fields.append(("Content-Length", str(len(body))))
    head = "".join(f"{name}: {value}\r\n" for name, value in fields)
    return f"{method} {uri} SIP/2.0\r\n{head}\r\n".encode("utf-8", "surrogateescape") + body


def request_of(data: bytes) -> Request:
    """The request in these octets."""
    message = parse_message(data)
    assert isinstance(message, Request), message
    return message


def response_of(data: bytes) -> Response:
    """The response in these octets."""
    message = parse_message(data)
    assert isinstance(message, Response), message
    return message


def outgoing_request(method: str = "INVITE", *, headers: Iterable[tuple[str, str]] = (), body: bytes = b"") -> Request:
    """A request as a transaction user hands it to the stack: without Via."""
    request = request_of(request_bytes(method, headers=headers, body=body))
    request.headers.remove("Via")
    return request


def response_to(
    request: Request | bytes,
    status: int,
    *,
    to_tag: str = "to-1",
    headers: Iterable[tuple[str, str]] = (),
    body: bytes = b"",
) -> Response:
    """The response of a peer, or of a transaction user, to a request."""
    request = request_of(request) if isinstance(request, bytes) else request
    response = build_response(request, status, to_tag=to_tag if status > 100 else None)
    for name, value in headers:
        response.headers.add(name, value)
    if body:
        response.headers.set("Content-Type", "application/sdp")
        response.body = body
    return response
