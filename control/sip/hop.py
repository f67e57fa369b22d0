"""What one hop adds to messages and reads from them: Via, transaction keys, ACK and CANCEL (RFC 3261 sections 17, 18).

See control.sip.stack, which is all that uses it.
"""

import hashlib
from typing import Final

from control.sip.address import Flow, Transport
from control.sip.errors import RemoteProtocolError
from control.sip.headers import Via, split_commas
from control.sip.message import Message, Request, build_request, parse_message
from control.sip.transaction import TransactionId

MAGIC_COOKIE: Final = "z9hG4bK"
DEFAULT_PORT: Final = 5060
DEFAULT_TLS_PORT: Final = 5061


def demand_length(message: Message) -> None:
    """Check that a message of a stream told its length (section 18.3).

    Raises:
        RemoteProtocolError: 400, it did not.
    """
    if "Content-Length" not in message.headers:
        answerable = message if isinstance(message, Request) and message.method != "ACK" else None
        raise RemoteProtocolError(400, "streams need it", "Content-Length", answerable)


def is_cut_short(error: RemoteProtocolError) -> bool:
    """Whether a message of a stream has a length that is a number and yet wrong: framing gave up on its size."""
    if error.header != "Content-Length" or error.request is None:
        return False
    lengths = set(error.request.headers.get_all("Content-Length"))
    return len(lengths) == 1 and lengths.pop().isdecimal()


def same_hop(method: str, invite: Request, to: str) -> Request:
    """The ACK (section 17.1.1.3) or CANCEL (9.1) that follows an INVITE on its way: same Via, same Route set."""
    fields = invite.headers
    request = build_request(
        method,
        invite.uri,
        from_=fields.require("from"),
        to=to,
        call_id=invite.call_id,
        cseq=invite.cseq.number,
    )
    request.headers.insert("Via", fields.require("via"))
    request.headers.set_all("Route", fields.get_all("Route"))
    return request


def has_cookie(via: Via) -> bool:
    """Whether the branch is unique as RFC 3261 demands; a bare cookie is not (RFC 4475 section 3.2.1)."""
    branch = via.branch
    return branch.startswith(MAGIC_COOKIE) and len(branch) > len(MAGIC_COOKIE)


def server_id(request: Request) -> TransactionId:
    """The key of section 17.2.3. Without a usable branch it is made of what RFC 2543 compares, save the To tag."""
    via = request.via
    sent_by = f"{via.host.lower()}:{via.port or (DEFAULT_TLS_PORT if via.transport == Transport.TLS else DEFAULT_PORT)}"
    if has_cookie(via):
        return TransactionId(via.branch, sent_by, request.method)
    compared = (request.uri, request.from_.tag or "", request.call_id, str(request.cseq.number), str(via))
    digest = hashlib.sha256("\n".join(compared).encode("utf-8", "surrogateescape"))
    return TransactionId(digest.hexdigest(), sent_by, request.method)


def to_tag_of(response: bytes) -> str | None:
    """The To tag in a response of ours. Asked for so rarely that nothing is kept for it."""
    return parse_message(response).to.tag if response else None


def note_source(request: Request, flow: Flow) -> None:
    """Write into the top Via where the request really came from (section 18.2.1, RFC 3581 section 4)."""
    via = request.via
    source = flow.remote
    if via.rport is not None:
        via = via.with_params(received=source.host, rport=str(source.port))
    elif via.host != source.host:
        via = via.with_params(received=source.host)
    else:
        return
    lines = request.headers.get_all("Via")
    _, *others = split_commas(lines[0])
    request.headers.set_all("Via", [str(via), *others, *lines[1:]])
