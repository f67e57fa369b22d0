"""A call: two INVITE sessions joined, and the media between them.

The machine takes what the stack and the data plane say about the call and gives what to send, what the data plane
shall do, and what observers hear. It refuses, cancels and hangs up with one `Termination`, from which the CDR is made.

An originated call has no INVITE from outside: the caller is called first, without an offer, and held with what it
offers; then the callee is called with that offer, and the caller is told the answer in a re-INVITE. This is flow III of
RFC 3725 section 4.3, save that the callee is asked what the caller can do instead of the other way round.

Left out: several targets at once, redirects, transfer.
"""

from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Final, assert_never

from control.pbx import termination
from control.pbx.call_media import CallMedia
from control.pbx.effects import CloseMedia, Effect, OpenMedia, Publish, UpdateMedia
from control.pbx.media import (
    MediaClosed,
    MediaFailed,
    MediaFailure,
    MediaInput,
    MediaInterrupted,
    MediaLatched,
    MediaLost,
    MediaOpened,
    MediaUpdated,
)
from control.pbx.parties import Parties
from control.pbx.records import (
    CallEvent,
    CallEventKind,
    CallId,
    CallRecord,
    CallState,
    CallView,
    LegName,
    LegRecord,
    Reason,
    Result,
    StreamRecord,
    Termination,
)
from control.sip.errors import RemoteProtocolError
from control.sip.sdp import Direction, SessionDescription
from control.sip.session import (
    Accepted,
    Answered,
    Cancelled,
    Ended,
    Established,
    InviteSession,
    Offered,
    OfferRejected,
    Progressed,
    Rejected,
    SessionState,
    StackEvent,
)
from control.sip.session import Output as SessionOutput
from control.sip.snapshot import Moment

RELEASE_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class CallLimits:
    """How long a call may ring and last, in seconds, and what a refused caller is told to wait."""

    ring_timeout_s: float
    max_duration_s: float
    retry_after_s: int


_SETTING_UP: Final = frozenset({CallState.RESERVING, CallState.CALLING, CallState.INVITING, CallState.RINGING})
_OVER: Final = frozenset({CallState.RELEASING, CallState.ENDED})


@dataclass(slots=True)
class _PendingOffer:
    """An offer of one leg that waits for ports, or for the other leg's answer."""

    by: LegName
    sdp: SessionDescription
    method: str
    forwarded: bool = False


@dataclass(slots=True)
class _Times:
    """Moments of the call in monotonic seconds; `utc` is the wall clock at `invited`: a stepped clock bends nothing."""

    utc: datetime
    invited: Moment
    ringing: Moment | None = None
    answered: Moment | None = None

    def at(self, moment: float | None) -> datetime | None:
        return None if moment is None else self.utc + timedelta(seconds=moment - self.invited)


@dataclass(slots=True)
class Call:
    """One call as a pure machine; `start` sets it going.

    `done` turns True once nothing more can come: the call has ended and both legs have finished.
    """

    call_id: CallId
    parties: Parties
    legs: dict[LegName, InviteSession]
    media: CallMedia
    limits: CallLimits
    offer: bytes
    times: _Times
    state: CallState = CallState.RESERVING
    termination: Termination | None = None
    _deadline: Moment | None = None
    _media_open: bool = False
    _pending: _PendingOffer | None = None
    _callee_sdp: SessionDescription | None = None
    _accepted_sdp: SessionDescription | None = None
    _late_offer: SessionDescription | None = None
    _caller_rang: bool = False
    _effects: list[Effect] = field(default_factory=list)

    @classmethod
    def between(
        cls,
        call_id: CallId,
        parties: Parties,
        *,
        caller: InviteSession,
        callee: InviteSession,
        media: CallMedia,
        limits: CallLimits,
        offer: bytes,
        utc: datetime,
        now: float,
    ) -> "Call":
        """A call that the caller's session asks for, with the body of its INVITE as `offer`; or an originated one."""
        legs = {LegName.CALLER: caller, LegName.CALLEE: callee}
        return cls(call_id, parties, legs, media, limits, offer, _Times(utc, now))

    # ---- inputs ----------------------------------------------------------------------------------------------------

    def start(self, now: float) -> list[Effect]:
        """Asks the data plane for ports; the callee is not rung before they are there."""
        self._publish(CallEventKind.STARTED, now)
        sdp: SessionDescription | None = None
        try:
            sdp = SessionDescription.parse(self.offer) if self.offer else None
        except RemoteProtocolError as error:
            self._release(Termination(Result.REJECTED, Reason.BAD_OFFER, 400, detail=error.message), now)
            return self._take()
        if sdp is None:
            self.media.reserve()
        else:
            self.media.plan(sdp)
            if not self.media.relays(sdp):
                detail = "no line of the offer is audio or video over RTP"
                self._release(Termination(Result.REJECTED, Reason.NO_COMMON_MEDIA, 488, detail=detail), now)
                return self._take()
            self.media.learn(LegName.CALLER, sdp)
        self._media_open = True
        self._effects.append(OpenMedia(self.media.spec()))
        return self._take()

    def receive(self, leg: LegName, event: StackEvent, now: float) -> list[Effect]:
        """Takes a message or failure of one leg."""
        self._perform(leg, self.legs[leg].receive(event, now), now)
        return self._take()

    def receive_media(self, event: MediaInput, now: float) -> list[Effect]:
        """Takes what the data plane says."""
        match event:
            case MediaOpened():
                self._media_opened(event, now)
            case MediaUpdated():
                self.media.bound(event.ports)
                if self.state is CallState.CALLING:
                    self._hold_caller(now)
                elif self._pending is not None and not self._pending.forwarded:
                    self._forward_offer(self._pending, now)
                elif event.generation == self.media.generation:
                    self._accept_caller(now)
            case MediaFailed():
                self._media_failed(event, now)
            case MediaClosed():
                self.media.interrupted(event.interruptions, event.gap_s)
                self._ended(event.streams, now)
            case MediaLatched():
                self.media.latched(event.source)
            case MediaInterrupted():
                self.media.interrupted(event.interruptions, event.gap_s)
            case MediaLost():
                self._release(self._failure(Reason.MEDIA_LOST, event.detail), now)
            case _:
                assert_never(event)
        return self._take()

    def hang_up(self, end: Termination, now: float) -> list[Effect]:
        """Ends the call, whatever it is doing."""
        self._release(end, now)
        return self._take()

    def record_if_lost(self, now: float) -> CallRecord:
        """What to keep of the call if its process died now and nobody could take it up again."""
        answered = self.times.answered is not None
        end = self.termination or termination.of_failure(
            Reason.NODE_RESTARTED, "the call could not be taken up again", answered=answered
        )
        return self._record(end, None, now)

    def view(self) -> CallView:
        """The call as others see it."""
        parties, times = self.parties, self.times
        return CallView(
            self.call_id,
            self.state,
            parties.direction,
            parties.caller,
            parties.callee,
            times.utc,
            times.at(times.ringing),
            times.at(times.answered),
        )

    def handle_timer(self, now: float) -> list[Effect]:
        """Does what is due for the legs and for the call itself."""
        for leg, session in self.legs.items():
            self._perform(leg, session.handle_timer(now), now)
        if self._deadline is not None and now >= self._deadline:
            self._deadline = None
            match self.state:
                case CallState.CALLING:
                    self._release(termination.of_ring_timeout(LegName.CALLER, self.limits.ring_timeout_s), now)
                case CallState.INVITING | CallState.RINGING:
                    self._release(termination.of_ring_timeout(LegName.CALLEE, self.limits.ring_timeout_s), now)
                case CallState.ANSWERING | CallState.ESTABLISHED:
                    detail = f"lasted {self.limits.max_duration_s:g} s"
                    self._release(Termination(Result.ANSWERED, Reason.MAX_DURATION, 200, detail=detail), now)
                case CallState.RELEASING:
                    self._ended(None, now)
                case CallState.RESERVING | CallState.ENDED:
                    pass
        return self._take()

    def next_deadline(self) -> float | None:
        """When `handle_timer` wants to be called."""
        due = [session.next_deadline() for session in self.legs.values()]
        return min((at for at in (*due, self._deadline) if at is not None), default=None)

    @property
    def done(self) -> bool:
        """Nothing more can come."""
        finished = all(session.state is SessionState.TERMINATED for session in self.legs.values())
        return self.state is CallState.ENDED and finished

    # ---- what the legs say -----------------------------------------------------------------------------------------

    def _perform(self, leg: LegName, outputs: list[SessionOutput], now: float) -> None:
        for output in outputs:
            match output:
                case Progressed() if leg is LegName.CALLER:
                    self._caller_progressed(output, now)
                case Progressed():
                    self._progressed(output, now)
                case Accepted() if leg is LegName.CALLER:
                    self._caller_accepted(output, now)
                case Accepted():
                    self._accepted(output, now)
                case Rejected():
                    self._rejected(leg, output, now)
                case Cancelled():
                    self._release(termination.of_cancellation(leg), now)
                case Established():
                    if self.state is CallState.ANSWERING:
                        self.state = CallState.ESTABLISHED
                case Offered():
                    self._offered(leg, output, now)
                case Answered():
                    self._answered(leg, output, now)
                case OfferRejected():
                    self._offer_rejected(leg, output, now)
                case Ended():
                    self._session_ended(leg, output, now)
                case _:
                    self._effects.append(output)

    def _caller_progressed(self, event: Progressed, now: float) -> None:
        if self.state is CallState.CALLING and event.status != 100 and not self._caller_rang:
            self._caller_rang = True
            self._publish(CallEventKind.RINGING, now, leg=LegName.CALLER)

    def _caller_accepted(self, event: Accepted, now: float) -> None:
        """The caller of an originated call has picked up: its lines get ports before it is answered."""
        if self.state is not CallState.CALLING:
            return
        sdp = self._parse(event.sdp)
        if sdp is not None:
            self.media.plan(sdp)
        if sdp is None or not self.media.relays(sdp):
            what = "the caller's offer has no SDP that can be read" if sdp is None else "no line of the caller's offer"
            detail = what if sdp is None else f"{what} is audio or video over RTP"
            reason = Reason.BAD_OFFER if sdp is None else Reason.NO_COMMON_MEDIA
            self._release(Termination(Result.FAILED, reason, 488, LegName.CALLER, detail), now)
            return
        self.offer = event.sdp
        self.media.learn(LegName.CALLER, sdp)
        self._effects.append(UpdateMedia(self.media.spec()))

    def _hold_caller(self, now: float) -> None:
        """Answers the caller of an originated call, who waits on hold from here on, and calls the callee."""
        offer = self.media.sides[LegName.CALLER].remote
        if offer is None:
            return
        told = self.media.describe(LegName.CALLER, offer.with_direction(Direction.INACTIVE))
        self._perform(LegName.CALLER, self.legs[LegName.CALLER].answer(told, now), now)
        if self.state is CallState.CALLING:
            self._invite_callee(now)

    def _invite_callee(self, now: float) -> None:
        self.state = CallState.INVITING
        self._deadline = now + self.limits.ring_timeout_s
        offer = self.media.sides[LegName.CALLER].remote
        self._invite(LegName.CALLEE, self.media.describe(LegName.CALLEE, offer) if offer is not None else b"", now)
        self._publish(CallEventKind.FORWARDED, now)

    def _invite(self, leg: LegName, sdp: bytes, now: float) -> None:
        invitation = self.parties.invitations[leg]
        outputs = self.legs[leg].invite(
            invitation.request_uri,
            caller=invitation.from_,
            callee=invitation.to,
            sdp=sdp,
            max_forwards=invitation.max_forwards,
        )
        self._perform(leg, outputs, now)

    def _progressed(self, event: Progressed, now: float) -> None:
        if self.state not in (CallState.INVITING, CallState.RINGING):
            return
        sdp = self._parse(event.sdp) if event.sdp and self.offer else None
        if sdp is not None:
            self._callee_sdp = sdp
            self.media.learn(LegName.CALLEE, sdp)
            self._effects.append(UpdateMedia(self.media.spec()))
        if self.state is CallState.INVITING and event.status != 100:
            self.state = CallState.RINGING
            self.times.ringing = now
            self._publish(CallEventKind.RINGING, now, leg=LegName.CALLEE)
        told = self.media.describe(LegName.CALLER, sdp) if sdp is not None else b""
        self._perform(LegName.CALLER, self.legs[LegName.CALLER].progress(event.status, event.reason, told, now), now)

    def _accepted(self, event: Accepted, now: float) -> None:
        if self.state not in (CallState.INVITING, CallState.RINGING):
            return
        sdp = self._parse(event.sdp) if event.sdp else self._callee_sdp
        if sdp is None or (self.offer and not self.media.relays(sdp)):
            detail = "the callee's answer has no SDP that can be read" if sdp is None else "the callee took no line"
            self._release(Termination(Result.FAILED, Reason.BAD_ANSWER, 502, LegName.CALLEE, detail), now)
            return
        if not self.offer:
            # It is the callee's offer; the caller answers it in its ACK.
            self.media.plan(sdp)
            if not self.media.relays(sdp):
                detail = "no line of the callee's offer is audio or video over RTP"
                self._release(Termination(Result.FAILED, Reason.NO_COMMON_MEDIA, 488, LegName.CALLEE, detail), now)
                return
            self._late_offer = sdp
        # The caller hears of it once the data plane knows: whoever talks at once is heard from the first packet on.
        self._accepted_sdp = sdp
        self.media.learn(LegName.CALLEE, sdp)
        self._effects.append(UpdateMedia(self.media.spec()))

    def _accept_caller(self, now: float) -> None:
        """Tells the caller what the callee answered, the data plane having been told."""
        sdp, self._accepted_sdp = self._accepted_sdp, None
        if sdp is None or self.state not in (CallState.INVITING, CallState.RINGING):
            return
        self.state = CallState.ANSWERING
        self.times.answered = now
        self._deadline = now + self.limits.max_duration_s
        caller, told = self.legs[LegName.CALLER], self.media.describe(LegName.CALLER, sdp)
        outputs = caller.offer(told, "INVITE", now) if self.parties.originated else caller.accept(told, now)
        self._perform(LegName.CALLER, outputs, now)
        self._publish(CallEventKind.ANSWERED, now)

    def _rejected(self, leg: LegName, event: Rejected, now: float) -> None:
        end = termination.of_rejection(leg, event)
        self._release(end, now, phrase=event.reason if end.sip_status == event.status else None)

    def _offered(self, leg: LegName, event: Offered, now: float) -> None:
        """A leg wants to change the session: it is asked of the other leg, once its lines have ports."""
        session = self.legs[leg]
        if self.state in _SETTING_UP:
            # The callee has not answered, so nobody can say what it would take (RFC 3311 section 5.2); a caller on
            # hold may try again.
            held = self.parties.originated and leg is LegName.CALLER
            self._perform(leg, session.refuse(491 if held else 504, None, now), now)
            return
        sdp = self._parse(event.sdp)
        if sdp is None:
            self._perform(leg, session.refuse(400, "Malformed SDP", now), now)
            return
        if self._pending is not None or self.state is not CallState.ESTABLISHED:
            self._perform(leg, session.refuse(491, None, now), now)
            return
        self._pending = _PendingOffer(leg, sdp, event.method)
        if self.media.plan(sdp):
            self._effects.append(UpdateMedia(self.media.spec()))
        else:
            self._forward_offer(self._pending, now)

    def _forward_offer(self, pending: _PendingOffer, now: float) -> None:
        pending.forwarded = True
        other = pending.by.opposite
        told = self.media.describe(other, pending.sdp)
        self._perform(other, self.legs[other].offer(told, pending.method, now), now)

    def _answered(self, leg: LegName, event: Answered, now: float) -> None:
        sdp = self._parse(event.sdp)
        pending = self._pending
        if self._late_offer is not None and leg is LegName.CALLER:
            self._late_answer(sdp, now)
            return
        if pending is None or pending.by is leg:
            # The answer to a description of ours that only repeated what was agreed, or to the callee's answer in an
            # originated call.
            if self.state is CallState.ANSWERING and self.parties.originated:
                self.state = CallState.ESTABLISHED
            if sdp is not None:
                self.media.learn(leg, sdp)
                self._effects.append(UpdateMedia(self.media.spec()))
            return
        self._pending = None
        offerer = self.legs[pending.by]
        if sdp is None:
            self._perform(pending.by, offerer.refuse(502, None, now), now)
            return
        self.media.learn(pending.by, pending.sdp)
        self.media.learn(leg, sdp)
        self._effects.append(UpdateMedia(self.media.spec()))
        self._perform(pending.by, offerer.answer(self.media.describe(pending.by, sdp), now), now)

    def _late_answer(self, sdp: SessionDescription | None, now: float) -> None:
        """The caller's ACK answers the callee's offer: the callee's ACK, which waited for it, can go."""
        self._late_offer = None
        if sdp is None:
            self._release(self._failure(Reason.BAD_ANSWER, "the answer in the caller's ACK cannot be read"), now)
            return
        self.media.learn(LegName.CALLER, sdp)
        self._effects.append(UpdateMedia(self.media.spec()))
        told = self.media.describe(LegName.CALLEE, sdp)
        self._perform(LegName.CALLEE, self.legs[LegName.CALLEE].answer(told, now), now)

    def _offer_rejected(self, leg: LegName, event: OfferRejected, now: float) -> None:
        pending, self._pending = self._pending, None
        if self._late_offer is not None and leg is LegName.CALLER:
            self._release(self._failure(Reason.BAD_ANSWER, event.reason), now)
        elif pending is None and self.state is CallState.ANSWERING:
            detail = f"the caller refused the callee's answer: {event.status} {event.reason}"
            self._release(self._failure(Reason.BAD_ANSWER, detail), now)
        elif pending is not None and pending.by is not leg:
            status = event.status if event.status >= 400 else 488
            self._perform(pending.by, self.legs[pending.by].refuse(status, event.reason or None, now), now)

    def _session_ended(self, leg: LegName, event: Ended, now: float) -> None:
        self._release(termination.of_end(leg, event, answered=self.times.answered is not None), now)

    # ---- what the data plane says ----------------------------------------------------------------------------------

    def _media_opened(self, event: MediaOpened, now: float) -> None:
        if self.state is not CallState.RESERVING:
            return
        self.media.bound(event.ports)
        if self.parties.originated:
            self.state = CallState.CALLING
            self._deadline = now + self.limits.ring_timeout_s
            self._invite(LegName.CALLER, b"", now)
        else:
            self._invite_callee(now)

    def _media_failed(self, event: MediaFailed, now: float) -> None:
        if self.state is CallState.RESERVING:
            self._media_open = False
            self._release(self._failure(termination.MEDIA_FAILURES[event.failure], event.detail), now)
        elif self.state is CallState.CALLING:
            self._release(self._failure(termination.MEDIA_FAILURES[event.failure], event.detail), now)
        elif self._pending is not None and not self._pending.forwarded:
            pending, self._pending = self._pending, None
            self._perform(pending.by, self.legs[pending.by].refuse(488, None, now), now)
        elif event.failure is MediaFailure.UNAVAILABLE and self._late_offer is None:
            # An unavailable data plane is told again what is wanted when it is back; MediaLost comes if it is not.
            self._accept_caller(now)
        else:
            self._release(self._failure(Reason.MEDIA_LOST, event.detail), now)

    # ---- the end ---------------------------------------------------------------------------------------------------

    def _failure(self, reason: Reason, detail: str) -> Termination:
        return termination.of_failure(reason, detail, answered=self.times.answered is not None)

    def _release(self, end: Termination, now: float, phrase: str | None = None) -> None:
        """Ends both legs in the way their states ask for, and the media; the record follows with its statistics."""
        if self.state in _OVER:
            return
        self.state = CallState.RELEASING
        self.termination = end
        self._pending = None
        headers = [("Reason", f'SIP;cause={end.sip_status};text="{end.reason.value}"')]
        if end.sip_status == 503:
            headers.append(("Retry-After", str(self.limits.retry_after_s)))
        for leg, session in self.legs.items():
            self._perform(leg, session.terminate(end.sip_status, phrase, tuple(headers)), now)
        if self._media_open:
            self._deadline = now + RELEASE_TIMEOUT_S
            self._effects.append(CloseMedia(self.media.session_id))
        else:
            self._ended((), now)

    def _ended(self, streams: tuple[StreamRecord, ...] | None, now: float) -> None:
        if self.state is not CallState.RELEASING or self.termination is None:
            return
        self.state = CallState.ENDED
        self._deadline = None
        self._publish(CallEventKind.ENDED, now, record=self._record(self.termination, streams, now))

    def _record(self, end: Termination, streams: tuple[StreamRecord, ...] | None, now: float) -> CallRecord:
        times = self.times
        until = now if times.answered is None else times.answered
        return CallRecord(
            call_id=self.call_id,
            direction=self.parties.direction,
            caller=self.parties.caller,
            callee=self.parties.callee,
            invited_at=times.utc,
            ringing_at=times.at(times.ringing),
            answered_at=times.at(times.answered),
            ended_at=times.utc + timedelta(seconds=now - times.invited),
            setup_s=until - times.invited,
            duration_s=0.0 if times.answered is None else now - times.answered,
            termination=end,
            legs=tuple(self._leg_record(leg) for leg in LegName),
            streams=streams or (),
            media_complete=streams is not None,
            media_interruptions=self.media.interruptions,
            media_gap_s=self.media.gap_s,
        )

    def _leg_record(self, leg: LegName) -> LegRecord:
        """The leg with its parties as they stood on the wire."""
        parties, session = self.parties, self.legs[leg]
        remote = str(session.flow.remote)
        if leg is LegName.CALLER and parties.caller_record is not None:
            return replace(parties.caller_record, remote=remote)
        invitation = parties.invitations[leg]
        is_caller = leg is LegName.CALLER
        return LegRecord(
            name=leg,
            sip_call_id=session.sip_call_id,
            from_uri=str(invitation.from_.uri),
            to_uri=str(invitation.to.uri),
            remote=remote,
            trunk=parties.caller_trunk if is_caller else parties.callee_trunk,
            user=parties.caller_user if is_caller else parties.callee_user,
            user_agent=session.peer_product,
        )

    # ---- building blocks -------------------------------------------------------------------------------------------

    def _publish(
        self, kind: CallEventKind, now: float, *, leg: LegName | None = None, record: CallRecord | None = None
    ) -> None:
        parties, times = self.parties, self.times
        elapsed = now - times.invited
        at = times.utc + timedelta(seconds=elapsed)
        who = (parties.direction, parties.caller, parties.callee)
        event = CallEvent(kind, self.call_id, at, *who, elapsed, leg, record)
        self._effects.append(Publish(event))

    @staticmethod
    def _parse(body: bytes) -> SessionDescription | None:
        try:
            return SessionDescription.parse(body)
        except RemoteProtocolError:
            return None

    def _take(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects
