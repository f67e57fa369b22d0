"""SipStack over the death of its process: every machine in every state goes on in another, as if it had not died.

Each state is reached in one stack; a second one, whose clock counts from elsewhere, is given what was saved of it. From
then on both must do the same at the same time, whatever comes.
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from control.sip.message import build_response
from control.sip.snapshot import restore, save
from control.sip.stack import Output, RequestReceived, SipStack, TransactionFailed, Transmit, client_id
from control.sip.transaction import MACHINES, SavedTransaction, State, Timers, TransactionId
from tests.harness.messages import OURS, flow, outgoing_request, request_bytes, request_of, response_of, response_to

NOW, DIED_AFTER_S, OFFSET_S = 1000.0, 0.25, -960.0


def make_stack() -> SipStack:
    tokens = (f"token-{number}" for number in itertools.count(1))
    return SipStack(advertised=lambda _: OURS, new_token=tokens.__next__, timers=Timers(), server_name="pbx")


Act = Callable[[SipStack, float], list[Output]]
"""What happens to a stack at a time; where the stack has died, `now` is by the clock of the other."""


def requested(method: str) -> Act:
    return lambda stack, now: stack.receive(request_bytes(method), flow(), now)


def answered(method: str, status: int) -> Act:
    def act(stack: SipStack, now: float) -> list[Output]:
        request = request_of(request_bytes(method))
        transaction = TransactionId("z9hG4bK-1", "192.0.2.10:5060", method)
        return stack.respond(transaction, build_response(request, status, to_tag="ours"), now)

    return act


def acknowledged(stack: SipStack, now: float) -> list[Output]:
    return stack.receive(request_bytes("ACK", to="<sip:1002@example.test>;tag=ours"), flow(), now)


def sent(method: str) -> Act:
    return lambda stack, now: stack.send_request(outgoing_request(method), flow(), "b1", now)


def replied(method: str, status: int) -> Act:
    def act(stack: SipStack, now: float) -> list[Output]:
        sent_first = "INVITE" if method == "CANCEL" else method
        (transmit, *_) = make_stack().send_request(outgoing_request(sent_first), flow(), "b1", NOW)
        assert isinstance(transmit, Transmit)
        response = response_to(transmit.data, status)
        response.headers.set("CSeq", f"1 {method}")
        return stack.receive(response.encode(), flow(), now)

    return act


def given_up(stack: SipStack, now: float) -> list[Output]:
    return stack.cancel(client_id("b1", "INVITE"), now)


@dataclass(frozen=True)
class Case:
    """The way to a state."""

    machine: str
    state: State
    way: tuple[Act, ...]


CASES = [
    Case("ict", State.CALLING, (sent("INVITE"),)),
    Case("ict", State.PROCEEDING, (sent("INVITE"), replied("INVITE", 180))),
    Case("ict", State.WITHDRAWN, (sent("INVITE"), given_up)),
    Case("ict", State.CANCELLING, (sent("INVITE"), replied("INVITE", 180), given_up)),
    Case("ict", State.COMPLETED, (sent("INVITE"), replied("INVITE", 486))),
    Case("ict", State.ACCEPTED, (sent("INVITE"), replied("INVITE", 200))),
    Case("nict", State.TRYING, (sent("BYE"),)),
    Case("nict", State.PROCEEDING, (sent("BYE"), replied("BYE", 100))),
    Case("nict", State.COMPLETED, (sent("BYE"), replied("BYE", 200))),
    Case("ist", State.PROCEEDING, (requested("INVITE"),)),
    Case("ist", State.COMPLETED, (requested("INVITE"), answered("INVITE", 486))),
    Case("ist", State.CONFIRMED, (requested("INVITE"), answered("INVITE", 486), acknowledged)),
    Case("ist", State.ACCEPTED, (requested("INVITE"), answered("INVITE", 200))),
    Case("nist", State.TRYING, (requested("BYE"),)),
    Case("nist", State.PROCEEDING, (requested("BYE"), answered("BYE", 100))),
    Case("nist", State.COMPLETED, (requested("BYE"), answered("BYE", 200))),
]
EVENTS: dict[str, dict[str, Act]] = {
    "ict": {
        "180": replied("INVITE", 180),
        "200": replied("INVITE", 200),
        "486": replied("INVITE", 486),
        "200 to CANCEL": replied("CANCEL", 200),
        "give up": given_up,
    },
    "nict": {"100": replied("BYE", 100), "200": replied("BYE", 200), "481": replied("BYE", 481)},
    "ist": {
        "the INVITE again": requested("INVITE"),
        "the INVITE on another path": lambda stack, now: stack.receive(
            request_bytes("INVITE", branch="z9hG4bK-other"), flow(), now
        ),
        "CANCEL": requested("CANCEL"),
        "ACK": acknowledged,
        "answer 180": answered("INVITE", 180),
        "answer 200": answered("INVITE", 200),
        "answer 486": answered("INVITE", 486),
    },
    "nist": {"the BYE again": requested("BYE"), "answer 200": answered("BYE", 200)},
}
OF_STATE = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.machine}-{case.state.value}")


def living(case: Case) -> SipStack:
    """A stack with a transaction in that state."""
    stack = make_stack()
    for act in case.way:
        act(stack, NOW)
    return stack


def reborn(stack: SipStack, offset_s: float = OFFSET_S) -> SipStack:
    """Another that has all transactions of the first, as JSON brought them."""
    successor = make_stack()
    for saved in stack.save([*stack._clients, *stack._servers]):
        plain = json.loads(json.dumps(save(saved)))
        again = restore(SavedTransaction, plain, offset_s=offset_s, callables={})
        successor.restore(again, NOW + DIED_AFTER_S + offset_s)
    return successor


def tokens_aside(outputs: list[Output]) -> list[object]:
    """Outputs without the tags that were made of chance."""
    return [
        (output.flow, output.label, output.transaction, output.data.partition(b";tag=token-")[0])
        if isinstance(output, Transmit)
        else (output.transaction, output.request.encode())
        if isinstance(output, RequestReceived)
        else output
        for output in outputs
    ]


def future(stack: SipStack, offset_s: float) -> list[tuple[float, list[object]]]:
    """Everything that a stack does until it has nothing left to do, by the clock of the first one."""
    done = []
    while (deadline := stack.next_deadline()) is not None:
        done.append((round(deadline - offset_s, 6), tokens_aside(stack.handle_timer(deadline))))
    return done


def test_every_state_that_a_transaction_can_live_in_is_here() -> None:
    lived_in = {(machine.name, state) for machine in MACHINES for state in machine.table}
    assert {(case.machine, case.state) for case in CASES} == lived_in


@OF_STATE
def test_the_way_leads_to_its_state(case: Case) -> None:
    stack = living(case)
    states = [
        transaction.state
        for transaction in [*stack._clients.values(), *stack._servers.values()]
        if transaction.machine.name == case.machine and transaction.id.method != "CANCEL"
    ]
    assert states == [case.state]


@OF_STATE
def test_timers_go_on_with_the_time_that_they_had_left(case: Case) -> None:
    stack = living(case)
    successor = reborn(stack)
    assert successor.counts() == stack.counts()
    assert future(successor, OFFSET_S) == future(stack, 0.0)
    assert successor.counts() == stack.counts()


@pytest.mark.parametrize(
    ("case", "event"),
    [
        pytest.param(case, event, id=f"{case.machine}-{case.state.value}-{name}")
        for case in CASES
        for name, event in EVENTS[case.machine].items()
    ],
)
def test_whatever_comes_next_is_taken_as_if_nobody_had_died(case: Case, event: Act) -> None:
    stack = living(case)
    successor = reborn(stack)
    at = NOW + DIED_AFTER_S
    assert tokens_aside(event(successor, at + OFFSET_S)) == tokens_aside(event(stack, at))
    assert successor.counts() == stack.counts()
    assert future(successor, OFFSET_S) == future(stack, 0.0)


@OF_STATE
def test_a_stack_that_dies_twice_has_forgotten_nothing(case: Case) -> None:
    stack = living(case)
    twice = reborn(reborn(stack), -OFFSET_S)
    assert future(twice, 0.0) == future(stack, 0.0)


def test_what_was_due_while_nobody_lived_is_done_once_and_at_once() -> None:
    stack = living(Case("ict", State.CALLING, (sent("INVITE"),)))
    slept_s = 5.0
    successor = reborn(stack, OFFSET_S)
    wakes_at = NOW + slept_s + OFFSET_S
    (again,) = successor.handle_timer(wakes_at)
    assert isinstance(again, Transmit)
    assert again.label.retransmission
    assert successor.next_deadline() == wakes_at + 2 * Timers().t1


def test_a_transaction_that_would_have_failed_meanwhile_fails_when_it_is_back() -> None:
    stack = living(Case("nict", State.TRYING, (sent("BYE"),)))
    outputs = reborn(stack).handle_timer(NOW + 64 * Timers().t1 + OFFSET_S)
    assert any(isinstance(output, TransactionFailed) for output in outputs)


def test_a_repeated_request_is_absorbed_and_its_answer_given_again_without_asking_anybody() -> None:
    stack = living(Case("nist", State.COMPLETED, (requested("BYE"), answered("BYE", 200))))
    (again,) = requested("BYE")(reborn(stack), NOW + OFFSET_S)
    assert isinstance(again, Transmit)
    assert (response_of(again.data).status, response_of(again.data).to.tag) == (200, "ours")


def test_only_those_that_were_asked_for_and_live_are_saved() -> None:
    stack = living(Case("nist", State.TRYING, (requested("BYE"),)))
    sent("INVITE")(stack, NOW)
    over = TransactionId("z9hG4bK-over", "192.0.2.10:5060", "BYE")
    (saved,) = stack.save([client_id("b1", "INVITE"), over])
    assert saved.id == client_id("b1", "INVITE")
