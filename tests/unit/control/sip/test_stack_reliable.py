"""The transaction layer over connections: no repetitions, Content-Length, and what a lost connection means."""

import pytest

from control.sip.address import Address, Flow, Transport
from control.sip.message import MAX_MESSAGE_BYTES
from control.sip.stack import (
    Discarded,
    DiscardReason,
    FailureCause,
    RequestReceived,
    SipStack,
    TransactionFailed,
    Transmit,
    client_id,
)
from tests.harness.messages import PEER, outgoing_request, request_bytes, request_of, response_of, response_to, sdp
from tests.unit.control.sip.test_stack import (
    NO_TRANSACTIONS,
    NOW,
    TIMERS,
    answer,
    assert_empty,
    make_stack,
    received,
    run_out,
    sent,
)

CONNECTION = Flow(Transport.TCP, "main", Address(PEER.host, 43210))
OTHER = Flow(Transport.TCP, "main", Address(PEER.host, 43211))
LISTENING = Flow(Transport.TCP, "main", PEER)


def invited(stack: SipStack, flow: Flow = CONNECTION, **changes: str) -> RequestReceived:
    return received(stack.receive(request_bytes("INVITE", body=sdp(), **changes), flow, NOW))  # type: ignore[arg-type]


def reply(stack: SipStack, data: bytes, status: int, flow: Flow = CONNECTION) -> list[object]:
    return list(stack.receive(response_to(request_of(data), status).encode(), flow, NOW))


def started(stack: SipStack, method: str, flow: Flow = CONNECTION, branch: str = "b1") -> bytes:
    return sent(stack.send_request(outgoing_request(method), flow, branch, NOW)).data


def assert_nothing_left(stack: SipStack) -> None:
    assert_empty(stack)
    assert not stack._of_flow


# --------------------------------------------------------------------------------------------------------------- timers


@pytest.mark.rfc("3261", "17.1.1.2")
@pytest.mark.parametrize("method", ["INVITE", "OPTIONS"])
def test_a_request_is_sent_once_and_fails_after_timers_b_and_f(method: str) -> None:
    stack = make_stack()
    started(stack, method)
    assert stack.next_deadline() == NOW + 64 * TIMERS.t1
    assert run_out(stack) == [TransactionFailed(client_id("b1", method), FailureCause.TIMEOUT)]
    assert_nothing_left(stack)


@pytest.mark.rfc("3261", "18.1.1")
@pytest.mark.parametrize("transport", [Transport.TCP, Transport.TLS])
def test_the_via_names_the_transport(transport: Transport) -> None:
    data = started(make_stack(), "OPTIONS", Flow(transport, "main", PEER))
    assert f"Via: SIP/2.0/{transport} ".encode() in data


@pytest.mark.rfc("3261", "17.1.2.2")
def test_a_final_response_ends_a_request_of_ours_at_once() -> None:
    stack = make_stack()
    reply(stack, started(stack, "OPTIONS"), 200)
    assert_nothing_left(stack)


@pytest.mark.rfc("3261", "17.1.1.2")
def test_a_refusal_of_our_invite_is_acknowledged_and_ends_it_at_once() -> None:
    stack = make_stack()
    ack, refusal = reply(stack, started(stack, "INVITE"), 486)
    assert isinstance(ack, Transmit)
    assert ack.data.startswith(b"ACK ")
    assert ack.flow == CONNECTION
    assert refusal is not None
    assert_nothing_left(stack)


@pytest.mark.rfc("6026", "7.2")
def test_an_accepted_invite_of_ours_waits_for_other_branches_all_the_same() -> None:
    stack = make_stack()
    reply(stack, started(stack, "INVITE"), 200)
    assert stack.next_deadline() == NOW + 64 * TIMERS.t1
    assert stack.counts() == {**NO_TRANSACTIONS, "ict": 1}


@pytest.mark.rfc("3261", "17.2.2")
def test_our_final_response_ends_a_request_of_the_peer_at_once() -> None:
    stack = make_stack()
    event = received(stack.receive(request_bytes("OPTIONS"), CONNECTION, NOW))
    assert sent(stack.respond(event.transaction, response_to(event.request, 200), NOW)).flow == CONNECTION
    assert_nothing_left(stack)


@pytest.mark.rfc("3261", "17.2.1")
def test_our_refusal_is_sent_once_and_its_ack_ends_the_invite_at_once() -> None:
    stack = make_stack()
    event = invited(stack)
    stack.respond(event.transaction, response_to(event.request, 486), NOW)
    assert stack.next_deadline() == NOW + 64 * TIMERS.t1
    assert stack.receive(request_bytes("ACK", to="<sip:1002@example.test>;tag=to-1"), CONNECTION, NOW) == []
    assert_nothing_left(stack)


def test_an_unacknowledged_refusal_ends_in_silence_after_timer_h() -> None:
    stack = make_stack()
    event = invited(stack)
    stack.respond(event.transaction, response_to(event.request, 486), NOW)
    assert run_out(stack) == []
    assert_nothing_left(stack)


def test_cancelling_works_as_over_udp() -> None:
    stack = make_stack()
    invite = started(stack, "INVITE")
    reply(stack, invite, 180)
    cancel = sent(stack.cancel(client_id("b1", "INVITE"), NOW))
    assert cancel.data.startswith(b"CANCEL ")
    reply(stack, cancel.data, 200)
    reply(stack, invite, 487)
    assert_nothing_left(stack)


# -------------------------------------------------------------------------------------------------------------- framing


@pytest.mark.rfc("3261", "18.3")
def test_a_request_without_content_length_gets_400() -> None:
    stack = make_stack()
    refusal = answer(stack.receive(request_bytes("OPTIONS").replace(b"Content-Length: 0\r\n", b""), CONNECTION, NOW))
    assert refusal.status == 400
    assert "Content-Length" in refusal.reason
    assert_nothing_left(stack)


@pytest.mark.parametrize(
    "data",
    [request_bytes("ACK"), response_to(request_bytes("OPTIONS"), 200).encode()],
    ids=["ACK", "200"],
)
def test_what_cannot_be_answered_and_has_no_content_length_is_discarded(data: bytes) -> None:
    outputs = make_stack().receive(data.replace(b"Content-Length: 0\r\n", b""), CONNECTION, NOW)
    (discarded,) = outputs
    assert isinstance(discarded, Discarded)
    assert discarded.reason is DiscardReason.MALFORMED


@pytest.mark.rfc("3261", "21.5.7")
@pytest.mark.parametrize("length", [MAX_MESSAGE_BYTES, 10**8])
def test_a_request_whose_body_is_too_long_gets_513(length: int) -> None:
    head = request_bytes("INVITE").replace(b"Content-Length: 0", f"Content-Length: {length}".encode())
    assert answer(make_stack().receive(head, CONNECTION, NOW)).status == 513


@pytest.mark.parametrize("lines", [b"Content-Length: many", b"Content-Length: 5\r\nContent-Length: 6"])
def test_a_request_whose_length_is_not_one_number_gets_400(lines: bytes) -> None:
    head = request_bytes("INVITE").replace(b"Content-Length: 0", lines)
    assert answer(make_stack().receive(head, CONNECTION, NOW)).status == 400


def test_a_datagram_needs_no_content_length() -> None:
    data = request_bytes("OPTIONS").replace(b"Content-Length: 0\r\n", b"")
    received(make_stack().receive(data, Flow(Transport.UDP, "main", PEER), NOW))


# ----------------------------------------------------------------------------------------------------- lost connections


@pytest.mark.rfc("3261", "17.1.4")
@pytest.mark.parametrize("method", ["INVITE", "OPTIONS"])
def test_a_request_without_any_answer_fails_with_its_connection(method: str) -> None:
    stack = make_stack()
    started(stack, method)
    started(stack, method, OTHER, "b2")
    assert stack.flow_failed(CONNECTION, NOW) == [TransactionFailed(client_id("b1", method), FailureCause.TRANSPORT)]
    assert stack.flow_failed(CONNECTION, NOW) == []
    assert sum(stack.counts().values()) == 1, "the other connection's"


@pytest.mark.parametrize("method", ["INVITE", "OPTIONS"])
def test_a_request_that_is_being_worked_on_waits_for_its_final_response_over_another_connection(method: str) -> None:
    stack = make_stack()
    data = started(stack, method)
    reply(stack, data, 180)
    assert stack.flow_failed(CONNECTION, NOW) == []
    assert len(reply(stack, data, 200, OTHER)) == 1


def test_a_withdrawn_invite_without_any_answer_fails_with_its_connection() -> None:
    stack = make_stack()
    started(stack, "INVITE")
    stack.cancel(client_id("b1", "INVITE"), NOW)
    (failed,) = stack.flow_failed(CONNECTION, NOW)
    assert isinstance(failed, TransactionFailed)
    assert_nothing_left(stack)


@pytest.mark.rfc("3261", "18.2.2")
def test_responses_go_to_the_port_in_via_once_the_connection_of_the_request_is_gone() -> None:
    stack = make_stack()
    event = invited(stack)
    assert sent(stack.respond(event.transaction, response_to(event.request, 180), NOW)).flow == CONNECTION
    assert stack.flow_failed(CONNECTION, NOW) == []
    assert sent(stack.respond(event.transaction, response_to(event.request, 200), NOW)).flow == LISTENING
    assert stack.flow_failed(LISTENING, NOW) == []
    assert sent(stack.respond(event.transaction, response_to(event.request, 200), NOW)).flow == LISTENING


def test_responses_never_go_to_another_host_than_the_request_came_from() -> None:
    stack = make_stack()
    event = invited(stack, via="SIP/2.0/TCP 203.0.113.9:5090;branch=z9hG4bK-1")
    stack.flow_failed(CONNECTION, NOW)
    response = sent(stack.respond(event.transaction, response_to(event.request, 486), NOW))
    assert response.flow.remote == Address(PEER.host, 5090)
    assert response_of(response.data).via.received == PEER.host


def test_a_lost_connection_touches_no_transaction_over_udp() -> None:
    stack = make_stack()
    started(stack, "OPTIONS", Flow(Transport.UDP, "main", PEER))
    assert stack.flow_failed(LISTENING, NOW) == []
    assert not stack._of_flow


def test_a_restored_request_without_any_answer_is_sent_once_more_as_it_may_never_have_left() -> None:
    stack, successor = make_stack(), make_stack()
    event = invited(stack)
    request = started(stack, "OPTIONS")
    for saved in stack.save([event.transaction, client_id("b1", "OPTIONS")]):
        successor.restore(saved, NOW)
    again = sent(successor.handle_timer(NOW))
    assert (again.data, again.flow, again.label.retransmission) == (request, CONNECTION, True)
    assert successor.handle_timer(NOW) == []
    assert successor.next_deadline() == NOW + 64 * TIMERS.t1
    (failed,) = successor.flow_failed(CONNECTION, NOW)
    assert isinstance(failed, TransactionFailed)
    assert sent(successor.respond(event.transaction, response_to(event.request, 486), NOW)).flow == LISTENING
    run_out(successor)
    assert_nothing_left(successor)


def test_a_restored_request_is_not_sent_again_once_it_has_an_answer() -> None:
    stack, successor = make_stack(), make_stack()
    first, second = started(stack, "OPTIONS"), started(stack, "OPTIONS", branch="b2")
    reply(stack, first, 100)
    for saved in stack.save([client_id("b1", "OPTIONS"), client_id("b2", "OPTIONS")]):
        successor.restore(saved, NOW)
    reply(successor, second, 200, OTHER)
    assert successor.handle_timer(NOW) == []


@pytest.mark.parametrize(("via", "port"), [("TLS 192.0.2.10", 5061), ("TCP 192.0.2.10", 5060)])
def test_without_a_port_in_via_responses_go_to_the_default_port_of_the_transport(via: str, port: int) -> None:
    stack = make_stack()
    event = invited(stack, via=f"SIP/2.0/{via};branch=z9hG4bK-1")
    stack.flow_failed(CONNECTION, NOW)
    response = sent(stack.respond(event.transaction, response_to(event.request, 486), NOW))
    assert response.flow.remote == Address(PEER.host, port)


# ------------------------------------------------------------------------------------------------------- large requests

DATAGRAMS = Flow(Transport.UDP, "main", PEER)
LARGE = b"x" * 1200


def both_ways(listening: Flow | None = LISTENING) -> SipStack:
    return make_stack(by_stream=lambda flow: listening if flow == DATAGRAMS else None)


def large(stack: SipStack, *, now: float = NOW, method: str = "INVITE", branch: str = "b1") -> Transmit:
    return sent(stack.send_request(outgoing_request(method, body=LARGE), DATAGRAMS, branch, now))


@pytest.mark.rfc("3261", "18.1.1")
def test_a_request_of_more_than_1300_octets_goes_over_a_connection_and_says_so_in_via() -> None:
    stack = both_ways()
    request = large(stack)
    assert request.flow == LISTENING
    assert request_of(request.data).headers.get_all("Via") == ["SIP/2.0/TCP 198.51.100.1:5060;rport;branch=z9hG4bKb1"]
    ack, _ = stack.receive(response_to(request_of(request.data), 486).encode(), LISTENING, NOW)
    assert isinstance(ack, Transmit)
    assert ack.flow == LISTENING
    assert_nothing_left(stack)


@pytest.mark.rfc("3261", "18.1.1")
@pytest.mark.parametrize(("size", "transport"), [(1300, Transport.UDP), (1301, Transport.TCP)])
def test_the_limit_is_1300_octets_of_the_whole_request(size: int, transport: Transport) -> None:
    other = sent(make_stack().send_request(outgoing_request("OPTIONS", body=b"x" * 900), DATAGRAMS, "b1", NOW)).data
    body = b"x" * (900 + size - len(other))
    request = sent(both_ways().send_request(outgoing_request("OPTIONS", body=body), DATAGRAMS, "b1", NOW))
    assert (len(request.data), request.flow.transport) == (size, transport)


def test_a_large_request_goes_by_udp_where_there_is_no_connection_to_be_had() -> None:
    assert large(both_ways(None)).flow == DATAGRAMS
    assert large(make_stack()).flow == DATAGRAMS


@pytest.mark.rfc("3261", "18.1.1")
@pytest.mark.parametrize("method", ["INVITE", "OPTIONS"])
def test_a_large_request_goes_by_udp_after_all_when_the_connection_is_refused(method: str) -> None:
    stack = both_ways()
    large(stack, method=method)
    request = sent(stack.flow_failed(LISTENING, NOW + 1))
    assert (request.flow, request.transaction) == (DATAGRAMS, client_id("b1", method))
    assert request_of(request.data).headers.get_all("Via") == ["SIP/2.0/UDP 198.51.100.1:5060;rport;branch=z9hG4bKb1"]
    assert stack.next_deadline() == NOW + 1 + TIMERS.t1, "it is repeated"
    assert len(stack.receive(response_to(request_of(request.data), 200).encode(), DATAGRAMS, NOW + 1)) == 1


def test_a_peer_that_refused_a_connection_is_not_asked_again_for_ten_minutes() -> None:
    stack = both_ways()
    large(stack)
    stack.flow_failed(LISTENING, NOW)
    assert large(stack, branch="b2", now=NOW + 599).flow == DATAGRAMS
    assert large(stack, branch="b3", now=NOW + 600).flow == LISTENING
    assert not stack._without_stream


def test_a_large_request_that_was_cancelled_before_the_connection_was_refused_is_not_sent() -> None:
    stack = both_ways()
    large(stack)
    stack.cancel(client_id("b1", "INVITE"), NOW)
    (failed,) = stack.flow_failed(LISTENING, NOW)
    assert isinstance(failed, TransactionFailed)
    assert_nothing_left(stack)


def test_a_restored_large_request_still_goes_by_udp_when_the_connection_is_refused() -> None:
    stack, successor = both_ways(), both_ways()
    large(stack)
    (saved,) = stack.save([client_id("b1", "INVITE")])
    successor.restore(saved, NOW)
    assert sent(successor.flow_failed(LISTENING, NOW)).flow == DATAGRAMS
