"""Call: two legs joined and their media, without stack and data plane."""

import json
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import TypeVar

import pytest

from control.pbx import termination
from control.pbx.call import Call, CallLimits
from control.pbx.call_media import CallMedia, MediaAddress
from control.pbx.effects import CloseMedia, Effect, OpenMedia, Publish, UpdateMedia
from control.pbx.media import (
    LatchPolicy,
    LocalPorts,
    MediaClosed,
    MediaFailed,
    MediaFailure,
    MediaLost,
    MediaMode,
    MediaOpened,
    MediaUpdated,
)
from control.pbx.parties import Invitation, Parties
from control.pbx.records import CallDirection, CallEventKind, CallId, CallRecord, CallState, LegName, LegRecord
from control.sip.address import Address
from control.sip.headers import NameAddr
from control.sip.sdp import Direction, SessionDescription
from control.sip.session import InviteSession, LocalParty, SendAck, SendCancel, SendRequest, SendResponse, StackEvent
from control.sip.snapshot import restore, save
from control.sip.stack import (
    AckReceived,
    CancelReceived,
    FailureCause,
    RequestReceived,
    ResponseReceived,
    TransactionFailed,
    client_id,
)
from control.sip.transaction import Timers, TransactionId
from tests.harness.messages import flow, request_bytes, request_of, response_to, sdp

STARTED_AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
INVITE_ID = TransactionId("z9hG4bK-1", "192.0.2.10:5060", "INVITE")
LIMITS = CallLimits(ring_timeout_s=30, max_duration_s=3600, retry_after_s=10)
CALLEE_SDP = sdp("192.0.2.20", 50000)
PORTS = (
    LocalPorts(LegName.CALLER, 0, 10000, 10001),
    LocalPorts(LegName.CALLEE, 0, 10004, 10005),
)
TO_CALLEE = Invitation(
    "sip:1002@192.0.2.20",
    NameAddr.parse("<sip:1001@198.51.100.1>"),
    NameAddr.parse("<sip:1002@192.0.2.20>"),
    max_forwards=69,
)
TO_CALLER = Invitation(
    "sip:1001@192.0.2.10",
    NameAddr.parse("<sip:1002@198.51.100.1>"),
    NameAddr.parse("<sip:1001@192.0.2.10>"),
    max_forwards=70,
)
CALLER_RECORD = LegRecord(
    LegName.CALLER,
    "call-1@192.0.2.10",
    "sip:1001@example.test",
    "sip:1002@example.test",
    "192.0.2.10:5060",
    user="1001",
)
CONTACT = ("Contact", "<sip:1002@192.0.2.20:5060>")
Kind = TypeVar("Kind")


@pytest.fixture(autouse=True, params=[False, True], ids=["living", "reborn"])
def reborn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs twice: with one call from beginning to end, and with a call that dies after each step and is made
    again out of what was saved of it, in a process with another monotonic clock."""
    monkeypatch.setattr(Rig, "reborn", request.param)


class Rig:
    """A call with the peers' side of it played by hand; `effects` are those of the last step."""

    reborn = False

    def __init__(self, *, offer: bytes = sdp(), symmetric: bool = False, originated: bool = False) -> None:
        tokens = count(1)
        self.new_token = new_token = lambda: f"t{next(tokens)}"

        def called(host: str, other: str) -> InviteSession:
            return InviteSession.of_callee(
                flow=flow(host),
                symmetric=symmetric,
                party=LocalParty(NameAddr.parse(f"<sip:{other}@198.51.100.1>"), "sippbx"),
                timers=Timers(),
                new_token=new_token,
                random=lambda: 0.5,
            )

        event = RequestReceived(INVITE_ID, request_of(request_bytes(body=offer)), flow())
        self.caller = (
            called("192.0.2.10", "1002")
            if originated
            else InviteSession.of_caller(
                event,
                symmetric=symmetric,
                party=LocalParty(NameAddr.parse("<sip:1002@198.51.100.1>"), "sippbx"),
                timers=Timers(),
                new_token=new_token,
                random=lambda: 0.5,
            )
        )
        callee = called("192.0.2.20", "1001")
        here = MediaAddress("0.0.0.0", "198.51.100.1")
        self.call = Call.between(
            CallId("call-1"),
            Parties(
                CallDirection.INTERNAL,
                "1001",
                "1002",
                {LegName.CALLEE: TO_CALLEE, **({LegName.CALLER: TO_CALLER} if originated else {})},
                None if originated else CALLER_RECORD,
            ),
            caller=self.caller,
            callee=callee,
            media=CallMedia.between(
                "call-1",
                MediaMode.BYPASS,
                LatchPolicy.NAT_AWARE,
                addresses={LegName.CALLER: here, LegName.CALLEE: here},
                signalling={LegName.CALLER: "192.0.2.10", LegName.CALLEE: "192.0.2.20"},
                session_ids={LegName.CALLER: "71", LegName.CALLEE: "72"},
            ),
            limits=LIMITS,
            offer=b"" if originated else offer,
            utc=STARTED_AT,
            now=100.0,
        )
        self.records: list[CallRecord] = []
        self.events: list[CallEventKind] = []
        self.invites: list[SendRequest] = []
        self.effects: list[Effect] = []
        self.now = 100.0
        self.did(self.call.start(self.now))

    def die(self) -> None:
        saved = json.dumps(save(self.call))
        later = 5000.0
        callables = {"new_token": self.new_token, "random": lambda: 0.5}
        self.call = restore(Call, json.loads(saved), offset_s=later, callables=callables)
        self.now += later
        self.caller = self.call.legs[LegName.CALLER]

    def did(self, effects: list[Effect]) -> list[Effect]:
        if self.reborn:
            self.die()
        self.effects = effects
        for effect in effects:
            if isinstance(effect, Publish):
                self.events.append(effect.event.kind)
                if effect.event.record is not None:
                    self.records.append(effect.event.record)
            elif isinstance(effect, SendRequest) and effect.request.method == "INVITE":
                self.invites.append(effect)
        return effects

    @property
    def invite(self) -> SendRequest | None:
        """The first INVITE."""
        return self.invites[0] if self.invites else None

    def answers(self, leg: LegName, status: int, body: bytes = b"") -> "Rig":
        """A leg answers the INVITE that was sent last."""
        sent = self.invites[-1]
        host = {LegName.CALLER: "192.0.2.10", LegName.CALLEE: "192.0.2.20"}[leg]
        contact = ("Contact", f"<sip:x@{host}:5060>")
        response = response_to(sent.request, status, headers=(contact,), body=body)
        event = ResponseReceived(client_id(sent.branch, "INVITE"), response, flow(host))
        self.did(self.call.receive(leg, event, self.now))
        return self

    def each(self, kind: type[Kind]) -> list[Kind]:
        return [effect for effect in self.effects if isinstance(effect, kind)]

    def one(self, kind: type[Kind]) -> Kind:
        found = self.each(kind)
        assert len(found) == 1, self.effects
        return found[0]

    def opened(self) -> "Rig":
        self.did(self.call.receive_media(MediaOpened("call-1", PORTS), self.now))
        return self

    def updated(self) -> "Rig":
        event = MediaUpdated("call-1", self.call.media.generation, PORTS)
        self.did(self.call.receive_media(event, self.now))
        return self

    def closed(self) -> "Rig":
        self.did(self.call.receive_media(MediaClosed("call-1", ()), self.now))
        return self

    def callee_answers(self, status: int, body: bytes = b"", *, to: SendRequest | None = None) -> "Rig":
        sent = to or self.invite
        assert sent is not None
        response = response_to(sent.request, status, headers=(CONTACT,), body=body)
        event = ResponseReceived(client_id(sent.branch, sent.request.method), response, flow("192.0.2.20"))
        self.did(self.call.receive(LegName.CALLEE, event, self.now))
        return self

    def caller_sends(self, method: str, cseq: int, body: bytes = b"") -> "Rig":
        dialog = self.caller.dialog
        assert dialog is not None
        branch = f"z9hG4bK-{method}{cseq}"
        data = request_bytes(
            method,
            branch=branch,
            cseq=cseq,
            from_=str(dialog.remote),
            to=str(dialog.local),
            body=body,
        )
        request = request_of(data)
        event: StackEvent
        if method == "ACK":
            event = AckReceived(request, flow())
        else:
            event = RequestReceived(TransactionId(branch, "x", method), request, flow())
        self.did(self.call.receive(LegName.CALLER, event, self.now))
        return self

    def answered(self) -> "Rig":
        self.opened().callee_answers(200, CALLEE_SDP).updated()
        self.caller_sends("ACK", 1)
        assert self.call.state is CallState.ESTABLISHED
        return self

    def statuses(self) -> list[tuple[int, str]]:
        """What the caller was answered in the last step."""
        return [(sent.response.status, sent.response.cseq.method) for sent in self.each(SendResponse)]

    def methods(self) -> list[str]:
        """What was sent in the last step."""
        return [sent.request.method for sent in self.each(SendRequest)]

    def ending(self) -> tuple[str, str, int]:
        (record,) = self.records
        end = record.termination
        return end.result.value, end.reason.value, end.sip_status


def test_nobody_is_rung_before_the_ports_are_there() -> None:
    rig = Rig()
    assert [type(effect) for effect in rig.effects] == [Publish, OpenMedia]
    rig.opened()
    assert rig.methods() == ["INVITE"]


def test_offer_and_answer_name_our_ports_on_each_side() -> None:
    rig = Rig().opened()
    assert rig.invite is not None
    offered = SessionDescription.parse(rig.invite.request.body)
    assert offered.rtp_address_of(0) == Address("198.51.100.1", 10004)
    assert b"192.0.2.10" not in rig.invite.request.body
    rig.callee_answers(200, CALLEE_SDP).updated()
    told = rig.one(SendResponse).response.body
    assert SessionDescription.parse(told).rtp_address_of(0) == Address("198.51.100.1", 10000)
    assert b"192.0.2.20" not in told


def test_caller_hears_of_the_answer_once_the_data_plane_knows_the_callee() -> None:
    rig = Rig().opened().callee_answers(200, CALLEE_SDP)
    assert rig.each(SendResponse) == []
    assert rig.one(SendAck).request.method == "ACK"
    endpoint = next(e for e in rig.one(UpdateMedia).spec.endpoints if e.leg is LegName.CALLEE)
    assert endpoint.remote_rtp == Address("192.0.2.20", 50000)
    rig.updated()
    assert rig.statuses() == [(200, "INVITE")]


def test_update_that_came_of_early_media_is_not_taken_for_that_of_the_answer() -> None:
    rig = Rig().opened().callee_answers(183, CALLEE_SDP)
    early = rig.call.media.generation
    rig.callee_answers(200, CALLEE_SDP)
    rig.did(rig.call.receive_media(MediaUpdated("call-1", early, PORTS), rig.now))
    assert rig.each(SendResponse) == []


def test_call_has_its_events_in_order_and_one_record() -> None:
    rig = Rig().opened()
    rig.now += 1.0
    rig.callee_answers(180)
    rig.now += 3.0
    rig.callee_answers(200, CALLEE_SDP).updated()
    rig.caller_sends("ACK", 1)
    rig.now += 6.5
    rig.caller_sends("BYE", 2)
    assert rig.statuses() == [(200, "BYE")]
    assert rig.methods() == ["BYE"]
    assert rig.one(CloseMedia).session_id == "call-1"
    rig.closed()
    assert rig.events == list(CallEventKind)
    assert rig.ending() == ("answered", "hangup", 200)
    (record,) = rig.records
    assert (record.setup_s, record.duration_s) == (4.0, 6.5)
    assert record.answered_at == STARTED_AT + timedelta(seconds=4)
    assert record.termination.ended_by is LegName.CALLER


def test_call_is_done_only_once_its_last_bye_is_answered() -> None:
    rig = Rig().answered().caller_sends("BYE", 2)
    bye = rig.one(SendRequest)
    rig.closed()
    assert (rig.call.state, rig.call.done) == (CallState.ENDED, False)
    rig.callee_answers(200, to=bye)
    assert rig.call.done


@pytest.mark.parametrize(
    ("answer", "told", "ending"),
    [
        (486, 486, ("busy", "callee-busy")),
        (600, 600, ("busy", "callee-busy")),
        (603, 603, ("rejected", "callee-declined")),
        (480, 480, ("no_answer", "callee-unavailable")),
        (404, 404, ("rejected", "callee-rejected")),
        (407, 403, ("rejected", "callee-rejected")),
        (503, 500, ("failed", "callee-rejected")),
        (302, 480, ("rejected", "callee-rejected")),
    ],
)
def test_callee_that_refuses(answer: int, told: int, ending: tuple[str, str]) -> None:
    rig = Rig().opened().callee_answers(answer)
    assert rig.statuses() == [(told, "INVITE")]
    rig.closed()
    assert rig.ending() == (*ending, told)
    assert rig.call.done


def test_callee_that_is_silent_at_last() -> None:
    rig = Rig().opened()
    assert rig.invite is not None
    failure = TransactionFailed(client_id(rig.invite.branch, "INVITE"), FailureCause.TIMEOUT)
    rig.did(rig.call.receive(LegName.CALLEE, failure, 132.0))
    assert rig.statuses() == [(408, "INVITE")]
    assert rig.closed().ending() == ("failed", "callee-unreachable", 408)


def test_ring_timeout_cancels_the_callee() -> None:
    rig = Rig().opened().callee_answers(180)
    assert rig.call.next_deadline() == rig.now + LIMITS.ring_timeout_s
    rig.did(rig.call.handle_timer(rig.now + LIMITS.ring_timeout_s))
    assert rig.statuses() == [(480, "INVITE")]
    rig.one(SendCancel)
    assert rig.closed().ending() == ("no_answer", "ring-timeout", 480)


def test_caller_that_gives_up_cancels_the_callee() -> None:
    rig = Rig().opened().callee_answers(180)
    event = CancelReceived(INVITE_ID, request_of(request_bytes("CANCEL")), flow())
    rig.did(rig.call.receive(LegName.CALLER, event, 101.0))
    assert rig.statuses() == [(487, "INVITE")]
    rig.one(SendCancel)
    assert rig.closed().ending() == ("cancelled", "caller-cancelled", 487)


def test_longest_call_ends() -> None:
    rig = Rig().answered()
    assert rig.call.next_deadline() == rig.now + LIMITS.max_duration_s
    rig.did(rig.call.handle_timer(rig.now + LIMITS.max_duration_s))
    assert rig.methods() == ["BYE", "BYE"]
    assert rig.closed().ending() == ("answered", "max-duration", 200)


@pytest.mark.parametrize(
    ("failure", "reason"),
    [(MediaFailure.PORTS_EXHAUSTED, "ports-exhausted"), (MediaFailure.UNAVAILABLE, "media-unavailable")],
)
def test_call_without_ports_gets_503_and_rings_nobody(failure: MediaFailure, reason: str) -> None:
    rig = Rig()
    rig.did(rig.call.receive_media(MediaFailed("call-1", 1, failure, "why"), 100.1))
    assert rig.statuses() == [(503, "INVITE")]
    assert rig.one(SendResponse).response.headers.get("Retry-After") == "10"
    assert rig.ending() == ("failed", reason, 503)
    assert rig.invite is None
    assert rig.call.done


def test_lost_media_ends_a_running_call_on_both_sides() -> None:
    rig = Rig().answered()
    rig.did(rig.call.receive_media(MediaLost("call-1", "gone"), 150.0))
    assert rig.methods() == ["BYE", "BYE"]
    assert all("media-lost" in (sent.request.headers.get("Reason") or "") for sent in rig.each(SendRequest))
    assert rig.closed().ending()[1] == "media-lost"


def test_data_plane_that_never_answers_the_close_costs_the_statistics_alone() -> None:
    rig = Rig().answered().caller_sends("BYE", 2)
    deadline = rig.call.next_deadline()
    assert deadline is not None
    rig.did(rig.call.handle_timer(deadline))
    (record,) = rig.records
    assert record.media_complete is False


@pytest.mark.parametrize(
    ("offer", "status", "reason"),
    [
        (b"v=1\r\n", 400, "bad-offer"),
        (b"v=0\r\no=- 1 1 IN IP4 192.0.2.10\r\ns=-\r\nt=0 0\r\n", 488, "no-common-media"),
        (sdp().replace(b"audio 40000 RTP/AVP 0 101", b"image 40000 udptl t38"), 488, "no-common-media"),
    ],
)
def test_offer_that_cannot_be_relayed_is_refused(offer: bytes, status: int, reason: str) -> None:
    rig = Rig(offer=offer)
    assert rig.statuses() == [(status, "INVITE")]
    assert rig.ending() == ("rejected", reason, status)


def test_answer_that_cannot_be_read_ends_the_call() -> None:
    rig = Rig().opened().callee_answers(200, b"rubbish")
    assert rig.statuses() == [(502, "INVITE")]
    assert rig.methods() == ["BYE"]
    assert rig.closed().ending() == ("failed", "bad-answer", 502)


def test_hold_reaches_the_callee_and_its_answer_the_data_plane() -> None:
    rig = Rig().answered()
    rig.caller_sends("INVITE", 2, sdp(direction="sendonly", version=2))
    forwarded = rig.one(SendRequest)
    assert b"a=sendonly" in forwarded.request.body
    assert SessionDescription.parse(forwarded.request.body).rtp_address_of(0) == Address("198.51.100.1", 10004)
    held = sdp("192.0.2.20", 50000, direction="recvonly", version=2)
    rig.callee_answers(200, held, to=forwarded)
    assert rig.statuses() == [(200, "INVITE")]
    assert b"a=recvonly" in rig.one(SendResponse).response.body
    directions = {endpoint.leg: endpoint.direction for endpoint in rig.one(UpdateMedia).spec.endpoints}
    assert directions == {LegName.CALLER: Direction.SENDONLY, LegName.CALLEE: Direction.RECVONLY}


def test_hold_that_the_callee_refuses_changes_nothing() -> None:
    rig = Rig().answered()
    rig.caller_sends("INVITE", 2, sdp(direction="sendonly", version=2))
    rig.callee_answers(488, to=rig.one(SendRequest))
    assert rig.statuses() == [(488, "INVITE")]
    assert rig.each(UpdateMedia) == []
    assert rig.call.state is CallState.ESTABLISHED


@pytest.mark.rfc("3264", "8")
def test_version_in_our_descriptions_grows_with_their_content_alone() -> None:
    rig = Rig().answered()
    first = SessionDescription.parse(rig.call.media.describe(LegName.CALLEE, SessionDescription.parse(sdp())))
    again = SessionDescription.parse(rig.call.media.describe(LegName.CALLEE, SessionDescription.parse(sdp())))
    held = SessionDescription.parse(sdp(direction="sendonly"))
    other = SessionDescription.parse(rig.call.media.describe(LegName.CALLEE, held))
    assert first.origin == again.origin
    assert int(other.origin.session_version) == int(first.origin.session_version) + 1


@pytest.mark.rfc("3261", "13.2.1")
def test_caller_without_an_offer_answers_the_callees_in_its_ack() -> None:
    rig = Rig(offer=b"").opened()
    assert rig.invite is not None
    assert rig.invite.request.body == b""
    rig.callee_answers(200, CALLEE_SDP).updated()
    assert SessionDescription.parse(rig.one(SendResponse).response.body).rtp_address_of(0) == Address(
        "198.51.100.1", 10000
    )
    rig.caller_sends("ACK", 1, sdp())
    sent = rig.one(SendAck).request.body
    assert SessionDescription.parse(sent).rtp_address_of(0) == Address("198.51.100.1", 10004)
    assert {e.remote_rtp for e in rig.one(UpdateMedia).spec.endpoints} == {
        Address("192.0.2.10", 40000),
        Address("192.0.2.20", 50000),
    }


def test_video_beyond_the_block_and_other_media_are_refused_line_by_line() -> None:
    extra = b"m=application 9 UDP/BFCP *\r\nm=video 40002 RTP/AVP 96\r\nm=video 40004 RTP/AVP 97\r\n"
    rig = Rig(offer=sdp() + extra)
    ports = tuple(
        LocalPorts(leg, line, 10000 + 4 * side + 2 * line, 10001 + 4 * side + 2 * line)
        for side, leg in enumerate(LegName)
        for line in (0, 1)
    )
    rig.did(rig.call.receive_media(MediaOpened("call-1", ports), rig.now))
    assert rig.invite is not None
    lines = SessionDescription.parse(rig.invite.request.body).media
    assert [line.port for line in lines] == [10004, 0, 10006, 0]


def test_offer_of_a_change_that_cannot_be_read_gets_400_and_the_call_goes_on() -> None:
    rig = Rig().answered().caller_sends("INVITE", 2, b"rubbish")
    assert rig.statuses() == [(400, "INVITE")]
    assert rig.call.state is CallState.ESTABLISHED


def test_answer_of_a_change_that_cannot_be_read_is_a_refusal_to_its_author() -> None:
    rig = Rig().answered().caller_sends("INVITE", 2, sdp(version=2))
    rig.callee_answers(200, b"rubbish", to=rig.one(SendRequest))
    assert rig.statuses() == [(502, "INVITE")]


@pytest.mark.rfc("3311", "5.2")
def test_update_while_the_first_offer_is_open_is_put_off() -> None:
    rig = Rig().opened()
    rig.caller_sends("UPDATE", 2, sdp(version=2))
    assert rig.statuses() == [(500, "UPDATE")]


def test_data_plane_that_refuses_a_running_call_ends_it() -> None:
    rig = Rig().answered()
    failed = MediaFailed("call-1", rig.call.media.generation, MediaFailure.REFUSED, "why")
    rig.did(rig.call.receive_media(failed, 120.0))
    assert rig.methods() == ["BYE", "BYE"]
    assert rig.closed().ending()[1] == "media-lost"


def test_data_plane_that_is_away_for_a_moment_does_not_end_a_running_call() -> None:
    rig = Rig().answered()
    failed = MediaFailed("call-1", rig.call.media.generation, MediaFailure.UNAVAILABLE, "why")
    assert rig.did(rig.call.receive_media(failed, 120.0)) == []
    assert rig.call.state is CallState.ESTABLISHED


def test_callee_that_no_longer_knows_the_dialog_ends_the_call() -> None:
    rig = Rig().answered().caller_sends("INVITE", 2, sdp(version=2))
    rig.callee_answers(481, to=rig.one(SendRequest))
    assert rig.methods() == ["BYE"]
    assert rig.closed().ending() == ("answered", "dialog-lost", 200)


def test_ack_that_answers_the_callees_offer_with_rubbish_ends_the_call() -> None:
    rig = Rig(offer=b"").opened().callee_answers(200, CALLEE_SDP).updated()
    rig.caller_sends("ACK", 1, b"rubbish")
    assert rig.methods() == ["BYE", "BYE"]
    assert rig.closed().ending()[1] == "bad-answer"


# Calls that a program asked for: the caller is called, too.


def caller_picked_up() -> Rig:
    rig = Rig(originated=True).opened().answers(LegName.CALLER, 200, sdp("192.0.2.10", 40000)).updated()
    assert rig.call.state is CallState.INVITING
    return rig


def test_originated_call_rings_the_caller_first_and_asks_it_for_an_offer() -> None:
    rig = Rig(originated=True)
    assert [type(effect) for effect in rig.effects] == [Publish, OpenMedia]
    rig.opened()
    (invite,) = rig.invites
    assert (invite.request.uri, invite.request.body) == ("sip:1001@192.0.2.10", b"")
    assert "1002@198.51.100.1" in str(invite.request.from_)
    assert rig.call.state is CallState.CALLING


def test_caller_that_picks_up_is_held_and_the_callee_gets_its_offer() -> None:
    rig = caller_picked_up()
    held = SessionDescription.parse(rig.one(SendAck).request.body)
    assert held.direction_of(0) is Direction.INACTIVE
    assert held.rtp_address_of(0) == Address("198.51.100.1", 10000)
    assert b"192.0.2.10" not in rig.one(SendAck).request.body
    invite = rig.one(SendRequest).request
    assert invite.uri == "sip:1002@192.0.2.20"
    offered = SessionDescription.parse(invite.body)
    assert offered.rtp_address_of(0) == Address("198.51.100.1", 10004)
    assert offered.direction_of(0) is Direction.SENDRECV


def test_caller_is_told_the_callees_answer_in_a_reinvite_and_then_both_talk() -> None:
    rig = caller_picked_up().answers(LegName.CALLEE, 180)
    rig.answers(LegName.CALLEE, 200, CALLEE_SDP).updated()
    assert rig.call.view().state is CallState.ANSWERING
    reinvite = rig.one(SendRequest).request
    told = SessionDescription.parse(reinvite.body)
    assert told.direction_of(0) is Direction.SENDRECV
    assert told.rtp_address_of(0) == Address("198.51.100.1", 10000)
    rig.answers(LegName.CALLER, 200, sdp("192.0.2.10", 40000, version=2))
    assert rig.call.view().state is CallState.ESTABLISHED
    remotes = {endpoint.leg: endpoint.remote_rtp for endpoint in rig.one(UpdateMedia).spec.endpoints}
    assert remotes == {LegName.CALLER: Address("192.0.2.10", 40000), LegName.CALLEE: Address("192.0.2.20", 50000)}
    rig.call.hang_up(termination.of_hangup("for a test", answered=True), rig.now)
    rig.closed()
    assert rig.events == ["call.started", "call.forwarded", "call.ringing", "call.answered", "call.ended"]
    assert rig.ending() == ("answered", "api-hangup", 200)


def test_caller_that_rings_says_so_once() -> None:
    rig = Rig(originated=True).opened().answers(LegName.CALLER, 180)
    assert rig.one(Publish).event.leg is LegName.CALLER
    rig.answers(LegName.CALLER, 180)
    assert rig.each(Publish) == []


@pytest.mark.parametrize(
    ("status", "ending"),
    [
        (486, ("busy", "caller-busy", 486)),
        (603, ("rejected", "caller-declined", 603)),
        (480, ("no_answer", "caller-unavailable", 480)),
        (404, ("rejected", "caller-rejected", 404)),
    ],
)
def test_caller_that_refuses_ends_the_call_before_the_callee_hears_of_it(
    status: int, ending: tuple[str, str, int]
) -> None:
    rig = Rig(originated=True).opened().answers(LegName.CALLER, status)
    assert rig.methods() == []
    rig.closed()
    assert rig.ending() == ending
    assert rig.call.done


def test_caller_that_does_not_pick_up_in_time_is_cancelled() -> None:
    rig = Rig(originated=True).opened().answers(LegName.CALLER, 180)
    rig.now += LIMITS.ring_timeout_s
    rig.did(rig.call.handle_timer(rig.now))
    assert len(rig.each(SendCancel)) == 1
    rig.closed()
    assert rig.ending() == ("no_answer", "caller-unavailable", 480)


def test_callee_that_is_busy_ends_the_waiting_caller_with_bye() -> None:
    rig = caller_picked_up().answers(LegName.CALLEE, 486)
    assert rig.methods() == ["BYE"]
    assert rig.each(SendRequest)[0].request.headers.get("Reason") == 'SIP;cause=486;text="callee-busy"'
    rig.closed()
    assert rig.ending() == ("busy", "callee-busy", 486)


def test_caller_that_hangs_up_while_the_callee_rings_cancels_it() -> None:
    rig = caller_picked_up().answers(LegName.CALLEE, 180)
    rig.caller_sends("BYE", 1)
    assert rig.statuses() == [(200, "BYE")]
    assert len(rig.each(SendCancel)) == 1


def test_caller_without_a_line_that_can_be_relayed_is_told_and_nobody_else_is_rung() -> None:
    offer = sdp("192.0.2.10", 40000).replace(b"RTP/AVP", b"TCP/MSRP")
    rig = Rig(originated=True).opened().answers(LegName.CALLER, 200, offer)
    assert rig.methods() == ["BYE"]
    rig.closed()
    assert rig.ending() == ("failed", "no-common-media", 488)


def test_caller_that_refuses_the_callees_answer_ends_the_call() -> None:
    rig = caller_picked_up().answers(LegName.CALLEE, 200, CALLEE_SDP).updated()
    rig.answers(LegName.CALLER, 488)
    assert rig.methods() == ["BYE", "BYE"]
    rig.closed()
    assert rig.ending() == ("answered", "bad-answer", 200)


def test_data_plane_that_cannot_give_the_callers_lines_ports_ends_an_originated_call() -> None:
    rig = Rig(originated=True).opened().answers(LegName.CALLER, 200, sdp("192.0.2.10", 40000))
    rig.did(rig.call.receive_media(MediaFailed("call-1", 2, MediaFailure.UNAVAILABLE, "gone"), rig.now))
    rig.closed()
    assert rig.ending() == ("failed", "media-unavailable", 503)


@pytest.mark.parametrize("step", ["reserving", "calling", "inviting"])
def test_originated_call_can_be_hung_up_at_any_moment(step: str) -> None:
    rig = Rig(originated=True)
    if step == "calling":
        rig.opened()
    elif step == "inviting":
        rig = caller_picked_up()
    rig.did(rig.call.hang_up(termination.of_hangup("for a test", answered=False), rig.now))
    sent = {"reserving": (0, []), "calling": (1, []), "inviting": (1, ["BYE"])}[step]
    assert (len(rig.each(SendCancel)), rig.methods()) == sent
    rig.closed()
    assert rig.ending() == ("cancelled", "api-hangup", 480)
