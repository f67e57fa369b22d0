"""InviteSession: one leg in both roles, without a stack."""

from inspect import signature
from itertools import count
from typing import Any, TypeVar, cast

import pytest

from control.sip.errors import RemoteProtocolError
from control.sip.headers import NameAddr
from control.sip.message import Request
from control.sip.session import (
    MAX_BRANCHES,
    Accepted,
    Answered,
    Cancelled,
    EndCause,
    Ended,
    Established,
    InviteSession,
    LocalParty,
    Offered,
    OfferRejected,
    Output,
    Progressed,
    Rejected,
    SendAck,
    SendCancel,
    SendRequest,
    SendResponse,
    SessionState,
)
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

PARTY = LocalParty(NameAddr.parse("<sip:pbx@198.51.100.1>"), "sippbx")
INVITE_ID = TransactionId("z9hG4bK-1", "192.0.2.10:5060", "INVITE")
CONTACT = ("Contact", "<sip:1002@192.0.2.20:5060>")
T1 = 0.5
Kind = TypeVar("Kind")


# A power of two, so that moments come back as they were.
REBIRTH_S = -64.0


@pytest.fixture(autouse=True, params=[False, True], ids=["living", "reborn"])
def reborn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs twice: with one session from beginning to end, and with one that dies after each step and is made
    again out of what was saved of it, in a process with another monotonic clock."""
    monkeypatch.setattr(Reborn, "enabled", request.param)


class Reborn:
    """A session in a process that never lives longer than one step; its clock is `_ahead_s` ahead of the test's."""

    enabled = False

    def __init__(self, session: InviteSession) -> None:
        self._session = session
        self._ahead_s = 0.0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._session, name)
        if not callable(found):
            return found

        def step(*arguments: Any) -> Any:
            if list(signature(found).parameters)[-1:] == ["now"]:
                arguments = (*arguments[:-1], arguments[-1] + self._ahead_s)
            outcome = found(*arguments)
            if name == "next_deadline":
                return None if outcome is None else outcome - self._ahead_s
            self._session = restore(
                InviteSession,
                save(self._session),
                offset_s=REBIRTH_S,
                callables={"new_token": self._session.new_token, "random": self._session.random},
            )
            self._ahead_s += REBIRTH_S
            return outcome

        return step


def lived(session: InviteSession) -> InviteSession:
    """The session as this run of the test has it."""
    return cast("InviteSession", Reborn(session)) if Reborn.enabled else session


def only(outputs: list[Output], kind: type[Kind]) -> Kind:
    """The one output of this kind."""
    found = [output for output in outputs if isinstance(output, kind)]
    assert len(found) == 1, outputs
    return found[0]


def status_of(outputs: list[Output]) -> int:
    return only(outputs, SendResponse).response.status


def caller_session(*, headers: tuple[tuple[str, str], ...] = (), body: bytes = sdp()) -> InviteSession:
    """A session that an INVITE has just opened."""
    tokens = count(1)
    event = RequestReceived(INVITE_ID, request_of(request_bytes(headers=headers, body=body)), flow())
    return lived(
        InviteSession.of_caller(
            event,
            symmetric=False,
            party=PARTY,
            timers=Timers(),
            new_token=lambda: f"t{next(tokens)}",
            random=lambda: 0.5,
        )
    )


def callee_session(*, offer: bytes = sdp(port=11000)) -> tuple[InviteSession, SendRequest]:
    """A session that has just sent its INVITE, and that INVITE."""
    tokens = count(1)
    session = InviteSession.of_callee(
        flow=flow("192.0.2.20"),
        symmetric=False,
        party=PARTY,
        timers=Timers(),
        new_token=lambda: f"t{next(tokens)}",
        random=lambda: 0.5,
    )
    outputs = session.invite(
        "sip:1002@192.0.2.20",
        caller=NameAddr.parse("<sip:1001@198.51.100.1>"),
        callee=NameAddr.parse("<sip:1002@192.0.2.20>"),
        sdp=offer,
        max_forwards=69,
    )
    return lived(session), only(outputs, SendRequest)


def answer(
    sent: SendRequest,
    status: int,
    *,
    to_tag: str = "to-1",
    headers: tuple[tuple[str, str], ...] = (CONTACT,),
    body: bytes = b"",
) -> ResponseReceived:
    response = response_to(sent.request, status, to_tag=to_tag, headers=headers, body=body)
    return ResponseReceived(client_id(sent.branch, sent.request.method), response, sent.flow)


def in_dialog(
    session: InviteSession, method: str, cseq: int, *, body: bytes = b"", headers: tuple[tuple[str, str], ...] = ()
) -> RequestReceived:
    """A request of the peer inside the session's dialog."""
    dialog = session.dialog
    assert dialog is not None
    data = request_bytes(
        method,
        branch=f"z9hG4bK-{method}{cseq}",
        call_id=session.sip_call_id,
        cseq=cseq,
        from_=str(dialog.remote),
        to=str(dialog.local),
        headers=headers,
        body=body,
    )
    return RequestReceived(TransactionId(f"z9hG4bK-{method}{cseq}", "x", method), request_of(data), flow())


def ack(session: InviteSession, cseq: int, body: bytes = b"") -> AckReceived:
    return AckReceived(in_dialog(session, "ACK", cseq, body=body).request, flow())


def established_caller() -> InviteSession:
    session = caller_session()
    session.accept(sdp(port=12000), 0.0)
    session.receive(ack(session, 1), 0.1)
    assert session.state is SessionState.CONFIRMED
    return session


def established_callee() -> tuple[InviteSession, SendRequest]:
    session, invite = callee_session()
    session.receive(answer(invite, 200, body=sdp()), 0.0)
    assert session.state is SessionState.CONFIRMED
    return session, invite


class TestCallersLeg:
    @pytest.mark.rfc("3261", "13.3.1.4")
    def test_200_is_sent_again_until_its_ack(self) -> None:
        session = caller_session()
        first = only(session.accept(sdp(), 0.0), SendResponse)
        assert session.next_deadline() == T1
        again = only(session.handle_timer(T1), SendResponse)
        assert again == first
        assert session.next_deadline() == T1 + 2 * T1
        only(session.receive(ack(session, 1), 0.6), Established)
        assert session.next_deadline() is None

    @pytest.mark.rfc("3261", "13.3.1.4")
    def test_session_without_ack_ends_with_bye_after_64_t1(self) -> None:
        session = caller_session()
        session.accept(sdp(), 0.0)
        outputs = session.handle_timer(64 * T1)
        assert only(outputs, SendRequest).request.method == "BYE"
        assert only(outputs, Ended).cause is EndCause.ACK_TIMEOUT

    @pytest.mark.rfc("3261", "15")
    def test_bye_of_ours_waits_for_the_ack(self) -> None:
        session = caller_session()
        session.accept(sdp(), 0.0)
        assert session.terminate(200, None, (("Reason", "x"),)) == []
        outputs = session.receive(ack(session, 1), 0.3)
        bye = only(outputs, SendRequest).request
        assert (bye.method, bye.headers.get("Reason")) == ("BYE", "x")

    @pytest.mark.rfc("3261", "9.2")
    def test_cancel_before_the_answer_gets_487(self) -> None:
        session = caller_session()
        outputs = session.receive(CancelReceived(INVITE_ID, session_request(session), flow()), 0.0)
        assert status_of(outputs) == 487
        only(outputs, Cancelled)
        assert session.state is SessionState.TERMINATED

    def test_cancel_after_the_answer_changes_nothing(self) -> None:
        session = caller_session()
        session.accept(sdp(), 0.0)
        assert session.receive(CancelReceived(INVITE_ID, session_request(session), flow()), 0.1) == []

    @pytest.mark.rfc("3261", "8.2.2.3")
    def test_required_extension_that_we_lack_is_refused_with_420(self) -> None:
        with pytest.raises(RemoteProtocolError) as caught:
            caller_session(headers=(("Require", "precondition"),))
        assert (caught.value.status, caught.value.message) == (420, "precondition")

    @pytest.mark.rfc("3262", "3")
    def test_required_reliable_ringing_is_repeated_until_prack_and_holds_the_200_back(self) -> None:
        session = caller_session(headers=(("Require", "100rel"),))
        ringing = only(session.progress(183, "Session Progress", sdp(), 0.0), SendResponse).response
        assert (ringing.headers.get("Require"), ringing.headers.get("RSeq")) == ("100rel", "1")
        assert session.accept(sdp(), 0.1) == []
        assert only(session.handle_timer(T1), SendResponse).response == ringing
        prack = in_dialog(session, "PRACK", 2, headers=(("RAck", "1 1 INVITE"),))
        outputs = session.receive(prack, 0.7)
        answers = [o.response for o in outputs if isinstance(o, SendResponse)]
        assert [(r.status, r.cseq.method) for r in answers] == [(200, "PRACK"), (200, "INVITE")]
        assert answers[1].body == b"", "the reliable provisional carried the answer already"

    def test_prack_that_fits_nothing_gets_481(self) -> None:
        session = caller_session(headers=(("Require", "100rel"),))
        session.progress(180, "Ringing", b"", 0.0)
        prack = in_dialog(session, "PRACK", 2, headers=(("RAck", "7 1 INVITE"),))
        assert status_of(session.receive(prack, 0.1)) == 481

    @pytest.mark.rfc("3262", "3")
    def test_reliable_ringing_without_prack_ends_with_504(self) -> None:
        session = caller_session(headers=(("Require", "100rel"),))
        session.progress(180, "Ringing", b"", 0.0)
        outputs = session.handle_timer(64 * T1)
        assert status_of(outputs) == 504
        assert only(outputs, Ended).cause is EndCause.PRACK_TIMEOUT

    def test_late_offer_is_answered_in_the_ack(self) -> None:
        session = caller_session(body=b"")
        assert only(session.accept(sdp(port=12000), 0.0), SendResponse).response.body == sdp(port=12000)
        outputs = session.receive(ack(session, 1, sdp(port=5000)), 0.2)
        assert only(outputs, Answered).sdp == sdp(port=5000)


class TestMidDialog:
    def test_offer_of_the_peer_is_passed_up_and_our_answer_goes_back(self) -> None:
        session = established_caller()
        offer = sdp(direction="sendonly", version=2)
        assert only(session.receive(in_dialog(session, "INVITE", 2, body=offer), 1.0), Offered) == Offered(
            offer, "INVITE"
        )
        response = only(session.answer(sdp(direction="recvonly"), 1.1), SendResponse).response
        assert (response.status, response.body) == (200, sdp(direction="recvonly"))

    @pytest.mark.rfc("3264", "8")
    def test_same_description_again_is_answered_here(self) -> None:
        session = established_caller()
        outputs = session.receive(in_dialog(session, "INVITE", 2, body=sdp()), 1.0)
        assert [type(output) for output in outputs] == [SendResponse]
        assert only(outputs, SendResponse).response.body == sdp(port=12000)

    @pytest.mark.rfc("3261", "14.2")
    def test_refused_offer_leaves_the_session_as_it_was(self) -> None:
        session = established_caller()
        session.receive(in_dialog(session, "INVITE", 2, body=sdp(version=2)), 1.0)
        assert status_of(session.refuse(488, None, 1.1)) == 488
        assert session.state is SessionState.CONFIRMED
        outputs = session.receive(in_dialog(session, "INVITE", 3, body=sdp(version=3)), 2.0)
        only(outputs, Offered)

    @pytest.mark.rfc("3261", "14.2")
    def test_second_reinvite_before_the_first_is_answered_gets_500_with_retry_after(self) -> None:
        session = established_caller()
        session.receive(in_dialog(session, "INVITE", 2, body=sdp(version=2)), 1.0)
        response = only(session.receive(in_dialog(session, "INVITE", 3, body=sdp(version=3)), 1.1), SendResponse)
        assert response.response.status == 500
        assert response.response.headers.get("Retry-After") is not None

    @pytest.mark.rfc("3261", "14.1")
    def test_reinvite_crossing_ours_gets_491_and_ours_is_tried_again(self) -> None:
        session, _ = established_callee()
        ours = only(session.offer(sdp(port=11000, version=2), "INVITE", 1.0), SendRequest)
        assert status_of(session.receive(in_dialog(session, "INVITE", 1, body=sdp(version=2)), 1.1)) == 491
        assert session.receive(answer(ours, 491), 1.2) == []
        retry_at = session.next_deadline()
        assert retry_at is not None
        assert 2.1 <= retry_at - 1.2 <= 4.0, "the owner of the Call-ID waits 2.1 to 4 s"
        again = only(session.handle_timer(retry_at), SendRequest)
        assert again.request.body == ours.request.body
        assert again.request.cseq.number > ours.request.cseq.number

    @pytest.mark.rfc("3261", "12.2.2")
    def test_request_with_an_old_cseq_gets_500(self) -> None:
        session = established_caller()
        session.receive(in_dialog(session, "OPTIONS", 9), 1.0)
        assert status_of(session.receive(in_dialog(session, "OPTIONS", 5), 1.1)) == 500

    @pytest.mark.rfc("3311", "5.2")
    def test_update_without_a_description_is_answered_here(self) -> None:
        session = established_caller()
        outputs = session.receive(in_dialog(session, "UPDATE", 2), 1.0)
        assert [type(output) for output in outputs] == [SendResponse]
        assert status_of(outputs) == 200

    def test_offer_of_ours_that_is_refused_is_told(self) -> None:
        session, _ = established_callee()
        ours = only(session.offer(sdp(version=2), "INVITE", 1.0), SendRequest)
        assert only(session.receive(answer(ours, 488), 1.2), OfferRejected).status == 488
        assert session.state is SessionState.CONFIRMED

    @pytest.mark.rfc("3261", "12.2.1.2")
    @pytest.mark.parametrize(("status", "says_bye"), [(481, False), (408, True)])
    def test_peer_that_lost_the_dialog_ends_it(self, status: int, says_bye: bool) -> None:
        session, _ = established_callee()
        ours = only(session.offer(sdp(version=2), "INVITE", 1.0), SendRequest)
        outputs = session.receive(answer(ours, status), 1.2)
        assert only(outputs, Ended).cause is EndCause.DIALOG_LOST
        assert any(isinstance(output, SendRequest) for output in outputs) is says_bye

    @pytest.mark.rfc("3261", "15.1.2")
    def test_bye_is_answered_and_so_is_what_it_overtakes(self) -> None:
        session = established_caller()
        session.receive(in_dialog(session, "INVITE", 2, body=sdp(version=2)), 1.0)
        outputs = session.receive(in_dialog(session, "BYE", 3), 1.1)
        answers = [(o.response.status, o.response.cseq.method) for o in outputs if isinstance(o, SendResponse)]
        assert answers == [(200, "BYE"), (487, "INVITE")]
        assert only(outputs, Ended).cause is EndCause.BYE

    def test_unknown_method_gets_405_with_what_is_allowed(self) -> None:
        session = established_caller()
        response = only(session.receive(in_dialog(session, "INFO", 2), 1.0), SendResponse).response
        assert response.status == 405
        assert "UPDATE" in (response.headers.get("Allow") or "")

    def test_acks_of_many_reinvites_are_not_all_kept(self) -> None:
        session, _ = established_callee()
        for number in range(2, 50):
            ours = only(session.offer(sdp(version=number), "INVITE", float(number)), SendRequest)
            first = only(session.receive(answer(ours, 200, body=sdp(version=number)), float(number)), SendAck)
            assert only(session.receive(answer(ours, 200, body=sdp()), float(number)), SendAck) == first
        assert len(session._acks) == 1


class TestCalleesLeg:
    def test_product_of_the_callee_is_known_from_its_answers(self) -> None:
        session, invite = callee_session()
        session.receive(answer(invite, 180, headers=(CONTACT, ("Server", "Phone/1"))), 0.1)
        assert session.peer_product == "Phone/1"

    def test_early_media_is_passed_up(self) -> None:
        session, invite = callee_session()
        assert only(session.receive(answer(invite, 183, body=sdp()), 0.1), Progressed).sdp == sdp()

    @pytest.mark.rfc("3262", "4")
    def test_reliable_provisional_is_acknowledged_once_and_in_order(self) -> None:
        session, invite = callee_session()
        reliable = (CONTACT, ("Require", "100rel"), ("RSeq", "5"))
        prack = only(session.receive(answer(invite, 180, headers=reliable), 0.1), SendRequest).request
        assert (prack.method, prack.headers.get("RAck")) == ("PRACK", "5 1 INVITE")
        assert session.receive(answer(invite, 180, headers=reliable), 0.2) == []
        assert session.receive(answer(invite, 180, headers=(CONTACT, ("Require", "100rel"), ("RSeq", "7"))), 0.3) == []

    @pytest.mark.rfc("3261", "13.2.2.4")
    def test_200_is_acknowledged_and_acknowledged_again_when_it_comes_again(self) -> None:
        session, invite = callee_session()
        ok = answer(invite, 200, body=sdp())
        outputs = session.receive(ok, 0.1)
        first = only(outputs, SendAck)
        assert first.request.cseq.number == 1
        assert str(first.request.uri) == "sip:1002@192.0.2.20:5060"
        assert only(outputs, Accepted).sdp == sdp()
        assert session.receive(ok, 0.6) == [first]

    @pytest.mark.rfc("3261", "13.2.2.4")
    def test_second_branch_that_answers_is_acknowledged_and_hung_up(self) -> None:
        session, invite = callee_session()
        session.receive(answer(invite, 200, to_tag="one", body=sdp()), 0.1)
        outputs = session.receive(answer(invite, 200, to_tag="two", body=sdp()), 0.2)
        assert only(outputs, SendAck).request.to.tag == "two"
        assert only(outputs, SendRequest).request.method == "BYE"
        assert session.state is SessionState.CONFIRMED

    def test_peer_that_invents_branches_gets_no_memory_for_them(self) -> None:
        session, invite = callee_session()
        for number in range(10 * MAX_BRANCHES):
            session.receive(answer(invite, 180, to_tag=f"early-{number}"), 0.1)
        assert len(session._early) == MAX_BRANCHES
        for number in range(10 * MAX_BRANCHES):
            session.receive(answer(invite, 200, to_tag=f"late-{number}", body=sdp()), 0.2)
        assert len(session._acks) == MAX_BRANCHES

    @pytest.mark.rfc("3261", "9.1")
    def test_answer_that_crosses_the_cancel_is_acknowledged_and_hung_up(self) -> None:
        session, invite = callee_session()
        session.receive(answer(invite, 180), 0.1)
        only(session.terminate(487, None), SendCancel)
        outputs = session.receive(answer(invite, 200, body=sdp()), 0.2)
        bye = only(outputs, SendRequest)
        only(outputs, SendAck)
        assert bye.request.method == "BYE"
        session.receive(answer(bye, 200), 0.3)
        assert session.state is SessionState.TERMINATED

    def test_nobody_who_has_not_been_invited_is_cancelled(self) -> None:
        tokens = count(1)
        session = InviteSession.of_callee(
            flow=flow(),
            symmetric=False,
            party=PARTY,
            timers=Timers(),
            new_token=lambda: f"t{next(tokens)}",
            random=lambda: 0.5,
        )
        assert session.terminate(503, None) == []
        assert session.state is SessionState.TERMINATED

    def test_silence_of_the_callee_is_a_rejection_with_408(self) -> None:
        session, invite = callee_session()
        failure = TransactionFailed(client_id(invite.branch, "INVITE"), FailureCause.TIMEOUT)
        assert only(session.receive(failure, 32.0), Rejected) == Rejected(408, "Request Timeout", timed_out=True)

    def test_callee_offer_is_answered_in_the_ack_that_waited(self) -> None:
        session, invite = callee_session(offer=b"")
        outputs = session.receive(answer(invite, 200, body=sdp()), 0.1)
        assert [type(output) for output in outputs] == [Accepted]
        assert session.receive(answer(invite, 200, body=sdp()), 0.6) == []
        sent = only(session.answer(sdp(port=11000), 0.7), SendAck).request
        assert (sent.method, sent.body) == ("ACK", sdp(port=11000))

    def test_answer_without_contact_is_a_rejection(self) -> None:
        session, invite = callee_session()
        assert only(session.receive(answer(invite, 200, headers=(), body=sdp()), 0.1), Rejected).status == 502

    def test_peer_behind_nat_is_reached_where_its_messages_come_from(self) -> None:
        tokens = count(1)
        event = RequestReceived(INVITE_ID, request_of(request_bytes(body=sdp())), flow("203.0.113.9", 31000))
        session = InviteSession.of_caller(
            event,
            symmetric=True,
            party=PARTY,
            timers=Timers(),
            new_token=lambda: f"t{next(tokens)}",
            random=lambda: 0.5,
        )
        session.accept(sdp(), 0.0)
        session.receive(AckReceived(ack(session, 1).request, flow("203.0.113.9", 31000)), 0.1)
        assert only(session.terminate(200, None), SendRequest).flow == flow("203.0.113.9", 31000)


def session_request(session: InviteSession) -> Request:
    request = session._initial
    assert request is not None
    return request
