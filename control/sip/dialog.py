"""A dialog: what two user agents remember of each other (RFC 3261 section 12).

Both roles are here; early dialogs become confirmed by `confirm`. Forking is the owner's affair: each To tag that
answers an INVITE has a `Dialog` of its own.
"""

from dataclasses import dataclass, replace
from typing import Self

from control.sip.address import Address, Flow
from control.sip.errors import RemoteProtocolError
from control.sip.headers import NameAddr, Uri
from control.sip.message import Request, Response, build_request

DEFAULT_PORT = 5060


@dataclass(frozen=True, slots=True)
class DialogId:
    """Names a dialog at this end (RFC 3261 section 12): its Call-ID, our tag and the peer's."""

    sip_call_id: str
    local_tag: str
    remote_tag: str


@dataclass(slots=True)
class Dialog:
    """The state of a dialog (RFC 3261 section 12).

    `local` and `remote` are From and To of our requests, tags included. `remote_cseq` is None until the peer has sent a
    request. `route_set` is in the order in which our requests carry it.
    """

    sip_call_id: str
    local: NameAddr
    remote: NameAddr
    local_cseq: int
    remote_cseq: int | None
    remote_target: Uri
    route_set: tuple[NameAddr, ...]
    confirmed: bool = False

    @classmethod
    def of_server(cls, request: Request, local_tag: str, *, local_cseq: int) -> Self:
        """The dialog that our answer to `request` makes (section 12.1.1).

        Raises:
            RemoteProtocolError: The request has no usable Contact (section 8.1.1.8).
        """
        if request.contact is None:
            raise RemoteProtocolError(400, "an INVITE needs one Contact header with a SIP URI", "Contact", request)
        return cls(
            sip_call_id=request.call_id,
            local=request.to.with_tag(local_tag),
            remote=request.from_,
            local_cseq=local_cseq,
            remote_cseq=request.cseq.number,
            remote_target=request.contact.uri,
            route_set=tuple(request.record_route),
        )

    @classmethod
    def of_client(cls, request: Request, response: Response) -> Self:
        """The dialog that `response` to our `request` makes (section 12.1.2).

        Raises:
            RemoteProtocolError: The response has no usable Contact.
        """
        if response.contact is None:
            raise RemoteProtocolError(400, "a response that makes a dialog needs one Contact header", "Contact")
        return cls(
            sip_call_id=request.call_id,
            local=request.from_,
            remote=response.to,
            local_cseq=request.cseq.number,
            remote_cseq=None,
            remote_target=response.contact.uri,
            route_set=tuple(reversed(response.record_route)),
        )

    @property
    def id(self) -> DialogId:
        """Its name at this end."""
        return DialogId(self.sip_call_id, self.local.tag or "", self.remote.tag or "")

    def confirm(self, response: Response) -> None:
        """Takes the 2xx into account: it alone fixes route set and target (section 13.2.2.4)."""
        self.confirmed = True
        self.route_set = tuple(reversed(response.record_route))
        self.refresh_target(response)

    def refresh_target(self, message: Request | Response) -> None:
        """Follows the Contact of a target refresh request or of its 2xx (section 12.2)."""
        if message.contact is not None:
            self.remote_target = message.contact.uri

    def accept_cseq(self, request: Request) -> None:
        """Checks the order of the peer's requests (section 12.2.2).

        Raises:
            RemoteProtocolError: 500, when the request is older than one seen before.
        """
        number = request.cseq.number
        if self.remote_cseq is not None and number < self.remote_cseq:
            raise RemoteProtocolError(
                500, f"CSeq {number} is lower than {self.remote_cseq}, seen before", "CSeq", request
            )
        self.remote_cseq = number

    def request(self, method: str, *, cseq: int | None = None, max_forwards: int = 70) -> Request:
        """A request inside this dialog (section 12.2.1.1), without Via, Contact and body.

        `cseq` is given for ACK, which has the number of its INVITE (section 13.2.2.4); any other request takes the
        next.
        """
        if cseq is None:
            self.local_cseq += 1
            cseq = self.local_cseq
        uri = self.remote_target
        routes = self.route_set
        if routes and routes[0].uri.param("lr") is None:
            # A strict router: its URI goes into the Request-URI and the target to the end (section 12.2.1.1).
            uri, routes = routes[0].uri, (*routes[1:], NameAddr(self.remote_target))
        request = build_request(
            method,
            str(uri),
            from_=str(self.local),
            to=str(self.remote),
            call_id=self.sip_call_id,
            cseq=cseq,
            max_forwards=max_forwards,
        )
        for route in routes:
            request.headers.add("Route", str(route))
        return request

    def next_hop(self, flow: Flow) -> Flow:
        """Where our requests go: the first route, else the target, when its host is numeric; else along `flow`."""
        uri = self.route_set[0].uri if self.route_set else self.remote_target
        same_family = (":" in uri.host) == (":" in flow.remote.host)
        if not _is_numeric(uri.host) or not same_family:
            return flow
        return replace(flow, remote=Address(uri.host, uri.port or DEFAULT_PORT))


def _is_numeric(host: str) -> bool:
    return ":" in host or (host.count(".") == 3 and host.replace(".", "").isdigit())
