"""The transaction layer: matching, what it answers itself, ACK and CANCEL, and that nothing stays behind."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.sip.address import Address, Flow
from control.sip.errors import LocalProtocolError
from control.sip.message import Request, Response, build_response
from control.sip.stack import (
    AckReceived,
    CancelReceived,
    Discarded,
    DiscardReason,
    FailureCause,
    MessageLabel,
    Output,
    RequestReceived,
    ResponseReceived,
    SipStack,
    TransactionFailed,
    Transmit,
    client_id,
)
from control.sip.transaction import Timers, TransactionId
from tests.harness.messages import (
    OURS,
    PEER,
    flow,
    outgoing_request,
    request_bytes,
    request_of,
    response_of,
    response_to,
    sdp,
)
from tests.harness.wire import Fate, Wire, fates, perfect, scripted, seeded

NOW = 1000.0
TIMERS = Timers()
NO_TRANSACTIONS = {"ict": 0, "nict": 0, "ist": 0, "nist": 0}


def make_stack(
    address: Address = OURS,
    *,
    advertised: Callable[[Flow], Address] | None = None,
    timers: Timers = TIMERS,
    server_name: str = "pbx",
    by_stream: Callable[[Flow], Flow | None] = lambda _: None,
    max_server_transactions: int = 1000,
) -> SipStack:
    tokens = (f"token-{number}" for number in itertools.count(1))
    return SipStack(
        advertised=advertised or (lambda _: address),
        new_token=lambda: next(tokens),
        timers=timers,
        server_name=server_name,
        by_stream=by_stream,
        max_server_transactions=max_server_transactions,
    )


def run_out(stack: SipStack) -> list[Output]:
    """Let all timers of a stack fire."""
    outputs: list[Output] = []
    while (deadline := stack.next_deadline()) is not None:
        outputs += stack.handle_timer(deadline)
    return outputs


def assert_empty(stack: SipStack) -> None:
    assert stack.counts() == NO_TRANSACTIONS
    assert stack.next_deadline() is None
    assert not stack._deadlines
    assert not stack._merge_keys


def received(outputs: Sequence[Output]) -> RequestReceived:
    (event,) = (output for output in outputs if isinstance(output, RequestReceived))
    return event


def sent(outputs: Sequence[Output]) -> Transmit:
    (transmit,) = outputs
    assert isinstance(transmit, Transmit)
    return transmit


def answer(outputs: Sequence[Output]) -> Response:
    return response_of(sent(outputs).data)


def new_invite(stack: SipStack, **changes: str) -> RequestReceived:
    return received(stack.receive(request_bytes("INVITE", **changes), flow(), NOW))  # type: ignore[arg-type]


def started(
    stack: SipStack, method: str = "INVITE", **more: Sequence[tuple[str, str]]
) -> tuple[Request, TransactionId]:
    outputs = stack.send_request(outgoing_request(method, **more), flow(), "b1", NOW)  # type: ignore[arg-type]
    return request_of(sent(outputs).data), client_id("b1", method)


def reply(stack: SipStack, request: Request, status: int, *, to_tag: str = "to-1", now: float = NOW) -> list[Output]:
    return stack.receive(response_to(request, status, to_tag=to_tag).encode(), flow(), now)


# ------------------------------------------------------------------------------------------------- requests from peers


@pytest.mark.rfc("3261", "17.2.1")
def test_a_new_invite_gets_100_trying_at_once_and_is_passed_up() -> None:
    stack = make_stack()
    trying, event = stack.receive(request_bytes("INVITE", body=sdp()), flow(), NOW)
    assert isinstance(trying, Transmit)
    assert trying.data.startswith(b"SIP/2.0 100 Trying\r\n")
    assert trying.flow == flow()
    assert trying.label == MessageLabel("INVITE", 100, False)
    assert response_of(trying.data).to.tag is None
    assert isinstance(event, RequestReceived)
    assert event.transaction == TransactionId("z9hG4bK-1", "192.0.2.10:5060", "INVITE")
    assert event.request.body == sdp()
    assert stack.counts() == {**NO_TRANSACTIONS, "ist": 1}


def test_another_request_is_passed_up_without_100() -> None:
    stack = make_stack()
    (event,) = stack.receive(request_bytes("OPTIONS"), flow(), NOW)
    assert isinstance(event, RequestReceived)
    assert stack.counts() == {**NO_TRANSACTIONS, "nist": 1}


@pytest.mark.rfc("3261", "17.2.1")
@pytest.mark.parametrize("status", [100, 180, 486])
def test_retransmitted_invite_gets_the_last_response_again(status: int) -> None:
    stack = make_stack()
    event = new_invite(stack)
    first = stack.respond(event.transaction, response_to(event.request, status), NOW)
    again = stack.receive(request_bytes("INVITE"), flow(), NOW + 0.5)
    assert sent(again).data == sent(first).data
    assert sent(again).label == MessageLabel("INVITE", status, True)
    assert not sent(first).label.retransmission


@pytest.mark.rfc("3261", "17.2.2")
def test_retransmitted_request_is_absorbed_until_there_is_a_response_to_repeat() -> None:
    stack = make_stack()
    event = received(stack.receive(request_bytes("BYE"), flow(), NOW))
    assert stack.receive(request_bytes("BYE"), flow(), NOW + 0.5) == []
    first = stack.respond(event.transaction, response_to(event.request, 200), NOW + 0.6)
    again = stack.receive(request_bytes("BYE"), flow(), NOW + 1.5)
    assert sent(again).data == sent(first).data


@pytest.mark.rfc("3261", "18.2.2")
def test_responses_return_along_the_flow_of_the_request_whatever_via_says() -> None:
    stack = make_stack()
    source = flow("203.0.113.77", 33445)
    via = "SIP/2.0/UDP victim.example:5060;branch=z9hG4bK-1;maddr=198.18.0.1"
    event = received(stack.receive(request_bytes("OPTIONS", via=via), source, NOW))
    assert sent(stack.respond(event.transaction, response_to(event.request, 200), NOW)).flow == source


@pytest.mark.rfc("3581", "4")
@pytest.mark.rfc("3261", "18.2.1")
@pytest.mark.parametrize(
    ("via", "noted"),
    [
        ("SIP/2.0/UDP 192.0.2.10:5060;branch=z9hG4bK-1", "SIP/2.0/UDP 192.0.2.10:5060;branch=z9hG4bK-1"),
        (
            "SIP/2.0/UDP 10.0.0.1:5060;branch=z9hG4bK-1",
            "SIP/2.0/UDP 10.0.0.1:5060;branch=z9hG4bK-1;received=192.0.2.10",
        ),
        (
            "SIP/2.0/UDP 10.0.0.1;rport;branch=z9hG4bK-1",
            "SIP/2.0/UDP 10.0.0.1;rport=5060;branch=z9hG4bK-1;received=192.0.2.10",
        ),
        (
            "SIP/2.0/UDP 192.0.2.10;branch=z9hG4bK-1;rport",
            "SIP/2.0/UDP 192.0.2.10;branch=z9hG4bK-1;rport=5060;received=192.0.2.10",
        ),
        (
            "SIP/2.0/UDP a.example;branch=z9hG4bK-1;received=198.18.0.1, SIP/2.0/UDP b.example;branch=z9hG4bK-2",
            "SIP/2.0/UDP a.example;branch=z9hG4bK-1;received=192.0.2.10",
        ),
    ],
)
def test_via_is_told_where_the_request_really_came_from(via: str, noted: str) -> None:
    event = new_invite(make_stack(), via=via)
    assert str(event.request.via) == noted
    assert len(event.request.vias) == via.count("SIP/2.0/")
    assert [str(found) for found in event.request.vias[1:]] == [text.strip() for text in via.split(",")[1:]]


def test_an_ipv6_source_is_noted_without_brackets() -> None:
    stack = make_stack()
    via = "SIP/2.0/UDP phone.example;branch=z9hG4bK-1;rport"
    event = received(stack.receive(request_bytes("OPTIONS", via=via), flow("2001:db8::7", 6000), NOW))
    assert ";received=2001:db8::7" in (event.request.headers.get("Via") or "")


@pytest.mark.rfc("3261", "17.2.3")
@pytest.mark.parametrize(
    "other",
    [
        request_bytes("OPTIONS", branch="z9hG4bK-2", call_id="other"),
        request_bytes("OPTIONS", via="SIP/2.0/UDP 192.0.2.11:5060;branch=z9hG4bK-1", call_id="other"),
        request_bytes("OPTIONS", via="SIP/2.0/UDP 192.0.2.10:5062;branch=z9hG4bK-1", call_id="other"),
        request_bytes("MESSAGE", branch="z9hG4bK-1", call_id="other"),
    ],
)
def test_branch_sent_by_and_method_together_make_a_transaction(other: bytes) -> None:
    stack = make_stack()
    stack.receive(request_bytes("OPTIONS"), flow(), NOW)
    received(stack.receive(other, flow(), NOW))
    assert stack.counts()["nist"] == 2


@pytest.mark.rfc("3261", "17.2.3")
def test_the_default_port_in_sent_by_may_be_left_out_and_case_does_not_count() -> None:
    stack = make_stack()
    stack.receive(request_bytes("OPTIONS", via="SIP/2.0/UDP Phone.example;branch=z9hG4bK-1"), flow(), NOW)
    again = request_bytes("OPTIONS", via="SIP/2.0/UDP phone.EXAMPLE:5060;branch=z9hG4bK-1")
    assert stack.receive(again, flow(), NOW) == []


@pytest.mark.rfc("3261", "17.2.3")
@pytest.mark.parametrize("via", ["SIP/2.0/UDP 192.0.2.10:5060", "SIP/2.0/UDP 192.0.2.10:5060;branch=1", "bare cookie"])
def test_requests_of_rfc_2543_are_matched_by_all_their_fields(via: str) -> None:
    via = via.replace("bare cookie", "SIP/2.0/UDP 192.0.2.10:5060;branch=z9hG4bK")  # RFC 4475 section 3.2.1
    stack = make_stack()
    event = new_invite(stack, via=via)
    assert sent(stack.receive(request_bytes("INVITE", via=via), flow(), NOW)).label.retransmission
    received(stack.receive(request_bytes("INVITE", via=via, call_id="other"), flow(), NOW))
    received(stack.receive(request_bytes("INVITE", via=via, cseq=2), flow(), NOW))
    assert stack.counts()["ist"] == 3

    refusal = stack.respond(event.transaction, response_to(event.request, 486), NOW)
    own_tag = "<sip:1002@example.test>;tag=to-1"
    other_tag = "<sip:1002@example.test>;tag=of-a-2xx"
    assert isinstance(stack.receive(request_bytes("ACK", via=via, to=other_tag), flow(), NOW)[0], AckReceived)
    assert stack.receive(request_bytes("ACK", via=via, to=own_tag), flow(), NOW) == []
    assert stack.receive(request_bytes("INVITE", via=via), flow(), NOW) == []  # confirmed
    assert sent(refusal).label.status == 486


@pytest.mark.rfc("3261", "8.2.2.2")
def test_a_merged_request_gets_482_and_is_not_passed_up() -> None:
    stack = make_stack()
    new_invite(stack)
    loop = answer(stack.receive(request_bytes("INVITE", branch="z9hG4bK-other-way"), flow("192.0.2.99"), NOW))
    assert (loop.status, loop.to.tag, loop.headers.get("Server")) == (482, "token-1", "pbx")
    again = stack.receive(request_bytes("INVITE", branch="z9hG4bK-other-way"), flow("192.0.2.99"), NOW)
    assert answer(again).to.tag == "token-1"


@pytest.mark.rfc("3261", "8.2.2.2")
def test_the_same_call_id_and_cseq_within_a_dialog_are_no_merge() -> None:
    stack = make_stack()
    to = "<sip:1002@example.test>;tag=ours"
    received(stack.receive(request_bytes("INFO", to=to), flow(), NOW))
    received(stack.receive(request_bytes("INFO", to=to, branch="z9hG4bK-2"), flow(), NOW))


def test_a_request_is_merged_only_with_one_that_is_still_known() -> None:
    stack = make_stack()
    event = new_invite(stack)
    stack.respond(event.transaction, response_to(event.request, 486), NOW)
    run_out(stack)
    received(stack.receive(request_bytes("INVITE", branch="z9hG4bK-2"), flow(), NOW + 100))


@pytest.mark.rfc("3261", "16.3")
def test_no_hops_left_is_483() -> None:
    refused = answer(make_stack().receive(request_bytes("INVITE", max_forwards=0), flow(), NOW))
    assert (refused.status, refused.reason) == (483, "Too Many Hops")


@pytest.mark.rfc("3261", "11")
@pytest.mark.parametrize(
    "data",
    [
        request_bytes("OPTIONS", max_forwards=0),
        request_bytes("REGISTER", max_forwards=0),
        request_bytes("BYE", max_forwards=0, to="<sip:1002@example.test>;tag=ours"),
        request_bytes("INVITE", max_forwards=None),
    ],
)
def test_what_has_arrived_needs_no_more_hops(data: bytes) -> None:
    received(make_stack().receive(data, flow(), NOW))


def test_the_acknowledged_refusal_of_the_stack_leaves_nothing() -> None:
    stack = make_stack()
    refused = answer(stack.receive(request_bytes("INVITE", max_forwards=0), flow(), NOW))
    assert stack.receive(request_bytes("ACK", to=str(refused.to)), flow(), NOW + 0.1) == []
    assert run_out(stack) == []
    assert_empty(stack)


def test_beyond_the_limit_new_requests_get_503_and_are_forgotten() -> None:
    stack = make_stack(max_server_transactions=2)
    for number in range(2):
        stack.receive(request_bytes("OPTIONS", branch=f"z9hG4bK-{number}", call_id=f"c{number}"), flow(), NOW)
    refused = answer(stack.receive(request_bytes("INVITE", branch="z9hG4bK-3", call_id="c3"), flow(), NOW))
    assert (refused.status, refused.headers.get("Retry-After")) == (503, "32")
    assert stack.counts() == {**NO_TRANSACTIONS, "nist": 2}


# ----------------------------------------------------------------------------------------------------- malformed input


@pytest.mark.rfc("3261", "8.2")
@pytest.mark.parametrize(
    ("data", "status"),
    [
        (request_bytes("OPTIONS").replace(b"SIP/2.0\r\n", b"SIP/7.0\r\n", 1), 505),
        (request_bytes("OPTIONS").replace(b"CSeq: 1 OPTIONS", b"CSeq: 1 INVITE"), 400),
        (request_bytes("OPTIONS", headers=[("Content-Length", "9")], contact=None), 400),
        (request_bytes("INVITE", max_forwards=300), 400),
    ],
)
def test_a_malformed_request_that_can_be_answered_is_answered_and_forgotten(data: bytes, status: int) -> None:
    stack = make_stack()
    refused = answer(stack.receive(data, flow("203.0.113.5", 999), NOW))
    assert refused.status == status
    assert refused.to.tag == "token-1"
    assert refused.via.received == "203.0.113.5"
    assert_empty(stack)


def test_a_400_names_what_is_wrong() -> None:
    refused = answer(make_stack().receive(request_bytes("INVITE", max_forwards=300), flow(), NOW))
    assert refused.reason.startswith("Bad Request - Max-Forwards: ")


@pytest.mark.parametrize(
    "data",
    [
        b"hello",
        b"\xff" * 2000,
        b"OPTIONS sip:x SIP/2.0\r\n\r\n",
        request_bytes("ACK").replace(b"CSeq: 1 ACK", b"CSeq: x ACK"),
        request_bytes("OPTIONS").replace(b"Via:", b"Vja:"),
        request_bytes("OPTIONS", via="nonsense"),
        b"SIP/2.0 99 Odd\r\n\r\n",
        b"a" * 70000,
    ],
)
def test_what_cannot_be_answered_is_discarded(data: bytes) -> None:
    (output,) = make_stack().receive(data, flow(), NOW)
    assert isinstance(output, Discarded)
    assert output.reason is DiscardReason.MALFORMED
    assert output.detail


@pytest.mark.parametrize("data", [b"", b"\r\n\r\n", b"\r\n", b"\0\0\0\0", b"\0"])
def test_keep_alives_are_told_apart_from_malformed_datagrams(data: bytes) -> None:
    (output,) = make_stack().receive(data, flow(), NOW)
    assert output == Discarded(flow(), DiscardReason.KEEP_ALIVE, "")


@given(data=st.binary(max_size=200))
def test_arbitrary_octets_raise_nothing_and_leave_nothing(data: bytes) -> None:
    stack = make_stack()
    stack.receive(data, flow(), NOW)
    assert_empty(stack)


@given(
    method=st.sampled_from(["INVITE", "ACK", "CANCEL", "BYE", "FOO"]),
    cuts=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 30), st.binary(max_size=12)), min_size=1, max_size=4),
)
def test_mutated_messages_raise_nothing(method: str, cuts: list[tuple[int, int, bytes]]) -> None:
    stack = make_stack()
    invite, _ = started(stack)
    for whole in (request_bytes(method, body=sdp()), response_to(invite, 486).encode()):
        mutated = whole
        for start, length, patch in cuts:
            mutated = mutated[:start] + patch + mutated[start + length :]
        for output in stack.receive(mutated, flow(), NOW):
            if isinstance(output, RequestReceived):
                stack.respond(output.transaction, build_response(output.request, 500, to_tag="x"), NOW)
    run_out(stack)
    assert_empty(stack)


# ----------------------------------------------------------------------------------------------------- answering INVITE


@pytest.mark.rfc("3261", "17.2.1")
def test_a_refusal_is_repeated_until_its_ack_which_is_not_passed_up() -> None:
    stack = make_stack()
    event = new_invite(stack)
    first = sent(stack.respond(event.transaction, response_to(event.request, 486), NOW))
    assert stack.next_deadline() == NOW + 0.5
    again = sent(stack.handle_timer(NOW + 0.5))
    assert (again.data, again.label) == (first.data, MessageLabel("INVITE", 486, True))
    for _ in range(2):
        assert stack.receive(request_bytes("ACK", to="<sip:1002@example.test>;tag=to-1"), flow(), NOW + 0.6) == []
    assert run_out(stack) == []
    assert_empty(stack)


@pytest.mark.rfc("3261", "17.2.1")
def test_a_refusal_that_nobody_acknowledges_ends_in_silence_after_timer_h() -> None:
    stack = make_stack()
    event = new_invite(stack)
    stack.respond(event.transaction, response_to(event.request, 486), NOW)
    assert len(run_out(stack)) == 10
    assert_empty(stack)


@pytest.mark.rfc("6026", "7.1")
def test_in_accepted_the_user_repeats_the_2xx_and_the_invite_is_absorbed() -> None:
    stack = make_stack()
    event = new_invite(stack)
    ok = response_to(event.request, 200, body=sdp())
    first = sent(stack.respond(event.transaction, ok, NOW))
    assert stack.receive(request_bytes("INVITE"), flow(), NOW + 0.1) == []
    again = sent(stack.respond(event.transaction, ok, NOW + 0.5))
    assert (again.data, again.label) == (first.data, MessageLabel("INVITE", 200, True))
    assert stack.respond(event.transaction, response_to(event.request, 486), NOW + 0.6) == []
    assert stack.next_deadline() == NOW + 32
    assert stack.handle_timer(NOW + 32) == []
    assert stack.respond(event.transaction, ok, NOW + 33) == []
    assert_empty(stack)


@pytest.mark.rfc("6026", "7.1")
@pytest.mark.parametrize("branch", ["z9hG4bK-1", "z9hG4bK-of-the-ack"])
def test_the_ack_for_a_2xx_is_passed_up_with_either_branch(branch: str) -> None:
    stack = make_stack()
    event = new_invite(stack)
    stack.respond(event.transaction, response_to(event.request, 200), NOW)
    (ack,) = stack.receive(request_bytes("ACK", branch=branch), flow(), NOW)
    assert isinstance(ack, AckReceived)
    assert ack.request.method == "ACK"


def test_an_ack_before_any_final_response_is_ignored() -> None:
    stack = make_stack()
    new_invite(stack)
    assert stack.receive(request_bytes("ACK"), flow(), NOW) == []


def test_after_a_final_response_no_other_is_sent() -> None:
    stack = make_stack()
    event = new_invite(stack)
    stack.respond(event.transaction, response_to(event.request, 486), NOW)
    for status in (180, 200, 603):
        assert stack.respond(event.transaction, response_to(event.request, status), NOW) == []


def test_a_response_to_an_unknown_transaction_goes_nowhere() -> None:
    response = response_to(request_bytes("INVITE"), 200)
    assert make_stack().respond(TransactionId("z9hG4bK-x", "192.0.2.10:5060", "INVITE"), response, NOW) == []


# -------------------------------------------------------------------------------------------------- CANCEL from peers


@pytest.mark.rfc("3261", "9.2")
def test_cancel_is_answered_200_and_passed_up_while_the_invite_is_pending() -> None:
    stack = make_stack()
    event = new_invite(stack)
    stack.respond(event.transaction, response_to(event.request, 180), NOW)
    ok, cancelled = stack.receive(request_bytes("CANCEL"), flow(), NOW)
    assert isinstance(ok, Transmit)
    response = response_of(ok.data)
    assert (response.status, response.cseq.method, response.to.tag) == (200, "CANCEL", "to-1")
    assert isinstance(cancelled, CancelReceived)
    assert cancelled.transaction == event.transaction
    again = sent(stack.receive(request_bytes("CANCEL"), flow(), NOW + 0.5))
    assert (again.data, again.label.retransmission) == (ok.data, True)


@pytest.mark.rfc("3261", "9.2")
def test_cancel_before_any_tag_was_given_gets_one_of_its_own() -> None:
    stack = make_stack()
    new_invite(stack)
    ok, _ = stack.receive(request_bytes("CANCEL"), flow(), NOW)
    assert isinstance(ok, Transmit)
    assert response_of(ok.data).to.tag == "token-1"


@pytest.mark.rfc("3261", "9.2")
@pytest.mark.parametrize("status", [200, 486])
def test_cancel_after_the_final_response_is_answered_and_has_no_effect(status: int) -> None:
    stack = make_stack()
    event = new_invite(stack)
    stack.respond(event.transaction, response_to(event.request, status), NOW)
    assert answer(stack.receive(request_bytes("CANCEL"), flow(), NOW)).status == 200


@pytest.mark.rfc("3261", "9.2")
def test_cancel_of_nothing_is_481() -> None:
    stack = make_stack()
    assert answer(stack.receive(request_bytes("CANCEL"), flow(), NOW)).status == 481
    run_out(stack)
    assert_empty(stack)


@pytest.mark.rfc("3261", "9.2")
def test_cancel_without_cookie_finds_its_invite() -> None:
    stack = make_stack()
    via = "SIP/2.0/UDP 192.0.2.10:5060"
    event = new_invite(stack, via=via)
    _, cancelled = stack.receive(request_bytes("CANCEL", via=via), flow(), NOW)
    assert isinstance(cancelled, CancelReceived)
    assert cancelled.transaction == event.transaction


# ---------------------------------------------------------------------------------------------------- our own requests


@pytest.mark.rfc("3261", "8.1.1.7")
@pytest.mark.rfc("3581", "3")
def test_a_request_leaves_with_our_via_on_top_and_stays_as_it_was() -> None:
    stack = make_stack()
    request = outgoing_request("INVITE", body=sdp())
    transmit = sent(stack.send_request(request, flow(), "b1", NOW))
    assert transmit.data.startswith(
        b"INVITE sip:1002@example.test SIP/2.0\r\nVia: SIP/2.0/UDP 198.51.100.1:5060;rport;branch=z9hG4bKb1\r\n"
    )
    assert (transmit.flow, transmit.label, transmit.transaction) == (
        flow(),
        MessageLabel("INVITE"),
        stack.client_id("b1", "INVITE"),
    )
    assert "Via" not in request.headers


def test_our_ipv6_address_stands_in_brackets_in_via_and_responses_find_back() -> None:
    stack = make_stack(Address("2001:db8::1", 5060))
    request, transaction = started(stack, "OPTIONS")
    assert (request.headers.get("Via") or "").startswith("SIP/2.0/UDP [2001:db8::1]:5060;")
    (event,) = reply(stack, request, 200)
    assert isinstance(event, ResponseReceived)
    assert event.transaction == transaction


@pytest.mark.parametrize("method", ["ACK", "CANCEL"])
def test_ack_and_cancel_are_not_started_as_requests(method: str) -> None:
    with pytest.raises(LocalProtocolError):
        make_stack().send_request(outgoing_request(method), flow(), "b1", NOW)


def test_a_branch_is_used_once() -> None:
    stack = make_stack()
    started(stack)
    with pytest.raises(LocalProtocolError):
        started(stack)


@pytest.mark.rfc("3261", "17.1.1.2")
def test_an_unanswered_invite_is_repeated_and_fails_after_timer_b() -> None:
    stack = make_stack()
    request, transaction = started(stack)
    outputs = run_out(stack)
    repeated, failed = outputs[:-1], outputs[-1]
    assert [sent([output]).data for output in repeated] == [request.encode()] * 6
    assert all(sent([output]).label == MessageLabel("INVITE", None, True) for output in repeated)
    assert failed == TransactionFailed(transaction, FailureCause.TIMEOUT)
    assert_empty(stack)


@pytest.mark.rfc("3261", "17.1.2.2")
def test_an_unanswered_request_fails_after_timer_f() -> None:
    stack = make_stack()
    _, transaction = started(stack, "BYE")
    assert run_out(stack)[-1] == TransactionFailed(transaction, FailureCause.TIMEOUT)
    assert_empty(stack)


@pytest.mark.rfc("3261", "17.1.4")
@pytest.mark.parametrize("method", ["INVITE", "BYE"])
def test_a_transport_error_ends_a_client_transaction(method: str) -> None:
    stack = make_stack()
    _, transaction = started(stack, method)
    assert stack.transport_failed(transaction, NOW) == [TransactionFailed(transaction, FailureCause.TRANSPORT)]
    assert stack.transport_failed(transaction, NOW) == []
    assert_empty(stack)


@pytest.mark.rfc("6026", "7.1")
def test_a_transport_error_is_told_of_a_pending_invite_but_does_not_end_it() -> None:
    stack = make_stack()
    event = new_invite(stack)
    failed = TransactionFailed(event.transaction, FailureCause.TRANSPORT)
    assert stack.transport_failed(event.transaction, NOW) == [failed]
    assert stack.respond(event.transaction, response_to(event.request, 486), NOW)


@pytest.mark.rfc("3261", "17.1.1.2")
def test_provisional_responses_are_passed_up_all_but_100() -> None:
    stack = make_stack()
    request, transaction = started(stack)
    assert reply(stack, request, 100) == []
    for _ in range(2):
        (event,) = reply(stack, request, 180)
        assert isinstance(event, ResponseReceived)
        assert (event.transaction, event.response.status, event.flow) == (transaction, 180, flow())
    assert stack.handle_timer(NOW + 100) == []


@pytest.mark.rfc("6026", "7.2")
def test_every_2xx_to_invite_is_passed_up_until_timer_m_and_none_is_acknowledged_by_the_stack() -> None:
    stack = make_stack()
    request, _ = started(stack)
    for to_tag in ("one", "one", "two"):
        (event,) = reply(stack, request, 200, to_tag=to_tag, now=NOW + 1)
        assert isinstance(event, ResponseReceived)
        assert event.response.to.tag == to_tag
    assert run_out(stack) == []
    (late,) = reply(stack, request, 200, now=NOW + 40)
    assert isinstance(late, Discarded)
    assert_empty(stack)


@pytest.mark.rfc("3261", "17.1.1.3")
def test_a_refusal_is_acknowledged_with_the_invites_via_and_routes_and_passed_up_once() -> None:
    stack = make_stack()
    routes = [("Route", "<sip:p1.example;lr>"), ("Route", "<sip:p2.example;lr>"), ("Require", "100rel")]
    request, transaction = started(stack, headers=routes)
    ack_out, event = reply(stack, request, 486, to_tag="busy")
    assert isinstance(ack_out, Transmit)
    ack = request_of(ack_out.data)
    assert (ack.method, ack.uri, str(ack.cseq)) == ("ACK", request.uri, "1 ACK")
    assert ack.headers.get_all("Via") == request.headers.get_all("Via")
    assert ack.headers.get_all("Route") == ["<sip:p1.example;lr>", "<sip:p2.example;lr>"]
    assert (str(ack.from_), ack.to.tag, ack.call_id) == (str(request.from_), "busy", request.call_id)
    assert "Require" not in ack.headers
    assert ack.max_forwards == 70
    assert (ack_out.flow, ack_out.label) == (flow(), MessageLabel("ACK"))
    assert isinstance(event, ResponseReceived)
    assert event.transaction == transaction

    again = sent(reply(stack, request, 486, to_tag="busy"))
    assert (again.data, again.label) == (ack_out.data, MessageLabel("ACK", None, True))
    assert run_out(stack) == []
    assert_empty(stack)


@pytest.mark.rfc("3261", "17.1.2.2")
def test_a_final_response_to_another_request_is_passed_up_once() -> None:
    stack = make_stack()
    request, _ = started(stack, "BYE")
    assert isinstance(reply(stack, request, 200)[0], ResponseReceived)
    assert reply(stack, request, 200) == []
    assert run_out(stack) == []
    assert_empty(stack)


@pytest.mark.rfc("3261", "17.1.3")
def test_a_response_matches_by_branch_and_method() -> None:
    stack = make_stack()
    request, _ = started(stack, "BYE")
    for change in (b"z9hG4bKb1", b"z9hG4bKb2"), (b"CSeq: 1 BYE", b"CSeq: 1 INFO"):
        (stray,) = stack.receive(response_to(request, 200).encode().replace(*change), flow(), NOW)
        assert isinstance(stray, Discarded)
        assert stray.reason is DiscardReason.STRAY_RESPONSE


@pytest.mark.rfc("3261", "18.1.2")
@pytest.mark.parametrize("sent_by", [b"203.0.113.1:5060", b"198.51.100.1:5070"])
def test_a_response_with_the_sent_by_of_somebody_else_is_discarded(sent_by: bytes) -> None:
    stack = make_stack()
    request, _ = started(stack, "BYE")
    data = response_to(request, 200).encode().replace(b"198.51.100.1:5060", sent_by)
    (output,) = stack.receive(data, flow(), NOW)
    assert isinstance(output, Discarded)
    assert output.reason is DiscardReason.MISROUTED_RESPONSE


def test_a_response_may_come_from_another_address_than_the_request_went_to() -> None:
    stack = make_stack(advertised=lambda to: OURS if to == flow() else Address("10.0.0.1", 5060))
    request, transaction = started(stack, "BYE")
    (event,) = stack.receive(response_to(request, 200).encode(), flow("192.0.2.11"), NOW)
    assert isinstance(event, ResponseReceived)
    assert (event.transaction, event.flow) == (transaction, flow("192.0.2.11"))


@pytest.mark.rfc("3261", "8.1.3.3")
def test_a_response_with_more_than_one_via_is_discarded() -> None:
    stack = make_stack()
    request, _ = started(stack, "BYE")
    response = response_to(request, 200)
    response.headers.add("Via", "SIP/2.0/UDP 203.0.113.1;branch=z9hG4bK-2")
    (output,) = stack.receive(response.encode(), flow(), NOW)
    assert isinstance(output, Discarded)
    assert output.reason is DiscardReason.MISROUTED_RESPONSE


@pytest.mark.rfc("3261", "13.2.2.4")
def test_the_ack_for_a_2xx_is_sent_outside_of_transactions() -> None:
    stack = make_stack()
    transmit = sent(stack.send_ack(outgoing_request("ACK"), flow(), "b9"))
    assert request_of(transmit.data).via.branch == "z9hG4bKb9"
    assert (transmit.label, transmit.transaction) == (MessageLabel("ACK"), None)
    assert_empty(stack)


# ------------------------------------------------------------------------------------------------------ our own CANCEL


@pytest.mark.rfc("3261", "9.1")
def test_cancel_repeats_the_invites_identity_and_routes() -> None:
    stack = make_stack()
    request, transaction = started(stack, headers=[("Route", "<sip:p1.example;lr>"), ("Require", "100rel")])
    reply(stack, request, 180)
    transmit = sent(stack.cancel(transaction, NOW))
    cancel = request_of(transmit.data)
    assert (cancel.method, cancel.uri, str(cancel.cseq)) == ("CANCEL", request.uri, "1 CANCEL")
    for name in ("Via", "From", "To", "Call-ID", "Route"):
        assert cancel.headers.get_all(name) == request.headers.get_all(name)
    assert "Require" not in cancel.headers
    assert (transmit.flow, transmit.label) == (flow(), MessageLabel("CANCEL"))
    assert stack.counts() == {**NO_TRANSACTIONS, "ict": 1, "nict": 1}


@pytest.mark.rfc("3261", "9.1")
@pytest.mark.parametrize("status", [100, 183])
def test_cancel_waits_for_a_provisional_response(status: int) -> None:
    stack = make_stack()
    request, transaction = started(stack)
    assert stack.cancel(transaction, NOW) == []
    outputs = reply(stack, request, status, now=NOW + 1)
    assert isinstance(outputs[0], Transmit)
    assert request_of(outputs[0].data).method == "CANCEL"
    assert len(outputs) == (1 if status == 100 else 2)


@pytest.mark.rfc("3261", "9.1")
def test_a_cancelled_invite_ends_with_487_and_the_cancels_own_responses_are_nobodys_business() -> None:
    stack = make_stack()
    request, transaction = started(stack)
    reply(stack, request, 180)
    cancel = request_of(sent(stack.cancel(transaction, NOW)).data)
    assert stack.cancel(transaction, NOW) == []
    assert reply(stack, cancel, 200) == []
    ack, event = reply(stack, request, 487)
    assert isinstance(ack, Transmit)
    assert isinstance(event, ResponseReceived)
    assert run_out(stack) == []
    assert_empty(stack)


@pytest.mark.rfc("3261", "9.1")
def test_cancel_that_crosses_a_2xx_leaves_the_2xx_to_the_user() -> None:
    stack = make_stack()
    request, transaction = started(stack)
    reply(stack, request, 180)
    cancel = request_of(sent(stack.cancel(transaction, NOW)).data)
    (event,) = reply(stack, request, 200)
    assert isinstance(event, ResponseReceived)
    assert reply(stack, cancel, 481) == []
    assert run_out(stack) == []
    assert_empty(stack)


@pytest.mark.rfc("3261", "9.1")
def test_a_cancelled_invite_is_given_up_after_64_t1_with_one_report() -> None:
    stack = make_stack()
    request, transaction = started(stack)
    reply(stack, request, 180)
    stack.cancel(transaction, NOW)
    failures = [output for output in run_out(stack) if not isinstance(output, Transmit)]
    assert failures == [TransactionFailed(transaction, FailureCause.TIMEOUT)]
    assert_empty(stack)


def test_a_cancel_that_cannot_be_sent_is_not_reported() -> None:
    stack = make_stack()
    request, transaction = started(stack)
    reply(stack, request, 180)
    cancel = sent(stack.cancel(transaction, NOW)).transaction
    assert cancel is not None
    assert stack.transport_failed(cancel, NOW) == []


@pytest.mark.rfc("3261", "9.1")
def test_only_a_pending_invite_is_cancelled() -> None:
    stack = make_stack()
    request, transaction = started(stack)
    reply(stack, request, 486)
    assert stack.cancel(transaction, NOW) == []
    assert stack.cancel(client_id("unknown", "INVITE"), NOW) == []
    _, options = started(stack, "OPTIONS")
    assert stack.cancel(options, NOW) == []


# --------------------------------------------------------------------------------------------------- labels and timers


def test_labels_come_from_a_closed_set() -> None:
    assert MessageLabel.of(request_of(request_bytes("INVITE"))) == MessageLabel("INVITE", None, False)
    assert MessageLabel.of(request_of(request_bytes("EVIL-4711"))).method == "OTHER"
    response = response_to(request_bytes("BYE"), 481)
    assert MessageLabel.of(response) == MessageLabel("BYE", 481, False)


def test_without_a_server_name_no_server_header_is_sent() -> None:
    refused = answer(make_stack(server_name="").receive(request_bytes("CANCEL"), flow(), NOW))
    assert "Server" not in refused.headers


def test_ten_thousand_transactions_share_one_heap_with_few_entries_each() -> None:
    stack = make_stack()
    for number in range(10_000):
        branch = f"b{number}"
        outputs = stack.send_request(outgoing_request("OPTIONS"), flow(), branch, NOW + number / 1000)
        if number % 2:
            reply(stack, request_of(sent(outputs).data), 200, now=NOW + number / 1000)
    assert stack.counts()["nict"] == 10_000
    assert len(stack._deadlines) <= 20_000
    assert stack.next_deadline() == NOW + 0.5
    run_out(stack)
    assert_empty(stack)


def test_the_next_deadline_is_never_earlier_than_something_to_do() -> None:
    stack = make_stack()
    request, _ = started(stack)
    reply(stack, request, 180)
    assert stack.next_deadline() is None
    reply(stack, request, 200, now=NOW + 1)
    assert stack.next_deadline() == NOW + 33


def test_a_stale_deadline_does_not_end_a_later_transaction_of_the_same_name() -> None:
    stack = make_stack(timers=Timers(t4=1.0))
    event = new_invite(stack)
    stack.respond(event.transaction, response_to(event.request, 486), NOW)
    for after in (0.5, 1.5, 3.5, 7.5):  # timer G, due again after 11.5
        stack.handle_timer(NOW + after)
    stack.receive(request_bytes("ACK", to="<sip:1002@example.test>;tag=to-1"), flow(), NOW + 7.6)
    stack.handle_timer(NOW + 8.6)  # timer I
    assert stack.counts() == NO_TRANSACTIONS
    received(stack.receive(request_bytes("INVITE"), flow(), NOW + 9))
    stack.handle_timer(NOW + 12)
    assert stack.counts() == {**NO_TRANSACTIONS, "ist": 1}


def test_an_alarm_that_fires_too_early_does_nothing() -> None:
    stack = make_stack()
    started(stack)
    assert stack.handle_timer(NOW + 0.49) == []
    assert len(stack.handle_timer(NOW + 0.5)) == 1


# -------------------------------------------------------------------------------------------- two stacks on a bad wire

CALLER = Address("192.0.2.1", 5060)
CALLEE = Address("192.0.2.2", 5060)


@dataclass
class Callee:
    """A transaction user that rings, answers with `status` after `rings_s` and repeats a 2xx until its ACK."""

    wire: Wire
    stack: SipStack
    status: int
    rings_s: float
    requests: list[Request] = field(default_factory=list)
    cancelled: int = 0
    answered: Response | None = None
    acknowledged: bool = False

    def user(self, output: Output, now: float) -> list[Output]:
        match output:
            case RequestReceived(transaction, request, _):
                self.requests.append(request)
                if request.method != "INVITE":
                    return self.stack.respond(transaction, response_to(request, self.status, to_tag="callee"), now)
                self.wire.at(now + self.rings_s, lambda: self._answer(transaction, request, self.status))
                return self.stack.respond(transaction, response_to(request, 180, to_tag="callee"), now)
            case CancelReceived(transaction, _, _):
                self.cancelled += 1
                invite = self.requests[0]
                self.wire.at(now, lambda: self._answer(transaction, invite, 487))
            case AckReceived():
                self.acknowledged = True
            case _:
                pass
        return []

    def _answer(self, transaction: TransactionId, request: Request, status: int) -> None:
        if self.answered is None:
            self.answered = response_to(request, status, to_tag="callee")
            self._send(transaction, TIMERS.t1, self.wire.now + 64 * TIMERS.t1)

    def _send(self, transaction: TransactionId, interval_s: float, until: float) -> None:
        response = self.answered
        assert response is not None
        if self.acknowledged or self.wire.now >= until:
            return
        self.wire.perform(CALLEE, self.stack.respond(transaction, response, self.wire.now))
        if response.status < 300:
            again = min(2 * interval_s, TIMERS.t2)
            self.wire.at(self.wire.now + interval_s, lambda: self._send(transaction, again, until))


@dataclass
class Caller:
    """A transaction user that notes what it is told and acknowledges every 2xx."""

    stack: SipStack
    flow: Flow
    finals: list[int] = field(default_factory=list)
    failures: list[FailureCause] = field(default_factory=list)

    def user(self, output: Output, _now: float) -> list[Output]:
        match output:
            case ResponseReceived(transaction, response, _) if response.status >= 200:
                self.finals.append(response.status)
                if transaction.method == "INVITE" and response.status < 300:
                    return self.stack.send_ack(outgoing_request("ACK"), self.flow, "ack")
            case TransactionFailed(_, cause):
                self.failures.append(cause)
            case _:
                pass
        return []


def play(
    method: str, status: int, rings_s: float, cancel_after_s: float | None, make_wire: Callable[[], Wire]
) -> tuple[Caller, Callee, Wire]:
    """One request from caller to callee over the wire, until nothing is left to happen."""
    wire = make_wire()
    caller_stack, callee_stack = make_stack(CALLER), make_stack(CALLEE)
    caller = Caller(caller_stack, wire.flow(CALLEE))
    callee = Callee(wire, callee_stack, status, rings_s)
    wire.attach(CALLER, caller_stack, caller.user)
    wire.attach(CALLEE, callee_stack, callee.user)
    transaction = client_id("b1", method)
    wire.perform(CALLER, caller_stack.send_request(outgoing_request(method), caller.flow, "b1", wire.now))
    if cancel_after_s is not None:
        start = wire.now
        wire.at(start + cancel_after_s, lambda: wire.perform(CALLER, caller_stack.cancel(transaction, wire.now)))
    wire.run()
    return caller, callee, wire


def check(method: str, status: int, caller: Caller, callee: Callee, *, cancelled: bool) -> None:
    assert_empty(caller.stack)
    assert_empty(callee.stack)
    assert len(callee.requests) <= 1, "a retransmission was passed up"
    assert callee.cancelled <= 1
    assert len(caller.failures) <= 1
    assert caller.finals or caller.failures, "the request had no outcome"
    expected = {status, 487} if cancelled else {status}
    assert set(caller.finals) <= expected
    if method != "INVITE" or (caller.finals and caller.finals[0] >= 300):
        assert len(caller.finals) + len(caller.failures) == 1
    if caller.finals and not (method == "INVITE" and caller.finals[0] < 300):
        assert callee.answered is None or callee.answered.status == caller.finals[0]


@pytest.mark.rfc("3261", "17")
@pytest.mark.parametrize("status", [200, 486])
def test_on_a_perfect_wire_an_invite_costs_the_messages_of_the_figure(status: int) -> None:
    caller, callee, wire = play("INVITE", status, 2.0, None, lambda: Wire(perfect()))
    check("INVITE", status, caller, callee, cancelled=False)
    assert [datagram.data.split(b" ", 2)[0:2][datagram.data.startswith(b"SIP")] for datagram in wire.sent] == [
        b"INVITE",
        b"100",
        b"180",
        str(status).encode(),
        b"ACK",
    ]


@pytest.mark.rfc("3261", "17")
@given(
    status=st.sampled_from([200, 302, 486, 603]),
    rings_s=st.floats(0, 40),
    cancel_after_s=st.none() | st.floats(0, 50),
    script=fates(),
)
def test_an_invite_over_a_bad_wire_has_one_outcome_and_leaves_nothing(
    status: int, rings_s: float, cancel_after_s: float | None, script: list[Fate]
) -> None:
    caller, callee, _ = play("INVITE", status, rings_s, cancel_after_s, lambda: Wire(scripted(script)))
    check("INVITE", status, caller, callee, cancelled=cancel_after_s is not None)


@pytest.mark.rfc("3261", "17")
@given(status=st.sampled_from([200, 404, 503]), script=fates())
def test_a_request_over_a_bad_wire_has_one_outcome_and_leaves_nothing(status: int, script: list[Fate]) -> None:
    caller, callee, _ = play("BYE", status, 0.0, None, lambda: Wire(scripted(script)))
    check("BYE", status, caller, callee, cancelled=False)


@given(seed=st.integers(0, 2**32), method=st.sampled_from(["INVITE", "BYE"]), loss=st.sampled_from([0.1, 0.5, 1.0]))
def test_on_a_wire_that_stays_bad_nothing_is_left_either(seed: int, method: str, loss: float) -> None:
    caller, callee, _ = play(method, 486, 1.0, None, lambda: Wire(seeded(seed, loss=loss)))
    check(method, 486, caller, callee, cancelled=False)
    if loss == 1.0:
        assert caller.failures == [FailureCause.TIMEOUT]
        assert not callee.requests


def test_headers_given_by_the_user_are_sent_as_they_are() -> None:
    stack = make_stack()
    event = received(stack.receive(request_bytes("OPTIONS"), flow(), NOW))
    response = response_to(event.request, 200, headers=[("Allow", "INVITE, ACK"), ("X-Odd", "a,b;c")])
    found = answer(stack.respond(event.transaction, response, NOW))
    assert [name for name, _ in found.headers.items()] == [name for name, _ in response.headers.items()] + [
        "Content-Length"
    ]
    assert (found.headers.get("Allow"), found.headers.get("X-Odd")) == ("INVITE, ACK", "a,b;c")
    assert str(found.via) == f"SIP/2.0/UDP {PEER};branch=z9hG4bK-1"
