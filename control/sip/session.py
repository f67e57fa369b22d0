"""One leg's INVITE usage, from the INVITE to the last answer to BYE.

`InviteSession` is the user agent's side of RFC 3261 sections 13 to 15 in both roles: offer and answer (RFC 3264), 2xx
resent until ACK, CANCEL crossing 2xx, forked 2xx, reliable provisionals (RFC 3262), re-INVITE and UPDATE (RFC 3311)
with glare. It knows one leg alone; `control.pbx.call` joins two.

Left out: session timers (RFC 4028), REFER, credentials for a challenging peer, offers in PRACK and in its answer.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Final, Self

from control.sip.address import Flow
from control.sip.dialog import Dialog
from control.sip.errors import LocalProtocolError, RemoteProtocolError
from control.sip.headers import NameAddr, RAck, parse_decimal
from control.sip.message import Request, Response, build_request, build_response
from control.sip.snapshot import Moment
from control.sip.stack import (
    AckReceived,
    CancelReceived,
    RequestReceived,
    ResponseReceived,
    TransactionFailed,
    client_id,
)
from control.sip.transaction import Timers, TransactionId

ALLOW: Final = "INVITE, ACK, BYE, CANCEL, OPTIONS, PRACK, UPDATE"
SUPPORTED: Final = "100rel"
SDP: Final = "application/sdp"
MAX_GLARE_RETRIES: Final = 5
# How many branches of a forked INVITE are followed; a peer that invents To tags gets no more of our memory.
MAX_BRANCHES: Final = 16
MAX_RSEQ: Final = 2**31 - 1
# More than the requests that a session sends between two of its saved states.
CSEQ_GAP: Final = 100


class SessionState(StrEnum):
    """Where a session stands. The first three are the caller's, the next two the callee's, the others both's."""

    CALLING = "calling"
    EARLY = "early"
    CANCELLING = "cancelling"
    INVITED = "invited"
    ACCEPTED = "accepted"
    CONFIRMED = "confirmed"
    TERMINATING = "terminating"
    TERMINATED = "terminated"


class OfferState(StrEnum):
    """Whose answer is awaited (RFC 3264 section 4)."""

    IDLE = "idle"
    LOCAL_OFFER = "local-offer"
    REMOTE_OFFER = "remote-offer"


class _Sdp(Enum):
    """What can happen to the offer/answer exchange."""

    SEND_OFFER = "send offer"
    SEND_ANSWER = "send answer"
    RECEIVE_OFFER = "receive offer"
    RECEIVE_ANSWER = "receive answer"
    ABANDON = "abandon"


# RFC 6337 section 2.2. An absent pair is a protocol error: of ours when we send, of the peer's when it does.
OFFER_ANSWER: Final[dict[OfferState, dict[_Sdp, OfferState]]] = {
    OfferState.IDLE: {
        _Sdp.SEND_OFFER: OfferState.LOCAL_OFFER,
        _Sdp.RECEIVE_OFFER: OfferState.REMOTE_OFFER,
        _Sdp.ABANDON: OfferState.IDLE,
    },
    OfferState.LOCAL_OFFER: {
        _Sdp.RECEIVE_ANSWER: OfferState.IDLE,
        _Sdp.ABANDON: OfferState.IDLE,
    },
    OfferState.REMOTE_OFFER: {
        _Sdp.SEND_ANSWER: OfferState.IDLE,
        _Sdp.ABANDON: OfferState.IDLE,
    },
}


# To the wire.


@dataclass(frozen=True, slots=True)
class SendRequest:
    """Start a client transaction with this branch."""

    request: Request
    flow: Flow
    branch: str


@dataclass(frozen=True, slots=True)
class SendAck:
    """Send the ACK of a 2xx; it is a transaction of its own, without answer (RFC 3261 section 13.2.2.4)."""

    request: Request
    flow: Flow
    branch: str


@dataclass(frozen=True, slots=True)
class SendResponse:
    """Answer on a server transaction."""

    transaction: TransactionId
    response: Response


@dataclass(frozen=True, slots=True)
class SendCancel:
    """Cancel a client INVITE transaction."""

    transaction: TransactionId


# To the call.


@dataclass(frozen=True, slots=True)
class Progressed:
    """The callee sent a provisional answer; `sdp` is empty without early media."""

    status: int
    reason: str
    sdp: bytes


@dataclass(frozen=True, slots=True)
class Accepted:
    """The callee sent 2xx. `sdp` is its answer, its offer when our INVITE had none, or empty."""

    sdp: bytes


@dataclass(frozen=True, slots=True)
class Rejected:
    """The callee refused, or did not answer at all: `timed_out`, with status 408."""

    status: int
    reason: str
    timed_out: bool = False


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The caller gave up; it has its 487 already."""


@dataclass(frozen=True, slots=True)
class Established:
    """The caller acknowledged our 2xx."""


@dataclass(frozen=True, slots=True)
class Offered:
    """The peer offers a change; `answer` or `refuse` it. `method` is INVITE or UPDATE."""

    sdp: bytes
    method: str


@dataclass(frozen=True, slots=True)
class Answered:
    """The peer answered our offer."""

    sdp: bytes


@dataclass(frozen=True, slots=True)
class OfferRejected:
    """The peer refused our offer of a change; all stays as it was."""

    status: int
    reason: str


class EndCause(StrEnum):
    """Why a session ended by itself."""

    BYE = "bye"
    ACK_TIMEOUT = "ack-timeout"
    PRACK_TIMEOUT = "prack-timeout"
    DIALOG_LOST = "dialog-lost"


@dataclass(frozen=True, slots=True)
class Ended:
    """The session is over without our doing."""

    cause: EndCause


Command = SendRequest | SendAck | SendResponse | SendCancel
SessionEvent = Progressed | Accepted | Rejected | Cancelled | Established | Offered | Answered | OfferRejected | Ended
Output = Command | SessionEvent
StackEvent = RequestReceived | ResponseReceived | AckReceived | CancelReceived | TransactionFailed


@dataclass(frozen=True, slots=True)
class LocalParty:
    """How this end presents itself on the leg: its Contact value and its product name."""

    contact: NameAddr
    product: str


@dataclass(slots=True)
class _Resend:
    """A response that is repeated until the peer acknowledges it: T1, doubling up to `ceiling`, for 64*T1."""

    transaction: TransactionId
    response: Response
    cseq: int
    interval: float
    ceiling: float
    next_at: Moment
    expires_at: Moment
    rseq: int = 0


@dataclass(slots=True)
class _LocalOffer:
    """Our offer of a change: under way, or waiting (`retry_at`) for its turn."""

    method: str
    sdp: bytes
    branch: str = ""
    attempts: int = 0
    retry_at: Moment | None = None


@dataclass(slots=True, kw_only=True)
class InviteSession:
    """One leg's INVITE usage as a pure machine.

    Commands of the call and `receive` return what is to be sent and what the call must know, in order. `flow` is
    where the peer is reached; with `symmetric` every in-dialog request goes along it, whatever the peer's Contact
    says, and it follows the peer's newest request: a departure from RFC 3261 section 12.2.1.1 for peers behind NAT,
    whose Contact cannot be reached.

    All of its fields are plain data but `new_token` and `random`, so that it can be saved (control.sip.snapshot).
    """

    state: SessionState
    sip_call_id: str
    local_tag: str
    flow: Flow
    symmetric: bool
    party: LocalParty
    timers: Timers
    new_token: Callable[[], str]
    random: Callable[[], float]
    owns_call_id: bool
    offer_state: OfferState = OfferState.IDLE
    dialog: Dialog | None = None
    peer_product: str | None = None
    # Server side: the INVITE that has no final answer yet, and what is resent until it is acknowledged.
    _invite: tuple[TransactionId, Request] | None = None
    _initial: Request | None = None
    _update: tuple[TransactionId, Request] | None = None
    _final: _Resend | None = None
    _reliable: _Resend | None = None
    _rseq: int = 0
    _held_back: bytes | None = None
    # The peer's newest request: it comes again when our answer to it was lost, whatever has become of the session.
    _newest: TransactionId | None = None
    # Client side.
    _branch: str = ""
    _early: dict[str, Dialog] = field(default_factory=dict)
    _rseq_seen: dict[str, int] = field(default_factory=dict)
    _acks: dict[str, SendAck] = field(default_factory=dict)
    _last_ack: SendAck | None = None  # of the last re-INVITE
    _unacknowledged: tuple[Dialog, int] | None = None
    # Both.
    _local_offer: _LocalOffer | None = None
    _local_sdp: bytes = b""
    _remote_sdp: bytes = b""
    _bye_headers: tuple[tuple[str, str], ...] | None = None

    # ---- construction ----------------------------------------------------------------------------------------------

    @classmethod
    def of_caller(
        cls,
        event: RequestReceived,
        *,
        symmetric: bool,
        party: LocalParty,
        timers: Timers,
        new_token: Callable[[], str],
        random: Callable[[], float],
    ) -> Self:
        """The session that an INVITE from outside any dialog asks for; its offer, if any, is in the request's body.

        Raises:
            RemoteProtocolError: The request cannot make a dialog (400), its body is no SDP (415), or it requires an
            extension
                that we do not have (420).
        """
        request = event.request
        unsupported = request.require - {"100rel"}
        if unsupported:
            raise RemoteProtocolError(420, ", ".join(sorted(unsupported)), "Require", request)
        _check_body(request)
        session = cls(
            state=SessionState.INVITED,
            sip_call_id=request.call_id,
            local_tag=new_token(),
            flow=event.flow,
            symmetric=symmetric,
            party=party,
            timers=timers,
            new_token=new_token,
            random=random,
            owns_call_id=False,
        )
        session.peer_product = request.user_agent
        session.dialog = Dialog.of_server(request, session.local_tag, local_cseq=0)
        session._invite = (event.transaction, request)
        session._newest = event.transaction
        session._initial = request
        if request.body:
            session._remote_sdp = request.body
            session.offer_state = OfferState.REMOTE_OFFER
        return session

    @classmethod
    def of_callee(
        cls,
        *,
        flow: Flow,
        symmetric: bool,
        party: LocalParty,
        timers: Timers,
        new_token: Callable[[], str],
        random: Callable[[], float],
    ) -> Self:
        """A session towards a callee; `invite` starts it."""
        return cls(
            state=SessionState.CALLING,
            sip_call_id=new_token(),
            local_tag=new_token(),
            flow=flow,
            symmetric=symmetric,
            party=party,
            timers=timers,
            new_token=new_token,
            random=random,
            owns_call_id=True,
        )

    # ---- commands of the call --------------------------------------------------------------------------------------

    def invite(self, uri: str, *, caller: NameAddr, callee: NameAddr, sdp: bytes, max_forwards: int) -> list[Output]:
        """Sends the INVITE; without `sdp` the callee is asked for an offer."""
        request = build_request(
            "INVITE",
            uri,
            from_=str(caller.with_tag(self.local_tag)),
            to=str(callee),
            call_id=self.sip_call_id,
            cseq=1,
            max_forwards=max_forwards,
        )
        self._complete(request, sdp)
        self._initial = request
        self._branch = self.new_token()
        if sdp:
            self._advance(_Sdp.SEND_OFFER)
            self._local_sdp = sdp
        return [SendRequest(request, self.flow, self._branch)]

    def progress(self, status: int, reason: str, sdp: bytes, now: float) -> list[Output]:
        """Passes a provisional answer on to the caller, reliably when it requires that (RFC 3262 section 3)."""
        if self.state is not SessionState.INVITED or self._invite is None or self._held_back is not None:
            return []
        transaction, request = self._invite
        response = self._response(request, status, reason, sdp)
        if sdp:
            self._local_sdp = sdp
        if "100rel" not in request.require:
            return [SendResponse(transaction, response)]
        if self._reliable is not None:
            # One at a time (section 3); a provisional that comes meanwhile says nothing that the final answer will not.
            return []
        self._rseq += 1
        response.headers.add("Require", "100rel")
        response.headers.add("RSeq", str(self._rseq))
        if sdp and self.offer_state is OfferState.REMOTE_OFFER:
            self._advance(_Sdp.SEND_ANSWER)
        self._reliable = self._resend(transaction, response, request, now, ceiling=64 * self.timers.t1)
        self._reliable.rseq = self._rseq
        return [SendResponse(transaction, response)]

    def accept(self, sdp: bytes, now: float) -> list[Output]:
        """Answers the caller's INVITE with 200; repeated until its ACK.

        While a reliable provisional with a description is not acknowledged, the 200 waits (RFC 3262 section 5).
        """
        if self.state is not SessionState.INVITED or self._invite is None:
            return []
        if self._reliable is not None and self._reliable.response.body:
            self._held_back = sdp
            return []
        self._reliable = None
        self.state = SessionState.ACCEPTED
        if self.dialog is not None:
            self.dialog.confirmed = True
        if self.offer_state is OfferState.REMOTE_OFFER:
            self._advance(_Sdp.SEND_ANSWER)
        elif sdp and not self._remote_sdp:
            self._advance(_Sdp.SEND_OFFER)
        else:
            sdp = b""  # answered already, in a reliable provisional
        return self._final_2xx(sdp, now)

    def reject(self, status: int, reason: str | None = None, headers: tuple[tuple[str, str], ...] = ()) -> list[Output]:
        """Refuses the caller's INVITE."""
        if self.state is not SessionState.INVITED or self._invite is None:
            return []
        transaction, request = self._invite
        response = build_response(request, status, reason, to_tag=self.local_tag)
        for name, value in headers:
            response.headers.add(name, value)
        self._forget()
        return [SendResponse(transaction, response)]

    def offer(self, sdp: bytes, method: str, now: float) -> list[Output]:
        """Offers a change to the peer of a confirmed dialog, by INVITE or, when its peer takes it, by UPDATE.

        While the peer's own exchange is under way, ours waits for its end.
        """
        self._local_offer = _LocalOffer(method, sdp)
        return self._send_offer(now)

    def answer(self, sdp: bytes, now: float) -> list[Output]:
        """Answers what `Offered` or, in a callee's 2xx, `Accepted` brought."""
        if self.offer_state is not OfferState.REMOTE_OFFER:
            return []
        self._advance(_Sdp.SEND_ANSWER)
        self._local_sdp = sdp
        if self._unacknowledged is not None:
            dialog, cseq = self._unacknowledged
            self._unacknowledged = None
            return [self._ack(dialog, cseq, sdp)]
        if self._update is not None:
            transaction, request = self._update
            self._update = None
            return [SendResponse(transaction, self._response(request, 200, None, sdp)), *self._send_offer(now)]
        return self._final_2xx(sdp, now)

    def refuse(self, status: int, reason: str | None, now: float) -> list[Output]:
        """Refuses the change that the peer offered: the session stays as it was (RFC 3261 section 14.2)."""
        pending = self._update or self._invite
        if self.offer_state is not OfferState.REMOTE_OFFER or pending is None:
            return []
        self._advance(_Sdp.ABANDON)
        self._update = self._invite = None
        transaction, request = pending
        response = build_response(request, status, reason, to_tag=self.local_tag)
        return [SendResponse(transaction, response), *self._send_offer(now)]

    def terminate(self, status: int, reason: str | None, headers: tuple[tuple[str, str], ...] = ()) -> list[Output]:
        """Ends the session in whichever way its state asks for: final answer, CANCEL or BYE.

        `status` and `headers` go to a caller that has no final answer yet; `headers` of the name Reason go into a BYE
        too. A BYE waits for the ACK of our 2xx (RFC 3261 section 15).
        """
        reasons = tuple(header for header in headers if header[0] == "Reason")
        match self.state:
            case SessionState.CALLING if self._initial is None:
                self._forget()  # the callee has not heard of it
                return []
            case SessionState.CALLING | SessionState.EARLY:
                self.state = SessionState.CANCELLING
                return [SendCancel(client_id(self._branch, "INVITE"))]
            case SessionState.INVITED:
                return self.reject(status, reason, headers)
            case SessionState.ACCEPTED:
                self._bye_headers = reasons
                return []
            case SessionState.CONFIRMED:
                return self._bye(reasons)
            case SessionState.CANCELLING | SessionState.TERMINATING | SessionState.TERMINATED:
                return []

    # ---- over the death of the process -----------------------------------------------------------------------------

    def transactions(self) -> set[TransactionId]:
        """Those that it has yet to answer, or that it waits for or may hear of once more; some may be over already."""
        pending = {transaction for transaction, _ in filter(None, (self._invite, self._update))}
        pending |= {resend.transaction for resend in (self._final, self._reliable) if resend is not None}
        if self._newest is not None:
            pending.add(self._newest)
        if self._branch:
            pending.add(client_id(self._branch, "INVITE"))
        if self._local_offer is not None and self._local_offer.branch:
            pending.add(client_id(self._local_offer.branch, self._local_offer.method))
        return pending

    def take_up(self) -> None:
        """Goes on in another process: what was sent and not saved is covered by a gap (RFC 3261 section 12.2.1.1)."""
        if self.dialog is not None:
            self.dialog.local_cseq += CSEQ_GAP

    # ---- events of the stack ---------------------------------------------------------------------------------------

    def receive(self, event: StackEvent, now: float) -> list[Output]:
        """Takes a message or a failure of this leg."""
        match event:
            case RequestReceived():
                return self._receive_request(event, now)
            case ResponseReceived():
                return self._receive_response(event, now)
            case AckReceived():
                return self._receive_ack(event, now)
            case CancelReceived():
                return self._receive_cancel()
            case TransactionFailed():
                return self._receive_failure(event)

    def handle_timer(self, now: float) -> list[Output]:
        """Does what is due: resends, gives up waiting for ACK or PRACK, tries an offer again."""
        outputs: list[Output] = []
        if self._final is not None and now >= self._final.expires_at:
            outputs += self._give_up_on_ack()
        if self._reliable is not None and now >= self._reliable.expires_at:
            outputs += [*self.reject(504), Ended(EndCause.PRACK_TIMEOUT)]
        for resend in (self._final, self._reliable):
            if resend is not None and now >= resend.next_at:
                resend.interval = min(2 * resend.interval, resend.ceiling)
                resend.next_at = now + resend.interval
                outputs.append(SendResponse(resend.transaction, resend.response))
        if (
            self._local_offer is not None
            and self._local_offer.retry_at is not None
            and now >= self._local_offer.retry_at
        ):
            outputs += self._send_offer(now)
        return outputs

    def next_deadline(self) -> float | None:
        """When `handle_timer` wants to be called."""
        due = [min(r.next_at, r.expires_at) for r in (self._final, self._reliable) if r is not None]
        if self._local_offer is not None and self._local_offer.retry_at is not None:
            due.append(self._local_offer.retry_at)
        return min(due, default=None)

    # ---- requests of the peer --------------------------------------------------------------------------------------

    def _receive_request(self, event: RequestReceived, now: float) -> list[Output]:
        request, transaction = event.request, event.transaction
        dialog = self.dialog
        if dialog is None or self.state is SessionState.TERMINATED:
            return [SendResponse(transaction, build_response(request, 481, to_tag=self.local_tag))]
        self._newest = transaction
        try:
            dialog.accept_cseq(request)
            unsupported = request.require - {"100rel"}
            if unsupported:
                raise RemoteProtocolError(420, ", ".join(sorted(unsupported)), "Require", request)
            _check_body(request)
        except RemoteProtocolError as error:
            return [SendResponse(transaction, refusal(request, error, self.local_tag))]
        if self.symmetric:
            self.flow = event.flow
        match request.method:
            case "INVITE":
                return self._receive_reinvite(transaction, request, now)
            case "UPDATE":
                return self._receive_update(transaction, request)
            case "PRACK":
                return self._receive_prack(transaction, request, now)
            case "BYE":
                return self._receive_bye(transaction, request)
            case "OPTIONS":
                return [SendResponse(transaction, self._response(request, 200, None, b""))]
            case _:
                response = build_response(request, 405, to_tag=self.local_tag)
                response.headers.add("Allow", ALLOW)
                return [SendResponse(transaction, response)]

    def _receive_reinvite(self, transaction: TransactionId, request: Request, now: float) -> list[Output]:
        if self.state is not SessionState.CONFIRMED or self._invite is not None or self._final is not None:
            # Our answer to an earlier INVITE is not given or not acknowledged yet (section 14.2).
            return [SendResponse(transaction, self._try_later(request))]
        if self._offer_under_way() or self.offer_state is not OfferState.IDLE:
            return [SendResponse(transaction, build_response(request, 491, to_tag=self.local_tag))]
        if self.dialog is not None:
            self.dialog.refresh_target(request)
        self._invite = (transaction, request)
        if not request.body:
            # No offer: we repeat ours as it stands, and the peer answers in its ACK (section 14.2).
            self._advance(_Sdp.SEND_OFFER)
            return self._final_2xx(self._local_sdp, now)
        self._advance(_Sdp.RECEIVE_OFFER)
        if request.body == self._remote_sdp:
            # The same description again only refreshes the session (RFC 3264 section 8): nobody else need know.
            return self.answer(self._local_sdp, now)
        return [Offered(request.body, "INVITE")]

    def _receive_update(self, transaction: TransactionId, request: Request) -> list[Output]:
        if request.body:
            if self._offer_under_way() or self.offer_state is OfferState.LOCAL_OFFER:
                return [SendResponse(transaction, build_response(request, 491, to_tag=self.local_tag))]
            if self.offer_state is OfferState.REMOTE_OFFER:
                return [SendResponse(transaction, self._try_later(request))]
        if self.dialog is not None:
            self.dialog.refresh_target(request)
        if not request.body:
            return [SendResponse(transaction, self._response(request, 200, None, b""))]
        self._advance(_Sdp.RECEIVE_OFFER)
        self._update = (transaction, request)
        return [Offered(request.body, "UPDATE")]

    def _receive_prack(self, transaction: TransactionId, request: Request, now: float) -> list[Output]:
        reliable = self._reliable
        rack = request.headers.get("RAck")
        if reliable is None or rack is None or RAck.parse(rack) != RAck(reliable.rseq, reliable.cseq, "INVITE"):
            return [SendResponse(transaction, build_response(request, 481, to_tag=self.local_tag))]
        if request.body and self.offer_state is not OfferState.LOCAL_OFFER:
            # A new offer inside PRACK would have to be answered at once, before the other leg was asked.
            return [SendResponse(transaction, build_response(request, 488, to_tag=self.local_tag))]
        self._reliable = None
        outputs: list[Output] = [SendResponse(transaction, build_response(request, 200, to_tag=self.local_tag))]
        if self._held_back is not None:
            sdp, self._held_back = self._held_back, None
            outputs += self.accept(sdp, now)
        return outputs

    def _receive_bye(self, transaction: TransactionId, request: Request) -> list[Output]:
        outputs: list[Output] = [SendResponse(transaction, build_response(request, 200, to_tag=self.local_tag))]
        outputs += self._terminate_pending()
        if self.state is SessionState.TERMINATING:
            return outputs  # both hung up at once: ours is still to be answered
        if self.state in (SessionState.CALLING, SessionState.EARLY, SessionState.CANCELLING):
            return outputs  # no callee may do that before it answered; its final answer will come
        self._forget()
        return [*outputs, Ended(EndCause.BYE)]

    def _receive_ack(self, event: AckReceived, now: float) -> list[Output]:
        final = self._final
        if final is None or event.request.cseq.number != final.cseq:
            return []
        self._final = None
        outputs: list[Output] = []
        if self.symmetric:
            self.flow = event.flow
        first = self.state is SessionState.ACCEPTED
        if first:
            self.state = SessionState.CONFIRMED
            outputs.append(Established())
        if self.offer_state is OfferState.LOCAL_OFFER:
            if event.request.body:
                self._advance(_Sdp.RECEIVE_ANSWER)
                self._remote_sdp = event.request.body
                outputs.append(Answered(event.request.body))
            else:
                self._advance(_Sdp.ABANDON)
                outputs.append(OfferRejected(0, "the ACK has no answer"))
        if self._bye_headers is not None:
            return [*outputs, *self._bye(self._bye_headers)]
        return [*outputs, *self._send_offer(now)]

    def _receive_cancel(self) -> list[Output]:
        if self._invite is None:
            return []
        if self.state is SessionState.INVITED:
            return [*self.reject(487), Cancelled()]
        return []  # a re-INVITE that is being asked for at the other leg; its answer comes at once

    # ---- answers of the peer ---------------------------------------------------------------------------------------

    def _receive_response(self, event: ResponseReceived, now: float) -> list[Output]:
        response = event.response
        match response.cseq.method:
            case "INVITE" if event.transaction == client_id(self._branch, "INVITE"):
                return self._receive_initial(response)
            case "INVITE" | "UPDATE":
                return self._receive_offer_response(event, now)
            case "BYE":
                if response.status >= 200 and self.state is SessionState.TERMINATING:
                    self._forget()
        return []

    def _receive_initial(self, response: Response) -> list[Output]:
        self.peer_product = response.headers.get("Server") or response.user_agent or self.peer_product
        if response.status < 200:
            return self._receive_provisional(response)
        if response.status < 300:
            return self._receive_2xx(response)
        match self.state:
            case SessionState.CALLING | SessionState.EARLY:
                self._forget()
                return [Rejected(response.status, response.reason)]
            case SessionState.CANCELLING:
                self._forget()
        return []

    def _receive_provisional(self, response: Response) -> list[Output]:
        if self.state not in (SessionState.CALLING, SessionState.EARLY) or response.status == 100:
            return []
        outputs: list[Output] = []
        tag = response.to.tag
        if tag and response.contact is not None and self._initial is not None:
            self.state = SessionState.EARLY
            if tag not in self._early:
                if len(self._early) >= MAX_BRANCHES:
                    return []
                self._early[tag] = Dialog.of_client(self._initial, response)
            self.dialog = self._early[tag]
            if "100rel" in response.require:
                prack = self._prack(self.dialog, tag, response)
                if prack is None:
                    return []
                outputs.append(prack)
                if response.body and self.offer_state is OfferState.LOCAL_OFFER:
                    self._advance(_Sdp.RECEIVE_ANSWER)
        sdp = response.body if response.content_type == SDP else b""
        if sdp:
            self._remote_sdp = sdp
        return [*outputs, Progressed(response.status, response.reason, sdp)]

    def _prack(self, dialog: Dialog, tag: str, response: Response) -> SendRequest | None:
        """The PRACK for a reliable provisional, or None when it is not the next in order (RFC 3262 section 4)."""
        rseq = parse_decimal(response.headers.get("RSeq") or "", MAX_RSEQ)
        if rseq is None or (tag in self._rseq_seen and rseq != self._rseq_seen[tag] + 1):
            return None
        self._rseq_seen[tag] = rseq
        request = dialog.request("PRACK")
        request.headers.add("RAck", f"{rseq} {response.cseq.number} INVITE")
        return SendRequest(request, self._hop(dialog), self.new_token())

    def _receive_2xx(self, response: Response) -> list[Output]:
        tag = response.to.tag or ""
        if tag in self._acks:
            return [self._acks[tag]]
        if self._unacknowledged is not None and self._unacknowledged[0].remote.tag == response.to.tag:
            return []  # its ACK waits for our answer
        if self._initial is None or len(self._acks) >= MAX_BRANCHES:
            return []
        try:
            dialog = self._early.get(tag) or Dialog.of_client(self._initial, response)
        except RemoteProtocolError as error:
            if self.state not in (SessionState.CALLING, SessionState.EARLY):
                return []
            self._forget()
            return [Rejected(502, error.message)]
        dialog.confirm(response)
        cseq = response.cseq.number
        if self.state not in (SessionState.CALLING, SessionState.EARLY):
            # Answered although cancelled, or a second branch of a fork: acknowledged, and ended at once (section
            # 13.2.2.4).
            outputs: list[Output] = [self._ack(dialog, cseq, b""), self._bye_request(dialog, ())]
            if self.state is SessionState.CANCELLING:
                self.state = SessionState.TERMINATING
                self.dialog = dialog
            return outputs
        self.dialog = dialog
        self._early.clear()
        self.state = SessionState.CONFIRMED
        sdp = response.body if response.content_type == SDP else b""
        if sdp:
            self._remote_sdp = sdp
        if self.offer_state is OfferState.IDLE and sdp and not self._local_sdp:
            self._advance(_Sdp.RECEIVE_OFFER)
            self._unacknowledged = (dialog, cseq)
            return [Accepted(sdp)]
        if self.offer_state is OfferState.LOCAL_OFFER:
            self._advance(_Sdp.RECEIVE_ANSWER)
        return [self._ack(dialog, cseq, b""), Accepted(sdp)]

    def _receive_offer_response(self, event: ResponseReceived, now: float) -> list[Output]:
        response, offer = event.response, self._local_offer
        if self.dialog is None or response.status < 200:
            return []
        mine = offer is not None and event.transaction == client_id(offer.branch, offer.method)
        if response.cseq.method == "INVITE" and response.status < 300:
            if self._last_ack is not None and self._last_ack.request.cseq.number == response.cseq.number:
                return [self._last_ack]
            self.dialog.refresh_target(response)
            self._last_ack = self._build_ack(self.dialog, response.cseq.number, b"")
            return [self._last_ack, *(self._offer_answered(response) if mine else [])]
        if offer is None or not mine:
            return []
        if response.status < 300:
            self.dialog.refresh_target(response)
            return self._offer_answered(response)
        self._advance(_Sdp.ABANDON)
        if response.status == 491 and offer.attempts < MAX_GLARE_RETRIES and self.state is SessionState.CONFIRMED:
            # Section 14.1: the owner of the Call-ID waits longer, so that the two do not collide again.
            wait = 2.1 + 1.9 * self.random() if self.owns_call_id else 2.0 * self.random()
            offer.retry_at = now + wait
            return []
        self._local_offer = None
        if response.status in (408, 481):
            return self._lose_dialog(say_bye=response.status == 408)
        return [OfferRejected(response.status, response.reason)]

    def _offer_answered(self, response: Response) -> list[Output]:
        offer, self._local_offer = self._local_offer, None
        if offer is None or self.offer_state is not OfferState.LOCAL_OFFER:
            return []
        if not response.body or response.content_type != SDP:
            self._advance(_Sdp.ABANDON)
            return [OfferRejected(response.status, "the answer has no SDP")]
        self._advance(_Sdp.RECEIVE_ANSWER)
        self._local_sdp, self._remote_sdp = offer.sdp, response.body
        return [Answered(response.body)]

    def _receive_failure(self, event: TransactionFailed) -> list[Output]:
        offer = self._local_offer
        if event.transaction == client_id(self._branch, "INVITE"):
            waiting = self.state in (SessionState.CALLING, SessionState.EARLY)
            if waiting or self.state is SessionState.CANCELLING:
                self._forget()
            return [Rejected(408, "Request Timeout", timed_out=True)] if waiting else []
        if event.transaction.method == "BYE":
            if self.state is SessionState.TERMINATING:
                self._forget()
            return []
        if offer is not None and event.transaction == client_id(offer.branch, offer.method):
            self._advance(_Sdp.ABANDON)
            self._local_offer = None
            return self._lose_dialog(say_bye=True)
        return []

    # ---- building blocks -------------------------------------------------------------------------------------------

    def _advance(self, step: _Sdp) -> None:
        following = OFFER_ANSWER[self.offer_state].get(step)
        if following is None:
            raise LocalProtocolError(f"cannot {step.value} while the offer state is {self.offer_state.value}")
        self.offer_state = following

    def _offer_under_way(self) -> bool:
        return self._local_offer is not None and self._local_offer.retry_at is None and bool(self._local_offer.branch)

    def _send_offer(self, now: float) -> list[Output]:
        """Sends the offer that waits, if there is one and nothing else is under way."""
        offer, dialog = self._local_offer, self.dialog
        if offer is None or dialog is None or self._offer_under_way():
            return []
        if offer.retry_at is not None and now < offer.retry_at:
            return []
        busy = self.offer_state is not OfferState.IDLE or self._final is not None or self._invite is not None
        if self.state is not SessionState.CONFIRMED or busy:
            return []
        self._advance(_Sdp.SEND_OFFER)
        request = self._complete(dialog.request(offer.method), offer.sdp)
        offer.branch, offer.retry_at = self.new_token(), None
        offer.attempts += 1
        return [SendRequest(request, self._hop(dialog), offer.branch)]

    def _final_2xx(self, sdp: bytes, now: float) -> list[Output]:
        """Sends 200 to the INVITE that waits, and again until it is acknowledged (section 13.3.1.4)."""
        if self._invite is None:
            raise LocalProtocolError("no INVITE waits for an answer")
        transaction, request = self._invite
        self._invite = None
        if sdp:
            self._local_sdp = sdp
        response = self._response(request, 200, None, sdp)
        self._final = self._resend(transaction, response, request, now, ceiling=self.timers.t2)
        return [SendResponse(transaction, response)]

    def _resend(
        self, transaction: TransactionId, response: Response, request: Request, now: float, *, ceiling: float
    ) -> _Resend:
        t1 = self.timers.t1
        return _Resend(transaction, response, request.cseq.number, t1, ceiling, now + t1, now + 64 * t1)

    def _give_up_on_ack(self) -> list[Output]:
        """No ACK came for our 2xx in 64*T1: the session ends with BYE (section 13.3.1.4)."""
        self._final = None
        told = self._bye_headers
        return [*self._bye(told or ()), *([Ended(EndCause.ACK_TIMEOUT)] if told is None else [])]

    def _lose_dialog(self, *, say_bye: bool) -> list[Output]:
        """The peer no longer knows the dialog, or is gone (section 12.2.1.2)."""
        outputs = self._bye(()) if say_bye else []
        if not say_bye:
            self._forget()
        return [*outputs, Ended(EndCause.DIALOG_LOST)]

    def _bye(self, headers: tuple[tuple[str, str], ...]) -> list[Output]:
        outputs: list[Output] = []
        if self.dialog is None:
            raise LocalProtocolError("no dialog to end")
        if self._unacknowledged is not None:
            dialog, cseq = self._unacknowledged
            self._unacknowledged = None
            outputs.append(self._ack(dialog, cseq, b""))
        outputs += self._terminate_pending()
        self._invite = self._update = self._final = self._local_offer = None
        self.state = SessionState.TERMINATING
        outputs.append(self._bye_request(self.dialog, headers))
        return outputs

    def _terminate_pending(self) -> list[Output]:
        """The answers to requests of the peer that the end of the session overtakes (section 15.1.2)."""
        return [
            SendResponse(transaction, build_response(request, 487, to_tag=self.local_tag))
            for transaction, request in filter(None, (self._invite, self._update))
        ]

    def _bye_request(self, dialog: Dialog, headers: tuple[tuple[str, str], ...]) -> SendRequest:
        request = dialog.request("BYE")
        for name, value in headers:
            request.headers.add(name, value)
        request.headers.add("User-Agent", self.party.product)
        return SendRequest(request, self._hop(dialog), self.new_token())

    def _ack(self, dialog: Dialog, cseq: int, sdp: bytes) -> SendAck:
        """The ACK of a 2xx to the first INVITE, kept for each branch that answered, to be sent again."""
        ack = self._acks[dialog.remote.tag or ""] = self._build_ack(dialog, cseq, sdp)
        return ack

    def _build_ack(self, dialog: Dialog, cseq: int, sdp: bytes) -> SendAck:
        request = dialog.request("ACK", cseq=cseq)
        if sdp:
            request.headers.add("Content-Type", SDP)
            request.body = sdp
        return SendAck(request, self._hop(dialog), self.new_token())

    def _hop(self, dialog: Dialog) -> Flow:
        return self.flow if self.symmetric else dialog.next_hop(self.flow)

    def _complete(self, request: Request, sdp: bytes) -> Request:
        """Adds what INVITE and UPDATE carry besides the dialog's own headers."""
        request.headers.add("Contact", str(self.party.contact))
        request.headers.add("Allow", ALLOW)
        request.headers.add("Supported", SUPPORTED)
        request.headers.add("User-Agent", self.party.product)
        if sdp:
            request.headers.add("Content-Type", SDP)
            request.body = sdp
        return request

    def _response(self, request: Request, status: int, reason: str | None, sdp: bytes) -> Response:
        response = build_response(request, status, reason, to_tag=self.local_tag)
        for value in request.headers.get_all("Record-Route"):
            response.headers.add("Record-Route", value)
        response.headers.add("Contact", str(self.party.contact))
        response.headers.add("Allow", ALLOW)
        if status >= 200:
            response.headers.add("Supported", SUPPORTED)
        response.headers.add("Server", self.party.product)
        if sdp:
            response.headers.add("Content-Type", SDP)
            response.body = sdp
        return response

    def _try_later(self, request: Request) -> Response:
        """500 with Retry-After, as sections 14.2 and RFC 3311 section 5.2 want it."""
        response = build_response(request, 500, to_tag=self.local_tag)
        response.headers.add("Retry-After", str(1 + int(9 * self.random())))
        return response

    def _forget(self) -> None:
        """The session is over: nothing is resent, nothing is awaited."""
        self.state = SessionState.TERMINATED
        self.offer_state = OfferState.IDLE
        self._invite = self._update = self._final = self._reliable = self._local_offer = self._unacknowledged = None
        self._held_back = None


def refusal(request: Request, error: RemoteProtocolError, to_tag: str) -> Response:
    """The answer that tells the peer what was wrong with its request (RFC 3261 section 8.2)."""
    response = build_response(request, error.status, to_tag=to_tag)
    match error.status:
        case 415:
            response.headers.add("Accept", SDP)
        case 420:
            response.headers.add("Unsupported", error.message)
        case 405:
            response.headers.add("Allow", ALLOW)
    return response


def _check_body(request: Request) -> None:
    if request.body and request.content_type != SDP and request.method in ("INVITE", "UPDATE", "PRACK"):
        raise RemoteProtocolError(415, f"a body of type {request.content_type or 'unknown'}", "Content-Type", request)
