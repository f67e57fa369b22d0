"""The transaction layer as one pure object: datagrams to events, requests and responses to datagrams.

Implements matching (RFC 3261 sections 17.1.3, 17.2.3 with its fallback for RFC 2543, 18.1.2), the running of the
machines in control.sip.transaction, ACK for refusals (17.1.1.3), CANCEL (9.1, 9.2), 100 Trying (17.2.1), Via received
and rport (18.2.1, RFC 3581), and what is refused before the transaction user sees it: malformed requests, merged
requests (8.2.2.2) and requests without hops left (16.3). All deadlines live in one heap.
Over reliable transports it demands Content-Length (18.3), and when a connection is lost it fails what waits for a first
answer there, and moves responses to where section 18.2.2 wants them next. Requests too large for a datagram go over a
connection where the peer may take one, and by UDP if it does not (18.1.1).
Left out: the choice of a destination; whoever sends a request names the flow.
"""

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from typing import Final, assert_never, cast

from control.sip.address import Address, Flow, Transport
from control.sip.errors import LocalProtocolError, RemoteProtocolError
from control.sip.hop import (
    DEFAULT_PORT,
    MAGIC_COOKIE,
    demand_length,
    has_cookie,
    is_cut_short,
    note_source,
    same_hop,
    server_id,
    to_tag_of,
)
from control.sip.message import Message, Request, Response, build_response, parse_message
from control.sip.transaction import (
    INVITE_CLIENT,
    MACHINES,
    Action,
    ClientTransaction,
    Event,
    SavedTransaction,
    ServerTransaction,
    State,
    Timers,
    Transaction,
    TransactionId,
    response_event,
)

OTHER_METHOD: Final = "OTHER"
METHODS: Final = frozenset(
    {
        "INVITE",
        "ACK",
        "BYE",
        "CANCEL",
        "REGISTER",
        "OPTIONS",
        "PRACK",
        "UPDATE",
        "INFO",
        "REFER",
        "SUBSCRIBE",
        "NOTIFY",
        "MESSAGE",
        "PUBLISH",
    }
)
# Where a request of ours has no answer of any kind yet.
_UNANSWERED: Final = frozenset((State.CALLING, State.TRYING, State.WITHDRAWN))
# Requests that end here whatever hops they have left; section 11 has OPTIONS with none answered by whom it reached.
_NEVER_FORWARDED: Final = frozenset(("OPTIONS", "REGISTER"))
_LONGEST_KEEP_ALIVE: Final = 4
_NEVER: Final = float("inf")
# Section 18.1.1, where nothing is known of the path: larger requests might be fragmented, and lost with any fragment.
MAX_UDP_REQUEST_BYTES: Final = 1300
# How long a peer that took no connection is not asked for one again.
_WITHOUT_STREAM_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class MessageLabel:
    """What a message is, for metrics: a closed set. `status` is None for requests."""

    method: str
    status: int | None = None
    retransmission: bool = False

    @staticmethod
    def of(message: Message) -> "MessageLabel":
        """The label of a message seen for the first time; methods that nobody has registered count as OTHER."""
        if isinstance(message, Response):
            return _label(message.cseq.method, message.status)
        return _label(message.method if isinstance(message, Request) else "", None)


@lru_cache(maxsize=1024)
def _label(method: str, status: int | None, retransmission: bool = False) -> MessageLabel:
    return MessageLabel(method if method in METHODS else OTHER_METHOD, status, retransmission)


class FailureCause(StrEnum):
    """Why a transaction ended without a final response, or could not send one."""

    TIMEOUT = "timeout"
    TRANSPORT = "transport"


class DiscardReason(StrEnum):
    """Why a datagram was dropped."""

    KEEP_ALIVE = "keep-alive"  # line breaks or zeros that hold a NAT binding open
    MALFORMED = "malformed"  # no message, or none that can be answered
    STRAY_RESPONSE = "stray-response"  # no client transaction waits for it
    MISROUTED_RESPONSE = "misrouted-response"  # its Via says that it is somebody else's


@dataclass(frozen=True, slots=True)
class Transmit:
    """Send `data` along `flow`.

    If that turns out to be impossible, tell `SipStack.transport_failed`, or `SipStack.flow_failed` of a connection.
    """

    data: bytes
    flow: Flow
    label: MessageLabel
    transaction: TransactionId | None = None


@dataclass(frozen=True, slots=True)
class RequestReceived:
    """A new request, which must be answered by `SipStack.respond`."""

    transaction: TransactionId
    request: Request
    flow: Flow


@dataclass(frozen=True, slots=True)
class ResponseReceived:
    """A response to a request of ours: each provisional one but 100, each 2xx to INVITE, any other final one once."""

    transaction: TransactionId
    response: Response
    flow: Flow


@dataclass(frozen=True, slots=True)
class AckReceived:
    """An ACK that belongs to no refusal, thus to a 2xx, or to nothing."""

    request: Request
    flow: Flow


@dataclass(frozen=True, slots=True)
class CancelReceived:
    """The peer gave up the INVITE of `transaction`, which still needs its final response; the CANCEL is answered."""

    transaction: TransactionId
    request: Request
    flow: Flow


@dataclass(frozen=True, slots=True)
class TransactionFailed:
    """No final response will come to a request of ours, or (cause TRANSPORT) a message could not be sent."""

    transaction: TransactionId
    cause: FailureCause


@dataclass(frozen=True, slots=True)
class Discarded:
    """A message was dropped; `detail` is for people."""

    flow: Flow
    reason: DiscardReason
    detail: str


Output = Transmit | RequestReceived | ResponseReceived | AckReceived | CancelReceived | TransactionFailed | Discarded


def client_id(branch: str, method: str) -> TransactionId:
    """The id of the client transaction that a request of this branch, given without magic cookie, and method makes."""
    return TransactionId(MAGIC_COOKIE + branch, "", method)


class SipStack:
    """All transactions of one process (RFC 3261 section 17).

    `advertised` gives the address at which peers at the other end of a flow reach us, `new_token` To tags for what the
    stack answers itself, `by_stream` the connection that may be tried instead of a flow over UDP. Above
    `max_server_transactions` new requests get 503, without any memory of them.
    """

    def __init__(
        self,
        *,
        advertised: Callable[[Flow], Address],
        new_token: Callable[[], str],
        timers: Timers,
        server_name: str,
        by_stream: Callable[[Flow], Flow | None] = lambda _: None,
        max_server_transactions: int = 65_536,
    ) -> None:
        self._by_stream = by_stream
        self._advertised = advertised
        self._new_token = new_token
        self._timers = timers
        self._server_name = server_name
        self._max_server_transactions = max_server_transactions
        self._clients: dict[TransactionId, ClientTransaction] = {}
        self._servers: dict[TransactionId, ServerTransaction] = {}
        self._merge_keys: dict[tuple[str, str, str], TransactionId] = {}  # of those in _servers, so bounded with them
        # Of reliable transports only, by the connection that they use.
        self._of_flow: dict[Flow, set[Transaction]] = {}
        # Restored ones of these whose request may never have left.
        self._interrupted: list[ClientTransaction] = []
        # Connections that stood in for UDP and could not be had, and until when they are not tried again.
        self._without_stream: dict[Flow, float] = {}
        self._deadlines: list[tuple[float, int, Transaction]] = []
        self._order = itertools.count()

    client_id = staticmethod(client_id)

    # ------------------------------------------------------------------------------------------------ from the network

    def receive(self, data: bytes, flow: Flow, now: float) -> list[Output]:
        """Take one datagram, or one message of a stream as control.sip.framing cuts it.

        Raises nothing, whatever it holds.
        """
        if len(data) <= _LONGEST_KEEP_ALIVE and not data.strip(b"\r\n\0"):
            return [Discarded(flow, DiscardReason.KEEP_ALIVE, "")]
        try:
            message = parse_message(data)
            if flow.transport is not Transport.UDP:
                demand_length(message)
            if isinstance(message, Response):
                return self._receive_response(message, flow, now)
            return self._receive_request(message, flow, now)
        except RemoteProtocolError as error:
            if error.request is None:
                return [Discarded(flow, DiscardReason.MALFORMED, str(error))]
            if flow.transport is not Transport.UDP and is_cut_short(error):
                error.status = 513
            return self._answer_malformed(error.request, error, flow)

    def transport_failed(self, transaction: TransactionId, now: float) -> list[Output]:
        """A `Transmit` of this transaction could not be performed (sections 17.1.4 and 17.2.4)."""
        return self._feed(self._clients.get(transaction) or self._servers.get(transaction), Event.TRANSPORT_ERROR, now)

    def flow_failed(self, flow: Flow, now: float) -> list[Output]:
        """The connection that a flow names is gone, or there could be none.

        A request without any answer has failed (section 17.1.4); one with a provisional answer waits on, as the rest
        may come over a new connection. Responses go to the port in the request's Via from now on (section 18.2.2).
        """
        outputs: list[Output] = []
        for transaction in list(self._of_flow.get(flow, ())):
            if isinstance(transaction, ServerTransaction):
                port = int(transaction.id.sent_by.rpartition(":")[2])
                self._stay_off(transaction)
                transaction.flow = replace(flow, remote=Address(flow.remote.host, port))
                self._note_flow(transaction)
            elif transaction.state in _UNANSWERED:
                outputs += self._by_datagram(transaction, now) or self._feed(transaction, Event.TRANSPORT_ERROR, now)
        return outputs

    def _by_datagram(self, transaction: Transaction, now: float) -> list[Output]:
        """Start a transaction again over UDP, if its connection only stood in for that (section 18.1.1)."""
        if not isinstance(transaction, ClientTransaction) or transaction.instead_of is None:
            return []
        self._without_stream[transaction.flow] = now + _WITHOUT_STREAM_S
        if transaction.state is State.WITHDRAWN:
            return []  # nobody has seen the request, and nobody wants it answered any more
        self._forget(transaction)
        request = self._via_changed(transaction.request, transaction.instead_of)
        return self._start_client(request, request.encode(), transaction.id, transaction.instead_of, now)

    def _receive_response(self, response: Response, flow: Flow, now: float) -> list[Output]:
        via = response.via
        transaction = self._clients.get(TransactionId(via.branch, "", response.cseq.method))
        if transaction is None:
            detail = f"{response.status} to {response.cseq}, Call-ID {response.call_id}"
            return [Discarded(flow, DiscardReason.STRAY_RESPONSE, detail)]
        ours = self._advertised(transaction.flow)
        if via.host.lower() != ours.host.lower() or (via.port or DEFAULT_PORT) != ours.port:
            return [Discarded(flow, DiscardReason.MISROUTED_RESPONSE, f"Via of {via.host}:{via.port}")]
        if len(response.headers.get_list("Via")) != 1:
            return [Discarded(flow, DiscardReason.MISROUTED_RESPONSE, "more than one Via")]
        return self._feed(transaction, response_event(response.status), now, response, flow)

    def _receive_request(self, request: Request, flow: Flow, now: float) -> list[Output]:
        transaction_id = server_id(request)
        note_source(request, flow)
        if request.method == "ACK":
            return self._receive_ack(request, transaction_id, flow, now)
        transaction = self._servers.get(transaction_id)
        if transaction is not None:
            return self._feed(transaction, Event.REQUEST, now, request, flow)
        if len(self._servers) >= self._max_server_transactions:
            response = self._own_response(request, 503)
            response.headers.set("Retry-After", str(max(1, round(64 * self._timers.t1))))
            return [Transmit(response.encode(), flow, MessageLabel.of(response))]
        if request.method == "CANCEL":
            return self._receive_cancel(request, transaction_id, flow, now)

        merge_key = None if request.to.tag else (request.from_.tag or "", request.call_id, str(request.cseq))
        refusal = self._refusal(request, merge_key)
        if refusal is not None:
            refused = self._start_server(None, transaction_id, flow, now)
            return self._answer(refused, self._own_response(request, refusal), now)
        transaction = self._start_server(merge_key, transaction_id, flow, now)
        outputs: list[Output] = []
        if request.method == "INVITE":
            outputs = self._answer(transaction, build_response(request, 100), now)
        outputs.append(RequestReceived(transaction_id, request, flow))
        return outputs

    def _refusal(self, request: Request, merge_key: tuple[str, str, str] | None) -> int | None:
        if merge_key is None:
            return None  # within a dialog the request has arrived where it was to go
        if merge_key in self._merge_keys:
            return 482
        return 483 if request.max_forwards == 0 and request.method not in _NEVER_FORWARDED else None

    def _receive_ack(self, ack: Request, transaction_id: TransactionId, flow: Flow, now: float) -> list[Output]:
        transaction = self._servers.get(replace(transaction_id, method="INVITE"))
        if transaction is None:
            return [AckReceived(ack, flow)]
        if not has_cookie(ack.via) and ack.to.tag != to_tag_of(transaction.last_sent):
            return [AckReceived(ack, flow)]  # section 17.2.3: of RFC 2543, and for another response than the one sent
        return self._feed(transaction, Event.ACK, now, ack, flow)

    def _receive_cancel(self, cancel: Request, transaction_id: TransactionId, flow: Flow, now: float) -> list[Output]:
        """Section 9.2; the 200 carries the To tag of the INVITE's responses, if there is one already."""
        invite = self._servers.get(replace(transaction_id, method="INVITE"))
        transaction = self._start_server(None, transaction_id, flow, now)
        if invite is None:
            return self._answer(transaction, self._own_response(cancel, 481), now)
        response = self._own_response(cancel, 200, to_tag_of(invite.last_sent))
        return self._answer(transaction, response, now) + self._feed(invite, Event.CANCEL, now, cancel, flow)

    def _answer_malformed(self, request: Request, error: RemoteProtocolError, flow: Flow) -> list[Output]:
        note_source(request, flow)
        response = self._own_response(request, error.status)
        if error.status == 400:
            response.reason = f"Bad Request - {error.header}: {error.message}" if error.header else response.reason
        return [Transmit(response.encode(), flow, _label(request.method, response.status))]

    # ------------------------------------------------------------------------------------- from the transaction user

    def send_request(self, request: Request, flow: Flow, branch: str, now: float) -> list[Output]:
        """Start the client transaction `client_id(branch, request.method)`. `request` itself stays as it is.

        Raises:
            LocalProtocolError: The branch is in use, or the method is ACK or CANCEL, which have verbs of their own.
        """
        transaction_id = client_id(branch, request.method)
        if request.method in ("ACK", "CANCEL") or transaction_id in self._clients:
            raise LocalProtocolError(f"cannot start a {request.method} transaction with branch {branch}")
        sent = self._with_via(request, flow, branch)
        data = sent.encode()
        if len(data) <= MAX_UDP_REQUEST_BYTES or flow.transport is not Transport.UDP:
            return self._start_client(sent, data, transaction_id, flow, now)
        stream = self._by_stream(flow)
        if stream is None or self._without_stream.get(stream, now) > now:
            return self._start_client(sent, data, transaction_id, flow, now)
        self._without_stream.pop(stream, None)
        sent = self._via_changed(sent, stream)
        return self._start_client(sent, sent.encode(), transaction_id, stream, now, instead_of=flow)

    def send_ack(self, request: Request, flow: Flow, branch: str) -> list[Output]:
        """Send the ACK for a 2xx, which is outside of all transactions (section 13.2.2.4)."""
        return [Transmit(self._with_via(request, flow, branch).encode(), flow, _label("ACK", None))]

    def respond(self, transaction: TransactionId, response: Response, now: float) -> list[Output]:
        """Send a response; also each repetition of a 2xx to INVITE (RFC 6026 section 7.1).

        Returns nothing where the transaction is over or cannot send this any more.
        """
        return self._feed(self._servers.get(transaction), response_event(response.status), now, response)

    def is_unanswered(self, transaction: TransactionId) -> bool:
        """Whether an INVITE from a far end still waits for its final response."""
        known = self._servers.get(transaction)
        return known is not None and known.state is State.PROCEEDING

    def cancel(self, transaction: TransactionId, now: float) -> list[Output]:
        """Give up an INVITE: send CANCEL as soon as a provisional response allows it (section 9.1).

        The outcome is the INVITE's: a final response (possibly 2xx), or its timeout after 64*T1.
        """
        return self._feed(self._clients.get(transaction), Event.CANCEL, now)

    # --------------------------------------------------------------------------------------------------------- timers

    def save(self, transactions: Iterable[TransactionId]) -> tuple[SavedTransaction, ...]:
        """Those of these transactions that are alive, as plain data."""
        alive = (self._clients.get(id_) or self._servers.get(id_) for id_ in transactions)
        return tuple(transaction.save() for transaction in alive if transaction is not None)

    def restore(self, saved: SavedTransaction, now: float) -> None:
        """Take up a transaction of an earlier process: it goes on where it was, timers that are overdue fire next.

        The connections of that process are gone. A request without any answer is sent once more, as no timer would.
        """
        transaction: ClientTransaction | ServerTransaction
        if saved.request is not None:
            transaction = ClientTransaction(
                saved.request, saved.id, saved.flow, self._timers, now, instead_of=saved.instead_of
            )
            self._clients[saved.id] = transaction
            self._note_flow(transaction)
        else:
            transaction = self._start_server(saved.merge_key, saved.id, saved.flow, now)
        transaction.restore(saved)
        if isinstance(transaction, ClientTransaction) and saved.flow.transport.is_reliable:
            self._interrupted += [transaction] if transaction.state in _UNANSWERED else []
        self._schedule(transaction)

    def handle_timer(self, now: float) -> list[Output]:
        """Fire what is due."""
        outputs: list[Output] = []
        if self._interrupted:
            interrupted, self._interrupted = self._interrupted, []
            for restored in interrupted:
                if restored.state in _UNANSWERED:
                    outputs += self._perform(restored, (Action.RESEND,), now)
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, _, transaction = heapq.heappop(self._deadlines)
            if deadline == transaction.scheduled_at:
                transaction.scheduled_at = _NEVER
                outputs += self._perform(transaction, transaction.handle_timer(now), now)
        return outputs

    def next_deadline(self) -> float | None:
        """When `handle_timer` wants to be called."""
        if self._interrupted:
            return 0.0
        while self._deadlines:
            deadline, _, transaction = self._deadlines[0]
            current = deadline == transaction.scheduled_at
            if current and deadline == transaction.next_deadline():
                return deadline
            heapq.heappop(self._deadlines)
            if current:
                transaction.scheduled_at = _NEVER
                self._schedule(transaction)
        return None

    def counts(self) -> Mapping[str, int]:
        """Live transactions by kind: ict, nict, ist, nist."""
        live: Iterable[Transaction] = itertools.chain(self._clients.values(), self._servers.values())
        found = Counter(transaction.machine.name for transaction in live)
        return {machine.name: found[machine.name] for machine in MACHINES}

    # -------------------------------------------------------------------------------------------- running the machines

    def _start_client(
        self,
        request: Request,
        data: bytes,
        transaction_id: TransactionId,
        flow: Flow,
        now: float,
        *,
        instead_of: Flow | None = None,
    ) -> list[Output]:
        transaction = ClientTransaction(request, transaction_id, flow, self._timers, now, instead_of=instead_of)
        transaction.last_sent = data
        self._clients[transaction_id] = transaction
        self._note_flow(transaction)
        self._schedule(transaction)
        return [Transmit(transaction.last_sent, flow, _label(request.method, None), transaction_id)]

    def _start_server(
        self, merge_key: tuple[str, str, str] | None, transaction_id: TransactionId, flow: Flow, now: float
    ) -> ServerTransaction:
        transaction = ServerTransaction(merge_key, transaction_id, flow, self._timers, now)
        self._servers[transaction_id] = transaction
        if merge_key is not None:
            self._merge_keys[merge_key] = transaction_id
        self._note_flow(transaction)
        return transaction

    def _answer(self, transaction: ServerTransaction, response: Response, now: float) -> list[Output]:
        return self._feed(transaction, response_event(response.status), now, response)

    def _feed(
        self,
        transaction: Transaction | None,
        event: Event,
        now: float,
        message: Request | Response | None = None,
        flow: Flow | None = None,
    ) -> list[Output]:
        if transaction is None:
            return []
        return self._perform(transaction, transaction.receive(event, now), now, message, flow)

    def _perform(
        self,
        transaction: Transaction,
        actions: Iterable[Action],
        now: float,
        message: Request | Response | None = None,
        flow: Flow | None = None,
    ) -> list[Output]:
        """Do what a row says, then file the transaction as its new state demands.

        The casts rest on the tables: what needs a message, or a client, stands only in rows of events that have it.
        """
        outputs: list[Output] = []
        # A CANCEL client transaction is our own affair: its INVITE tells how things went.
        is_ours = transaction.id.method == "CANCEL"
        for action in actions:
            match action:
                case Action.SEND | Action.SEND_AGAIN:
                    response = cast("Response", message)
                    transaction.last_sent = response.encode()
                    transaction.last_status = response.status
                    label = _label(transaction.id.method, response.status, action is Action.SEND_AGAIN)
                    outputs.append(Transmit(transaction.last_sent, transaction.flow, label, transaction.id))
                case Action.RESEND:
                    is_ack = transaction.machine is INVITE_CLIENT and transaction.state is State.COMPLETED
                    method = "ACK" if is_ack else transaction.id.method
                    label = _label(method, transaction.last_status, True)
                    outputs.append(Transmit(transaction.last_sent, transaction.flow, label, transaction.id))
                case Action.SEND_ACK:
                    invite = cast("ClientTransaction", transaction).request
                    ack = same_hop("ACK", invite, cast("Response", message).headers.require("to"))
                    transaction.last_sent = ack.encode()
                    label = _label("ACK", None)
                    outputs.append(Transmit(transaction.last_sent, transaction.flow, label, transaction.id))
                case Action.SEND_CANCEL:
                    invite = cast("ClientTransaction", transaction).request
                    cancel = same_hop("CANCEL", invite, invite.headers.require("to"))
                    cancel_id = replace(transaction.id, method="CANCEL")
                    outputs += self._start_client(cancel, cancel.encode(), cancel_id, transaction.flow, now)
                case Action.DELIVER:
                    if not is_ours:
                        outputs += _delivered(transaction, cast("Request | Response", message), cast("Flow", flow))
                case Action.REPORT_TIMEOUT:
                    if not is_ours:
                        outputs.append(TransactionFailed(transaction.id, FailureCause.TIMEOUT))
                case Action.REPORT_TRANSPORT_ERROR:
                    if not is_ours:
                        outputs.append(TransactionFailed(transaction.id, FailureCause.TRANSPORT))
                case _:
                    assert_never(action)
        if transaction.state is State.TERMINATED:
            self._forget(transaction)
        else:
            self._schedule(transaction)
        return outputs

    def _forget(self, transaction: Transaction) -> None:
        self._stay_off(transaction)
        if not isinstance(transaction, ServerTransaction):
            self._clients.pop(transaction.id, None)
            return
        self._servers.pop(transaction.id, None)
        if transaction.merge_key is not None:
            self._merge_keys.pop(transaction.merge_key, None)

    def _note_flow(self, transaction: Transaction) -> None:
        if transaction.flow.transport is not Transport.UDP:
            self._of_flow.setdefault(transaction.flow, set()).add(transaction)

    def _stay_off(self, transaction: Transaction) -> None:
        """Undo `_note_flow`."""
        if transaction.flow.transport is not Transport.UDP:
            there = self._of_flow.get(transaction.flow, set())
            there.discard(transaction)
            if not there:
                self._of_flow.pop(transaction.flow, None)

    def _schedule(self, transaction: Transaction) -> None:
        """See to it that the heap holds an entry no later than the transaction's deadline.

        Entries are never taken out early: one other than `scheduled_at` is stale, one that comes too soon is put back.
        """
        deadline = transaction.next_deadline()
        if deadline is not None and deadline < transaction.scheduled_at:
            transaction.scheduled_at = deadline
            heapq.heappush(self._deadlines, (deadline, next(self._order), transaction))

    # ----------------------------------------------------------------------------------------------- building messages

    def _with_via(self, request: Request, flow: Flow, branch: str) -> Request:
        headers = request.headers.copy()
        headers.insert("Via", self._via(flow, MAGIC_COOKIE + branch))
        return Request(request.method, request.uri, headers, request.body)

    def _via_changed(self, request: Request, flow: Flow) -> Request:
        """The same request of ours, to be sent along another flow."""
        headers = request.headers.copy()
        headers.set("Via", self._via(flow, request.via.branch))
        return Request(request.method, request.uri, headers, request.body)

    def _via(self, flow: Flow, branch: str) -> str:
        ours = self._advertised(flow)
        return f"SIP/2.0/{flow.transport} {ours.uri_host}:{ours.port};rport;branch={branch}"

    def _own_response(self, request: Request, status: int, to_tag: str | None = None) -> Response:
        response = build_response(request, status, to_tag=to_tag or self._new_token())
        if self._server_name:
            response.headers.set("Server", self._server_name)
        return response


def _delivered(transaction: Transaction, message: Request | Response, flow: Flow) -> list[Output]:
    if isinstance(message, Response):
        return [ResponseReceived(transaction.id, message, flow)] if message.status != 100 else []
    if message.method == "ACK":
        return [AckReceived(message, flow)]
    return [CancelReceived(transaction.id, message, flow)]
