"""The transaction user: dispatches what the stack reports, feeds the calls, and performs their effects.

It holds the tables (calls by id, legs by dialog) and one alarm for all machines; rules are in control.sip and
control.pbx. Requests from trunks are trusted by source address, all others are challenged (RFC 3261 section 22).
"""

import asyncio
import contextlib
import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Final, Protocol, assert_never

import structlog

from control.b2bua.authentication import Authentication
from control.b2bua.factory import CallFactory, OriginatedParty, caller_record
from control.b2bua.flows import listening_flow
from control.b2bua.keeping import CallKeeper, JournalPort
from control.b2bua.registration import BindingPort, Registration
from control.b2bua.saved_calls import SavedCall, saved
from control.b2bua.transactions import TransactionOwners
from control.metrics import ControlMetrics
from control.pbx import termination
from control.pbx.admission import Admission
from control.pbx.call import Call
from control.pbx.effects import CloseMedia, Effect, OpenMedia, Publish, UpdateMedia
from control.pbx.media import MediaFailure, MediaInput, MediaSpec, RestoredSession
from control.pbx.records import (
    CallDirection,
    CallEvent,
    CallEventKind,
    CallId,
    CallRecord,
    CallState,
    CallView,
    ErrorEvent,
    Event,
    LegName,
    Reason,
    RegistrationView,
    Result,
    Termination,
)
from control.pbx.registrar import Binding, Registrar
from control.pbx.routing import Caller, Refusal, Router
from control.pbx.trunks import Trunks
from control.settings.settings import Settings
from control.sip.address import Flow
from control.sip.digest import DenialReason, Denied, DigestAuthenticator
from control.sip.errors import RemoteProtocolError
from control.sip.headers import Uri
from control.sip.message import Request, Response, build_response
from control.sip.session import (
    ALLOW,
    SDP,
    SUPPORTED,
    InviteSession,
    SendAck,
    SendCancel,
    SendRequest,
    SendResponse,
    StackEvent,
    refusal,
)
from control.sip.snapshot import Plain
from control.sip.stack import (
    AckReceived,
    CancelReceived,
    Discarded,
    MessageLabel,
    RequestReceived,
    ResponseReceived,
    SipStack,
    TransactionFailed,
    Transmit,
)
from control.sip.stack import Output as StackOutput
from control.sip.transaction import TransactionId

# Requests that exist inside dialogs only (RFC 3261 section 12.2.2), and all that we know of.
IN_DIALOG: Final = frozenset({"BYE", "PRACK", "UPDATE", "INFO"})
KNOWN: Final = IN_DIALOG | {"INVITE", "ACK", "CANCEL", "OPTIONS", "REGISTER", "MESSAGE", "NOTIFY", "SUBSCRIBE", "REFER",
                            "PUBLISH"}  # fmt: skip
OUT_OF_DIALOG_ALLOW: Final = f"{ALLOW}, REGISTER"
CLOSE_PATIENCE_S: Final = 4.0

_log = structlog.get_logger(__name__)


class MediaPort(Protocol):
    """The data plane as calls use it: wishes return at once, each has one MediaInput for an answer."""

    def open(self, spec: MediaSpec) -> None:
        """Make a session."""

    def update(self, spec: MediaSpec) -> None:
        """Change a session."""

    def close(self, session_id: str) -> None:
        """End a session."""

    def unavailable(self) -> MediaFailure | None:
        """Why no session could be made now; None when one could."""


# Why a call is refused before anybody is rung, while the data plane cannot take it.
_MEDIA_REASONS: Final = {
    MediaFailure.PORTS_EXHAUSTED: (Reason.PORTS_EXHAUSTED, "no port block is free"),
    MediaFailure.UNAVAILABLE: (Reason.MEDIA_UNAVAILABLE, "the data plane is not available"),
    MediaFailure.REFUSED: (Reason.MEDIA_UNAVAILABLE, "the data plane takes no sessions"),
}


class B2bua:
    """Joins stack, calls, registrar and data plane in one event loop."""

    def __init__(
        self,
        *,
        settings: Settings,
        stack: SipStack,
        registrar: Registrar,
        router: Router,
        trunks: Trunks,
        admission: Admission,
        authenticator: DigestAuthenticator,
        media: MediaPort,
        transmit: Callable[[bytes, Flow], None],
        publish: Callable[[Event], None],
        metrics: ControlMetrics,
        new_token: Callable[[], str],
        clock: Callable[[], float],
        utc_now: Callable[[], datetime],
        journal: JournalPort | None = None,
        bindings: BindingPort | None = None,
    ) -> None:
        """Without a journal calls die with their process, and without `bindings` so do registrations."""
        self._settings = settings
        self._stack = stack
        self._router = router
        self._trunks = trunks
        self._admission = admission
        self._authentication = Authentication(authenticator, settings.users, metrics=metrics, new_token=new_token)
        self._registration = Registration(
            registrar,
            self._authentication,
            metrics=metrics,
            publish=publish,
            new_token=new_token,
            utc_now=utc_now,
            store=bindings,
            moved=self._follow,
        )
        self._factory = CallFactory(settings, new_token=new_token)
        self._media = media
        self._send = transmit
        self._keeper = CallKeeper(
            journal,
            transmit=self._transmit,
            snapshot=self._snapshot,
            border=self._border,
            metrics=metrics,
            clock=clock,
        )
        self._publish = publish
        self._metrics = metrics
        self._new_token = new_token
        self._clock = clock
        self._utc_now = utc_now
        self._calls: dict[CallId, Call] = {}
        self._legs: dict[tuple[str, str], tuple[Call, LegName]] = {}
        self._transactions = TransactionOwners()
        # A call stands here once for each change of its deadline; entries that no longer hold are passed over.
        self._armed: dict[CallId, float] = {}
        self._deadlines: list[tuple[float, int, Call]] = []
        self._entries = itertools.count()
        # What the call in hand sends; None while none is in hand.
        self._leaving: list[Transmit] | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    # ---- inputs ----------------------------------------------------------------------------------------------------

    def receive(self, data: bytes, flow: Flow) -> None:
        """Takes one datagram."""
        if len(data) > self._settings.limits.max_message_bytes:
            self._metrics.error("sip", "too-big")
            return
        now = self._clock()
        with self._border():
            self._perform_stack(self._stack.receive(data, flow, now), now)
        self._arm()

    def flow_failed(self, flow: Flow) -> None:
        """Takes it that the connection which a flow names is gone, or could not be had."""
        now = self._clock()
        trunk = self._trunks.of_source(flow.remote)
        for call in list(self._calls.values()):
            for session in call.legs.values():
                if session.flow != flow or session.dialog is None:
                    continue
                if session.symmetric:
                    self._redirect(call, session, listening_flow(flow, session.dialog.remote_target), now)
                elif trunk is not None and trunk.flow.transport is flow.transport:
                    self._redirect(call, session, trunk.flow, now)
        with self._border():
            self._perform_stack(self._stack.flow_failed(flow, now), now)
        self._arm()

    def media_input(self, event: MediaInput) -> None:
        """Takes what the data plane says."""
        call = self._calls.get(CallId(event.session_id))
        if call is None:
            return
        now = self._clock()
        with self._border(call):
            self._perform(call, call.receive_media(event, now), now)
        self._arm()

    def active_calls(self) -> Mapping[str, int]:
        """How many calls there are that have not ended, by state."""
        counts = Counter(call.state.value for call in self._calls.values())
        return {state.value: counts[state.value] for state in CallState if state is not CallState.ENDED}

    # ---- what programs ask for -------------------------------------------------------------------------------------

    def _count(self) -> int:
        return sum(call.state is not CallState.ENDED for call in self._calls.values())

    def calls(self) -> list[CallView]:
        """The calls that have not ended, the oldest first."""
        return [call.view() for call in self._calls.values() if call.state is not CallState.ENDED]

    def call(self, call_id: CallId) -> CallView | None:
        """One of them."""
        call = self._calls.get(call_id)
        return call.view() if call is not None and call.state is not CallState.ENDED else None

    def registrations(self) -> list[RegistrationView]:
        """What is registered now, by user."""
        return self._registration.views(self._clock())

    def originate(self, call_id: CallId, caller: str, callee: str) -> CallView | Refusal:
        """Starts a call between two parties, each named as a user would dial it; or says why there is none.

        Whether `call_id` is new is for whoever asks to know.
        """
        now = self._clock()
        refused = self._admission.admit(None, self._count(), now) or self._media_refusal()
        if refused is not None:
            return refused
        parties: list[OriginatedParty] = []
        for leg, name in ((LegName.CALLER, caller), (LegName.CALLEE, callee)):
            # A program may have called whatever users may dial.
            route = self._router.route(Caller(user=name), Uri("sip", name, "localhost"), now)
            if isinstance(route, Refusal):
                return replace(route, detail=f"the {leg.value}: {route.detail}")
            parties.append(OriginatedParty(name, route))
        call = self._factory.originated(call_id, *parties, utc=self._utc_now(), now=now)
        with self._border(call):
            self._start(call, now)
        self._arm()
        return call.view()

    def hang_up(self, call_id: CallId, detail: str) -> CallView | None:
        """Ends a call, whatever it is doing; None when there is none. `detail` says for whom."""
        call = self._calls.get(call_id)
        if call is None or call.state is CallState.ENDED:
            return None
        now = self._clock()
        with self._border(call):
            end = termination.of_hangup(detail, answered=call.times.answered is not None)
            self._perform(call, call.hang_up(end, now), now)
        self._arm()
        return call.view()

    # ---- the end ---------------------------------------------------------------------------------------------------

    async def idle(self) -> None:
        """Waits until there are no calls."""
        await self._idle.wait()

    async def close(self) -> None:
        """Ends all calls, and waits a while for their media statistics and for the answers of the far ends."""
        now = self._clock()
        for call in list(self._calls.values()):
            with self._border(call):
                answered = call.times.answered is not None
                end = termination.of_failure(Reason.DRAINING, "the system stops", answered=answered)
                self._perform(call, call.hang_up(end, now), now)
        self._arm()
        try:
            await asyncio.wait_for(self._idle.wait(), CLOSE_PATIENCE_S)
        except TimeoutError:
            _log.warning("calls.unanswered_at_stop", calls=len(self._calls))
        finally:
            if self._alarm is not None:
                self._alarm.cancel()
                self._alarm = None
            self._keeper.close()

    # ---- what the stack reports ------------------------------------------------------------------------------------

    def _perform_stack(self, outputs: Iterable[StackOutput], now: float) -> None:
        acks: list[tuple[CallId | None, Transmit]] = []
        trying: Transmit | None = None
        for output in outputs:
            match output:
                case Transmit(label=MessageLabel(status=100, retransmission=False)) if self._leaving is None:
                    # The far end repeats itself no more once it has it, so it waits for what is made of the request.
                    trying = output
                case Transmit(label=MessageLabel(method="ACK", retransmission=False)) if self._leaving is None:
                    # Of a refusal: it must not come again, so it waits for what its call makes of it.
                    acks.append((self._call_of(output.transaction), output))
                case Transmit():
                    if self._leaving is not None:
                        self._leaving.append(output)
                    else:
                        self._keeper.departures.send(self._call_of(output.transaction), output)
                case RequestReceived():
                    self._guard(output, now)
                    self._promise(trying, output)
                case ResponseReceived():
                    key = (output.response.call_id, output.response.from_.tag or "")
                    if output.response.status >= 200:
                        self._transactions.settle(output.transaction, accepted=output.response.status < 300)
                    self._to_leg(self._legs.get(key), output, now)
                case AckReceived():
                    key = (output.request.call_id, output.request.to.tag or "")
                    self._to_leg(self._legs.get(key), output, now)
                case CancelReceived():
                    self._to_leg(self._transactions.get(output.transaction), output, now)
                case TransactionFailed():
                    self._to_leg(self._transactions.get(output.transaction), output, now)
                case Discarded():
                    self._metrics.sip_discarded(output.reason.value)
                    _log.debug("sip.message_discarded", source=str(output.flow.remote), detail=output.detail)
                case _:
                    assert_never(output)
        for call_id, ack in acks:
            self._keeper.departures.send(call_id, ack)

    def _promise(self, trying: Transmit | None, event: RequestReceived) -> None:
        """Sends the 100 of an INVITE that has no final response yet, once its call is on the disk."""
        if trying is None or not self._stack.is_unanswered(event.transaction):
            return
        dialog = event.request.call_id, event.request.to.tag or ""
        entry = self._transactions.get(event.transaction) or self._legs.get(dialog)
        if entry is None:
            self._keeper.departures.send(None, trying)
        else:
            self._keeper.promise(entry[0], trying)

    def _guard(self, event: RequestReceived, now: float) -> None:
        """Dispatches a request; whatever is wrong with it is answered, and a bug of ours costs this request alone."""
        request = event.request
        try:
            self._dispatch(event, now)
        except RemoteProtocolError as error:
            self._answer(event.transaction, refusal(request, error, self._new_token()), now)
        except Exception:  # noqa: BLE001 -- the border of one request
            self._metrics.error("sip", "request-failed")
            _log.exception("sip.request_failed", method=request.method, sip_call_id=request.call_id)
            self._publish(ErrorEvent(self._utc_now(), "sip", "request-failed", f"a {request.method}; see the log"))
            self._answer(event.transaction, build_response(request, 500, to_tag=self._new_token()), now)

    def _dispatch(self, event: RequestReceived, now: float) -> None:
        request = event.request
        if request.to.tag is not None:
            entry = self._legs.get((request.call_id, request.to.tag))
            if entry is None or not self._is_of_peer(entry, request):
                self._answer(event.transaction, build_response(request, 481), now)
                return
            call, leg = entry
            self._transactions.serve(event.transaction, call, leg)
            self._perform(call, call.receive(leg, event, now), now)
            return
        match request.method:
            case "REGISTER" | "OPTIONS" if self._admission.draining:
                self._answer(event.transaction, self._refusal_of(request, self._draining()), now)
            case "INVITE":
                self._invited(event, now)
            case "REGISTER":
                self._answer(event.transaction, self._registration.answer(request, event.flow, now), now)
            case "OPTIONS":
                response = self._refuse(request, 200)
                response.headers.add("Accept", SDP)
                response.headers.add("Supported", SUPPORTED)
                self._answer(event.transaction, response, now)
            case method if method in IN_DIALOG:
                self._answer(event.transaction, build_response(request, 481, to_tag=self._new_token()), now)
            case method:
                self._answer(event.transaction, self._refuse(request, 405 if method in KNOWN else 501), now)

    @staticmethod
    def _is_of_peer(entry: tuple[Call, LegName], request: Request) -> bool:
        dialog = entry[0].legs[entry[1]].dialog
        return dialog is not None and (dialog.remote.tag or "") == (request.from_.tag or "")

    def _to_leg(self, entry: tuple[Call, LegName] | None, event: StackEvent, now: float) -> None:
        if entry is not None:
            call, leg = entry
            with self._border(call):
                self._perform(call, call.receive(leg, event, now), now)

    @contextlib.contextmanager
    def _border(self, call: Call | None = None) -> Iterator[None]:
        """Whatever one event brings costs its own call at the most, and never the alarm of the others."""
        try:
            yield
        except RemoteProtocolError as error:
            self._metrics.error("sip", "remote-protocol-error")
            _log.warning("sip.message_unusable", call_id=call.call_id if call else None, error=str(error))
        except Exception:  # noqa: BLE001 -- the border of one event
            self._metrics.error("sip", "event-failed")
            call_id = call.call_id if call else None
            _log.exception("call.failed", call_id=call_id)
            self._publish(ErrorEvent(self._utc_now(), "sip", "event-failed", "see the log", call_id))
            if call is not None:
                self._give_up(call)

    def _give_up(self, call: Call) -> None:
        """Ends a call that tripped over a bug of ours; one that cannot even be ended is forgotten."""
        now = self._clock()
        try:
            termination = Termination(Result.FAILED, Reason.INTERNAL_ERROR, 500, detail="see the log")
            self._perform(call, call.hang_up(termination, now), now)
        except Exception:  # noqa: BLE001 -- there is nothing left to try
            _log.exception("call.abandoned", call_id=call.call_id)
            self._media.close(call.call_id)
            self._forget(call)

    # ---- connections that are lost ---------------------------------------------------------------------------------

    def _redirect(self, call: Call, session: InviteSession, flow: Flow, now: float) -> None:
        """Reaches the peer of a session along another flow from now on."""
        if session.flow != flow:
            session.flow = flow
            self._perform(call, (), now)

    def _follow(self, old: Binding, flow: Flow, now: float) -> None:
        """Goes on with the calls of a phone where it has registered again: its former connection is gone or will be.

        Only with its own user's: behind one NAT anybody can name the port of somebody else in a Contact.
        """
        places = {old.flow, listening_flow(old.flow, old.contact)}
        for call in list(self._calls.values()):
            users = {LegName.CALLER: call.parties.caller_user, LegName.CALLEE: call.parties.callee_user}
            for leg, session in call.legs.items():
                if users[leg] == old.aor and session.flow in places:
                    self._redirect(call, session, flow, now)

    # ---- registration and authentication ---------------------------------------------------------------------------

    def _deny(self, event: RequestReceived, verdict: Denied, now: float, *, status: int) -> None:
        response = self._authentication.answer(event.request, verdict, event.flow.remote, now, status=status)
        self._answer(event.transaction, response, now)

    # ---- a new call ------------------------------------------------------------------------------------------------

    def _invited(self, event: RequestReceived, now: float) -> None:
        request, flow = event.request, event.flow
        uri = Uri.parse(request.uri)
        trunk = self._trunks.of_source(flow.remote)
        shown = request.from_.uri.username or "anonymous"
        direction = CallDirection.INTERNAL if trunk is None else CallDirection.INBOUND
        if trunk is None and "Proxy-Authorization" not in request.headers:
            if self._admission.draining:
                self._answer(event.transaction, self._refusal_of(request, self._draining()), now)
                return
            self._deny(event, self._authentication.without_credentials(request), now, status=407)
            return
        # Before the credentials are looked at: whoever guesses passwords is held to the rate, too.
        refused = self._admission.admit(flow.remote, self._count(), now)
        if trunk is None:
            if refused is not None and refused.reason is Reason.RATE_LIMIT:
                # Nobody has shown who he is, so he cannot fill the disk with records either.
                self._metrics.error("sip", "rate-limit")
                _log.warning("call.rate_limited", source=str(flow.remote))
                self._answer(event.transaction, self._refusal_of(request, refused), now)
                return
            verdict = self._authentication.verify(request, "Proxy-Authorization", now)
            if isinstance(verdict, Denied):
                if verdict.reason in (DenialReason.WRONG, DenialReason.MALFORMED):
                    detail = f"credentials of {verdict.username or 'nobody'}: {verdict.reason.value}"
                    wrong = Refusal(403, Reason.WRONG_CREDENTIALS, detail)
                    self._record_refusal(event, wrong, direction, (shown, uri))
                self._deny(event, verdict, now, status=407)
                return
            shown = verdict.username
        caller = Caller(trunk=trunk.name) if trunk is not None else Caller(user=shown)
        refused = refused or self._media_refusal()
        route = refused or self._router.route(caller, uri, now)
        if isinstance(route, Refusal):
            self._refuse_call(event, route, direction, (shown, uri))
            return
        call = self._factory.invited(event, caller, shown, route, utc=self._utc_now(), now=now)
        self._transactions.own(event.transaction, call, LegName.CALLER)
        self._start(call, now)

    def _draining(self) -> Refusal:
        return Refusal(503, Reason.DRAINING, "draining", self._admission.retry_after_s)

    def _media_refusal(self) -> Refusal | None:
        failure = self._media.unavailable()
        if failure is None:
            return None
        reason, detail = _MEDIA_REASONS[failure]
        return Refusal(503, reason, detail, self._admission.retry_after_s)

    def _start(self, call: Call, now: float) -> None:
        self._calls[call.call_id] = call
        self._idle.clear()
        for leg, session in call.legs.items():
            self._legs[session.sip_call_id, session.local_tag] = (call, leg)
        self._perform(call, call.start(now), now)

    def _refuse_call(
        self, event: RequestReceived, refused: Refusal, direction: CallDirection, parties: tuple[str, Uri]
    ) -> None:
        self._record_refusal(event, refused, direction, parties)
        self._answer(event.transaction, self._refusal_of(event.request, refused), self._clock())

    def _refusal_of(self, request: Request, refused: Refusal) -> Response:
        response = build_response(request, refused.status, to_tag=self._new_token())
        if refused.retry_after_s is not None:
            response.headers.add("Retry-After", str(refused.retry_after_s))
        return response

    def _record_refusal(
        self, event: RequestReceived, refused: Refusal, direction: CallDirection, parties: tuple[str, Uri]
    ) -> None:
        """Publishes a call that never was: started, and ended with its reason."""
        at = self._utc_now()
        call_id = CallId(self._new_token())
        shown, uri = parties
        callee = uri.username or uri.opaque
        leg = caller_record(event.request, event.flow.remote, None, None)
        record = CallRecord(
            call_id=call_id,
            direction=direction,
            caller=shown,
            callee=callee,
            invited_at=at,
            ringing_at=None,
            answered_at=None,
            ended_at=at,
            setup_s=0.0,
            duration_s=0.0,
            termination=Termination(Result.REJECTED, refused.reason, refused.status, detail=refused.detail),
            legs=(leg,),
        )
        started = CallEvent(CallEventKind.STARTED, call_id, at, direction, shown, callee, 0.0)
        self._publish(started)
        self._publish(replace(started, kind=CallEventKind.ENDED, record=record))

    # ---- effects ---------------------------------------------------------------------------------------------------

    def _perform(self, call: Call, effects: Iterable[Effect], now: float) -> None:
        outer, self._leaving = self._leaving, []
        try:
            for effect in effects:
                self._carry_out(call, effect, now)
        finally:
            leaving, self._leaving = self._leaving, outer
            self._keeper.depart(call, leaving)
        if call.done:
            self._forget(call)
        elif (deadline := call.next_deadline()) is not None and self._armed.get(call.call_id) != deadline:
            self._armed[call.call_id] = deadline
            heapq.heappush(self._deadlines, (deadline, next(self._entries), call))

    def _carry_out(self, call: Call, effect: Effect, now: float) -> None:
        match effect:
            case SendRequest():
                transaction = self._stack.client_id(effect.branch, effect.request.method)
                self._transactions.own(transaction, call, self._leg_of(call, effect.request))
                self._perform_stack(self._stack.send_request(effect.request, effect.flow, effect.branch, now), now)
            case SendAck():
                self._perform_stack(self._stack.send_ack(effect.request, effect.flow, effect.branch), now)
            case SendResponse():
                self._perform_stack(self._stack.respond(effect.transaction, effect.response, now), now)
            case SendCancel():
                self._perform_stack(self._stack.cancel(effect.transaction, now), now)
            case OpenMedia():
                self._media.open(effect.spec)
            case UpdateMedia():
                self._media.update(effect.spec)
            case CloseMedia():
                self._media.close(effect.session_id)
            case Publish():
                self._tell(call, effect.event)
            case _:
                assert_never(effect)

    def _tell(self, call: Call, event: CallEvent) -> None:
        """Publishes; a call's row in the journal begins with its first event and ends with its last, its record."""
        if event.kind is CallEventKind.STARTED:
            self._keeper.begin(call)
        if event.record is not None:
            self._keeper.end(call, event.record)
        self._publish(event)

    def _transmit(self, message: Transmit) -> None:
        self._metrics.sip_message("out", message.label, message.flow.transport)
        self._send(message.data, message.flow)

    # ---- over the death of the process -----------------------------------------------------------------------------

    def _snapshot(self, call: Call) -> Plain:
        return saved(call, self._stack.save(self._transactions.of_call(call)))

    def _call_of(self, transaction: TransactionId | None) -> CallId | None:
        entry = self._transactions.get(transaction)
        return entry[0].call_id if entry is not None else None

    def take_up(self, of_journal: SavedCall) -> RestoredSession | None:
        """Takes a call of an earlier process: its tables and transactions stand, `resume` lets it go on.

        Returns what the data plane must have for it; None when it needs nothing there any more.
        """
        call, now = of_journal.call, self._clock()
        self._calls[call.call_id] = call
        self._keeper.taken_up(call.call_id)
        self._idle.clear()
        for leg, session in call.legs.items():
            session.take_up()
            self._legs[session.sip_call_id, session.local_tag] = (call, leg)
        for transaction in of_journal.transactions:
            self._stack.restore(transaction, now)
            for leg, session in call.legs.items():
                request = transaction.request
                if transaction.id in session.transactions() or (request and request.call_id == session.sip_call_id):
                    self._transactions.own(transaction.id, call, leg)
        return None if call.state is CallState.ENDED else call.media.restored()

    def resume(self) -> None:
        """Lets the calls that were taken up go on; those that were not answered yet are ended, on both sides."""
        now = self._clock()
        for call in list(self._calls.values()):
            with self._border(call):
                if call.state is CallState.RELEASING:
                    self._media.close(call.call_id)
                elif call.times.answered is None:
                    detail = "the control plane died while the call was being set up"
                    end = termination.of_failure(Reason.NODE_RESTARTED, detail, answered=False)
                    self._perform(call, call.hang_up(end, now), now)
                self._perform(call, (), now)
            _log.info("call.taken_up", call_id=call.call_id, state=call.state.value)
        self._arm()

    @staticmethod
    def _leg_of(call: Call, request: Request) -> LegName:
        return next(leg for leg, session in call.legs.items() if session.sip_call_id == request.call_id)

    def _answer(self, transaction: TransactionId, response: Response, now: float) -> None:
        self._perform_stack(self._stack.respond(transaction, response, now), now)

    def _refuse(self, request: Request, status: int) -> Response:
        response = build_response(request, status, to_tag=self._new_token())
        response.headers.add("Allow", OUT_OF_DIALOG_ALLOW)
        return response

    def _forget(self, call: Call) -> None:
        if self._calls.pop(call.call_id, None) is None:
            return
        for session in call.legs.values():
            self._legs.pop((session.sip_call_id, session.local_tag), None)
        self._armed.pop(call.call_id, None)
        self._keeper.forget(call.call_id)
        self._transactions.forget(call.call_id)
        if not self._calls:
            self._idle.set()

    # ---- time ------------------------------------------------------------------------------------------------------

    def _arm(self) -> None:
        """Sets the one alarm to the earliest deadline of all machines."""
        while self._deadlines and self._is_stale(self._deadlines[0]):
            heapq.heappop(self._deadlines)
        due = [self._stack.next_deadline(), self._registration.next_deadline()]
        if self._deadlines:
            due.append(self._deadlines[0][0])
        at = min((moment for moment in due if moment is not None), default=None)
        if self._alarm is not None:
            if at is not None and self._alarm.when() == at:
                return
            self._alarm.cancel()
            self._alarm = None
        if at is not None:
            self._alarm = asyncio.get_running_loop().call_at(at, self._ring, at)

    def _is_stale(self, entry: tuple[float, int, Call]) -> bool:
        deadline, _, call = entry
        return self._armed.get(call.call_id) != deadline

    def _ring(self, due: float) -> None:
        self._alarm = None
        now = max(due, self._clock())
        with self._border():
            self._perform_stack(self._stack.handle_timer(now), now)
        while self._deadlines and self._deadlines[0][0] <= now:
            entry = heapq.heappop(self._deadlines)
            if not self._is_stale(entry):
                call = entry[2]
                del self._armed[call.call_id]
                with self._border(call):
                    self._perform(call, call.handle_timer(now), now)
        self._registration.expire(now)
        self._arm()
