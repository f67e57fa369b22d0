"""The transaction machines, row by row, against RFC 3261 figures 5 to 8 and RFC 6026."""

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.sip.address import Transport
from control.sip.transaction import (
    INVITE_CLIENT,
    INVITE_SERVER,
    MACHINES,
    NON_INVITE_CLIENT,
    NON_INVITE_SERVER,
    Action,
    ClientTransaction,
    Event,
    Machine,
    ServerTransaction,
    Span,
    State,
    Timers,
    Transaction,
    TransactionId,
    response_event,
)
from tests.harness.messages import flow, outgoing_request

TIMERS = Timers(t1=0.5, t2=4.0, t4=5.0)
START = 1000.0
IDS = [machine.name for machine in MACHINES]

ROWS = [
    # machine, state, event, next state, actions: written from the figures, not from the tables
    # figure 5, RFC 6026 section 7.2, section 9.1
    ("ict", "calling", "timer-a", "calling", "resend"),
    ("ict", "calling", "timer-b", "terminated", "report-timeout"),
    ("ict", "calling", "transport-error", "terminated", "report-transport-error"),
    ("ict", "calling", "1xx", "proceeding", "deliver"),
    ("ict", "calling", "2xx", "accepted", "deliver"),
    ("ict", "calling", "3xx-6xx", "completed", "send-ack deliver"),
    ("ict", "calling", "cancel", "withdrawn", ""),
    ("ict", "proceeding", "1xx", "proceeding", "deliver"),
    ("ict", "proceeding", "2xx", "accepted", "deliver"),
    ("ict", "proceeding", "3xx-6xx", "completed", "send-ack deliver"),
    ("ict", "proceeding", "cancel", "cancelling", "send-cancel"),
    ("ict", "withdrawn", "timer-a", "withdrawn", "resend"),
    ("ict", "withdrawn", "timer-b", "terminated", "report-timeout"),
    ("ict", "withdrawn", "transport-error", "terminated", "report-transport-error"),
    ("ict", "withdrawn", "1xx", "cancelling", "send-cancel deliver"),
    ("ict", "withdrawn", "2xx", "accepted", "deliver"),
    ("ict", "withdrawn", "3xx-6xx", "completed", "send-ack deliver"),
    ("ict", "cancelling", "timer-cancelled", "terminated", "report-timeout"),
    ("ict", "cancelling", "1xx", "cancelling", "deliver"),
    ("ict", "cancelling", "2xx", "accepted", "deliver"),
    ("ict", "cancelling", "3xx-6xx", "completed", "send-ack deliver"),
    ("ict", "completed", "3xx-6xx", "completed", "resend"),
    ("ict", "completed", "transport-error", "terminated", "report-transport-error"),
    ("ict", "completed", "timer-d", "terminated", ""),
    ("ict", "accepted", "2xx", "accepted", "deliver"),
    ("ict", "accepted", "timer-m", "terminated", ""),
    # figure 6
    ("nict", "trying", "timer-e", "trying", "resend"),
    ("nict", "trying", "timer-f", "terminated", "report-timeout"),
    ("nict", "trying", "transport-error", "terminated", "report-transport-error"),
    ("nict", "trying", "1xx", "proceeding", "deliver"),
    ("nict", "trying", "2xx", "completed", "deliver"),
    ("nict", "trying", "3xx-6xx", "completed", "deliver"),
    ("nict", "proceeding", "timer-e", "proceeding", "resend"),
    ("nict", "proceeding", "timer-f", "terminated", "report-timeout"),
    ("nict", "proceeding", "transport-error", "terminated", "report-transport-error"),
    ("nict", "proceeding", "1xx", "proceeding", "deliver"),
    ("nict", "proceeding", "2xx", "completed", "deliver"),
    ("nict", "proceeding", "3xx-6xx", "completed", "deliver"),
    ("nict", "completed", "timer-k", "terminated", ""),
    # figure 7, RFC 6026 section 7.1
    ("ist", "proceeding", "request", "proceeding", "resend"),
    ("ist", "proceeding", "1xx", "proceeding", "send"),
    ("ist", "proceeding", "2xx", "accepted", "send"),
    ("ist", "proceeding", "3xx-6xx", "completed", "send"),
    ("ist", "proceeding", "transport-error", "proceeding", "report-transport-error"),
    ("ist", "proceeding", "cancel", "proceeding", "deliver"),
    ("ist", "completed", "request", "completed", "resend"),
    ("ist", "completed", "timer-g", "completed", "resend"),
    ("ist", "completed", "timer-h", "terminated", ""),
    ("ist", "completed", "transport-error", "completed", "report-transport-error"),
    ("ist", "completed", "ack", "confirmed", ""),
    ("ist", "confirmed", "timer-i", "terminated", ""),
    ("ist", "accepted", "2xx", "accepted", "send-again"),
    ("ist", "accepted", "ack", "accepted", "deliver"),
    ("ist", "accepted", "transport-error", "accepted", "report-transport-error"),
    ("ist", "accepted", "timer-l", "terminated", ""),
    # figure 8
    ("nist", "trying", "1xx", "proceeding", "send"),
    ("nist", "trying", "2xx", "completed", "send"),
    ("nist", "trying", "3xx-6xx", "completed", "send"),
    ("nist", "proceeding", "request", "proceeding", "resend"),
    ("nist", "proceeding", "1xx", "proceeding", "send"),
    ("nist", "proceeding", "2xx", "completed", "send"),
    ("nist", "proceeding", "3xx-6xx", "completed", "send"),
    ("nist", "proceeding", "transport-error", "terminated", "report-transport-error"),
    ("nist", "completed", "request", "completed", "resend"),
    ("nist", "completed", "transport-error", "terminated", "report-transport-error"),
    ("nist", "completed", "timer-j", "terminated", ""),
]

# What each machine ignores on purpose, beside the events that cannot reach it: its own decisions, one by one.
IGNORED = {
    "ict": {
        "proceeding": {"transport-error"},  # nothing is sent in this state
        "withdrawn": {"cancel"},
        "cancelling": {"cancel", "transport-error"},  # the CANCEL is a transaction of its own
        "completed": {"1xx", "2xx", "cancel"},  # late, or of a branch that lost: the final response stands
        "accepted": {"1xx", "3xx-6xx", "cancel", "transport-error"},
        "calling": set(),
    },
    "nict": {
        "trying": {"cancel"},  # section 9.1: only INVITE is cancelled
        "proceeding": {"cancel"},
        "completed": {"1xx", "2xx", "3xx-6xx", "cancel", "transport-error"},  # retransmitted responses are absorbed
    },
    "ist": {
        "proceeding": {"ack"},  # nothing to acknowledge yet
        "completed": {"1xx", "2xx", "3xx-6xx", "cancel"},  # the first final response stands
        "confirmed": {"request", "ack", "1xx", "2xx", "3xx-6xx", "cancel", "transport-error"},
        "accepted": {"request", "1xx", "3xx-6xx", "cancel"},  # RFC 6026: retransmitted INVITEs are absorbed
    },
    "nist": {
        "trying": {"request", "ack", "cancel", "transport-error"},  # figure 8: nothing was sent that could be repeated
        "proceeding": {"ack", "cancel"},
        "completed": {"1xx", "2xx", "3xx-6xx", "ack", "cancel"},
    },
}
FROM_OUTSIDE = {
    "ict": {"1xx", "2xx", "3xx-6xx", "cancel", "transport-error"},
    "nict": {"1xx", "2xx", "3xx-6xx", "cancel", "transport-error"},
    "ist": {"request", "ack", "cancel", "1xx", "2xx", "3xx-6xx", "transport-error"},
    "nist": {"request", "ack", "cancel", "1xx", "2xx", "3xx-6xx", "transport-error"},
}
TIMERS_OF = {
    ("ict", "calling"): {"timer-a": 0.5, "timer-b": 32.0},
    ("ict", "cancelling"): {"timer-cancelled": 32.0},
    ("ict", "completed"): {"timer-d": 32.0},
    ("ict", "accepted"): {"timer-m": 32.0},
    ("nict", "trying"): {"timer-e": 0.5, "timer-f": 32.0},
    ("nict", "completed"): {"timer-k": 5.0},
    ("ist", "completed"): {"timer-g": 0.5, "timer-h": 32.0},
    ("ist", "confirmed"): {"timer-i": 5.0},
    ("ist", "accepted"): {"timer-l": 32.0},
    ("nist", "completed"): {"timer-j": 32.0},
}


def start(machine: Machine, now: float = START) -> Transaction:
    method = "INVITE" if machine in {INVITE_CLIENT, INVITE_SERVER} else "OPTIONS"
    if machine in {INVITE_CLIENT, NON_INVITE_CLIENT}:
        request = outgoing_request(method)
        return ClientTransaction(request, TransactionId("z9hG4bK1", "", method), flow(), TIMERS, now)
    return ServerTransaction(None, TransactionId("z9hG4bK1", "192.0.2.10:5060", method), flow(), TIMERS, now)


def in_state(machine: Machine, state: State) -> Transaction:
    """A transaction that walked to `state` over the shortest way."""
    ways: list[list[Event]] = [[]]
    while ways:
        way = ways.pop(0)
        transaction = start(machine)
        for event in way:
            transaction.receive(event, START)
        if transaction.state is state:
            return transaction
        if len(way) < 3:
            ways += [[*way, event] for event in machine.table.get(transaction.state, {}) if "timer" not in event]
    raise AssertionError(f"{machine.name} never gets {state}")


def machine_of(name: str) -> Machine:
    return next(machine for machine in MACHINES if machine.name == name)


def instants(machine: Machine, *events: Event, until: float) -> list[tuple[float, tuple[Action, ...]]]:
    """When timers did something after these events at time 0, in seconds since then."""
    transaction = start(machine)
    for event in events:
        transaction.receive(event, START)
    seen = []
    while (deadline := transaction.next_deadline()) is not None and deadline <= START + until:
        seen.append((deadline - START, tuple(transaction.handle_timer(deadline))))
    return seen


@pytest.mark.rfc("3261", "17")
@pytest.mark.rfc("6026", "7")
@pytest.mark.parametrize(("name", "state", "event", "next_state", "actions"), ROWS)
def test_each_row_leads_where_the_figure_says(name: str, state: str, event: str, next_state: str, actions: str) -> None:
    transaction = in_state(machine_of(name), State(state))
    if event.startswith("timer"):
        row = transaction.machine.table[State(state)][Event(event)]
        assert (row.state, row.actions) == (next_state, tuple(actions.split()))
    else:
        assert transaction.receive(Event(event), START) == tuple(actions.split())
        assert transaction.state == next_state


@pytest.mark.parametrize("machine", MACHINES, ids=IDS)
def test_every_state_decides_on_every_event(machine: Machine) -> None:
    rows = {(state, event) for name, state, event, _, _ in ROWS if name == machine.name}
    assert {(str(state), str(event)) for state, row in machine.table.items() for event in row} == rows
    states = set(machine.table)
    assert states == set(IGNORED[machine.name])
    for state, event in product(states, FROM_OUTSIDE[machine.name]):
        assert ((state, event) in rows) != (event in IGNORED[machine.name][state]), (state, event)


@pytest.mark.parametrize("machine", MACHINES, ids=IDS)
def test_ignored_events_change_nothing(machine: Machine) -> None:
    for state, event in product(machine.table, Event):
        if event in machine.table[state]:
            continue
        transaction = in_state(machine, state)
        deadline = transaction.next_deadline()
        assert transaction.receive(event, START + 0.25) == ()
        assert (transaction.state, transaction.next_deadline()) == (state, deadline)


@pytest.mark.parametrize("machine", MACHINES, ids=IDS)
def test_a_terminated_transaction_is_deaf_and_has_no_timer(machine: Machine) -> None:
    transaction = start(machine)
    final = Event.R3XX_6XX
    transaction.receive(final, START)
    if machine is INVITE_SERVER:
        transaction.receive(Event.ACK, START)
    transaction.handle_timer(START + 64)
    assert transaction.state is State.TERMINATED
    assert transaction.next_deadline() is None
    for event in Event:
        assert transaction.receive(event, START + 65) == ()
    assert transaction.handle_timer(START + 1000) == []


@pytest.mark.rfc("3261", "17")
@pytest.mark.parametrize("machine", MACHINES, ids=IDS)
def test_entering_a_state_starts_its_timers(machine: Machine) -> None:
    for state in machine.table:
        expected = TIMERS_OF.get((machine.name, state), {})
        spans = machine.enter.get(state, {})
        assert {str(event): TIMERS.span_s(span) for event, span in spans.items()} == expected
        if expected:
            assert in_state(machine, state).next_deadline() == START + min(expected.values())
    for state, timers in machine.enter.items():
        assert set(timers) <= set(machine.table[state]), "a timer that nobody waits for"


@pytest.mark.rfc("3261", "17.1.1.2")
def test_invite_is_sent_again_after_doubling_intervals_until_timer_b() -> None:
    assert instants(INVITE_CLIENT, until=100) == [
        *((after, (Action.RESEND,)) for after in (0.5, 1.5, 3.5, 7.5, 15.5, 31.5)),
        (32.0, (Action.REPORT_TIMEOUT,)),
    ]


@pytest.mark.rfc("3261", "17.1.1.2")
def test_a_provisional_response_stops_the_invite_and_its_timeout() -> None:
    assert instants(INVITE_CLIENT, Event.R1XX, until=10_000) == []


@pytest.mark.rfc("3261", "9.1")
def test_an_invite_withdrawn_before_any_response_keeps_its_timers() -> None:
    assert instants(INVITE_CLIENT, Event.CANCEL, until=100) == instants(INVITE_CLIENT, until=100)


@pytest.mark.rfc("3261", "9.1")
def test_a_cancelled_invite_without_final_response_is_given_up_after_64_t1() -> None:
    timeout = [(32.0, (Action.REPORT_TIMEOUT,))]
    assert instants(INVITE_CLIENT, Event.R1XX, Event.CANCEL, until=100) == timeout
    assert instants(INVITE_CLIENT, Event.CANCEL, Event.R1XX, Event.R1XX, until=100) == timeout


@pytest.mark.rfc("3261", "17.1.2.2")
def test_a_request_is_sent_again_at_intervals_capped_by_t2_until_timer_f() -> None:
    times = (0.5, 1.5, 3.5, 7.5, 11.5, 15.5, 19.5, 23.5, 27.5, 31.5)
    assert instants(NON_INVITE_CLIENT, until=100) == [
        *((after, (Action.RESEND,)) for after in times),
        (32.0, (Action.REPORT_TIMEOUT,)),
    ]


@pytest.mark.rfc("3261", "17.1.2.2")
def test_after_a_provisional_response_a_request_is_sent_again_every_t2() -> None:
    times = (0.5, 4.5, 8.5, 12.5, 16.5, 20.5, 24.5, 28.5)
    assert instants(NON_INVITE_CLIENT, Event.R1XX, until=100) == [
        *((after, (Action.RESEND,)) for after in times),
        (32.0, (Action.REPORT_TIMEOUT,)),
    ]


@pytest.mark.rfc("3261", "17.2.1")
def test_a_refusal_is_repeated_at_intervals_capped_by_t2_until_timer_h() -> None:
    times = (0.5, 1.5, 3.5, 7.5, 11.5, 15.5, 19.5, 23.5, 27.5, 31.5)
    assert instants(INVITE_SERVER, Event.R3XX_6XX, until=100) == [
        *((after, (Action.RESEND,)) for after in times),
        (32.0, ()),
    ]


@pytest.mark.rfc("3261", "17.2.1")
def test_the_ack_stops_the_refusal_and_timer_i_ends_the_transaction() -> None:
    assert instants(INVITE_SERVER, Event.R3XX_6XX, Event.ACK, until=100) == [(5.0, ())]


@pytest.mark.rfc("6026", "7.1")
@pytest.mark.rfc("6026", "7.2")
def test_accepted_lasts_64_t1_whatever_comes_meanwhile() -> None:
    assert instants(INVITE_SERVER, Event.R2XX, Event.R2XX, Event.ACK, Event.REQUEST, until=100) == [(32.0, ())]
    assert instants(INVITE_CLIENT, Event.R2XX, Event.R2XX, until=100) == [(32.0, ())]


def test_a_process_that_stood_still_repeats_once_and_not_in_a_burst() -> None:
    transaction = start(NON_INVITE_CLIENT)
    assert transaction.handle_timer(START + 20) == [Action.RESEND]
    assert transaction.next_deadline() == START + 21


def test_timers_that_fall_due_together_fire_in_their_order() -> None:
    transaction = start(INVITE_CLIENT)
    assert transaction.handle_timer(START + 40) == [Action.RESEND, Action.REPORT_TIMEOUT]
    assert transaction.state is State.TERMINATED


@pytest.mark.parametrize(
    ("status", "event"),
    [
        (100, Event.R1XX),
        (199, Event.R1XX),
        (200, Event.R2XX),
        (299, Event.R2XX),
        (300, Event.R3XX_6XX),
        (699, Event.R3XX_6XX),
    ],
)
def test_a_status_class_decides_the_event(status: int, event: Event) -> None:
    assert response_event(status) is event


def test_all_spans_scale_with_the_base_values() -> None:
    timers = Timers(t1=0.01, t2=0.08, t4=0.1)
    assert [timers.span_s(span) for span in (Span.T1, Span.T4, Span.T1_TIMES_64)] == [0.01, 0.1, 0.64]


def test_what_needs_a_message_stands_only_in_rows_of_events_that_have_one() -> None:
    responses = {Event.R1XX, Event.R2XX, Event.R3XX_6XX}
    needs = {
        Action.SEND: responses,
        Action.SEND_AGAIN: responses,
        Action.SEND_ACK: responses,
        Action.DELIVER: responses | {Event.ACK, Event.CANCEL},
    }
    for machine in MACHINES:
        is_client = machine in {INVITE_CLIENT, NON_INVITE_CLIENT}
        for rows in machine.table.values():
            for event, row in rows.items():
                for action in row.actions:
                    assert event in needs.get(action, set(Event))
                    assert is_client or action not in {Action.SEND_ACK, Action.SEND_CANCEL}


STEPS = st.lists(st.tuples(st.floats(0, 40), st.sampled_from([event for event in Event if "timer" not in event])))


@pytest.mark.parametrize("machine", MACHINES, ids=IDS)
@given(steps=STEPS)
def test_any_order_of_events_reports_at_most_one_end_and_terminates_after_a_final_response(
    machine: Machine, steps: list[tuple[float, Event]]
) -> None:
    transaction = start(machine)
    now = START
    seen: list[Action] = []
    entered: list[State] = [transaction.state]
    for wait, event in [*steps, (0.0, Event.R3XX_6XX)]:
        now += wait
        while (deadline := transaction.next_deadline()) is not None and deadline <= now:
            seen += transaction.handle_timer(deadline)
        seen += transaction.receive(event, now)
        if transaction.state is not entered[-1]:
            entered.append(transaction.state)
    while (deadline := transaction.next_deadline()) is not None:
        assert deadline <= now + 64 * TIMERS.t1
        seen += transaction.handle_timer(deadline)
    assert transaction.state is State.TERMINATED
    assert len(entered) == len(set(entered)), "a state was entered twice"
    assert seen.count(Action.REPORT_TIMEOUT) <= 1
    assert seen.count(Action.SEND_CANCEL) <= 1
    assert seen.count(Action.SEND_ACK) <= 1
    if machine in {INVITE_CLIENT, NON_INVITE_CLIENT}:
        assert seen.count(Action.REPORT_TIMEOUT) + seen.count(Action.REPORT_TRANSPORT_ERROR) <= 1


def test_the_machines_are_four() -> None:
    assert MACHINES == (INVITE_CLIENT, NON_INVITE_CLIENT, INVITE_SERVER, NON_INVITE_SERVER)


def over_a_connection(machine: Machine, *events: Event) -> Transaction:
    transaction = start(machine)
    connected = replace(transaction.flow, transport=Transport.TCP)
    if isinstance(transaction, ClientTransaction):
        transaction = ClientTransaction(transaction.request, transaction.id, connected, TIMERS, START)
    else:
        transaction = ServerTransaction(None, transaction.id, connected, TIMERS, START)
    for event in events:
        transaction.receive(event, START)
    return transaction


@pytest.mark.rfc("3261", "17")
@pytest.mark.parametrize(
    ("machine", "events", "deadlines"),
    [
        (INVITE_CLIENT, [], [32.0]),
        (INVITE_CLIENT, [Event.R3XX_6XX], []),
        (INVITE_CLIENT, [Event.R2XX], [32.0]),
        (NON_INVITE_CLIENT, [], [32.0]),
        (NON_INVITE_CLIENT, [Event.R1XX], [32.0]),
        (NON_INVITE_CLIENT, [Event.R2XX], []),
        (INVITE_SERVER, [Event.R3XX_6XX], [32.0]),
        (INVITE_SERVER, [Event.R3XX_6XX, Event.ACK], []),
        (INVITE_SERVER, [Event.R2XX], [32.0]),
        (NON_INVITE_SERVER, [Event.R2XX], []),
    ],
)
def test_over_a_connection_nothing_is_repeated_and_no_repetition_is_waited_for(
    machine: Machine, events: list[Event], deadlines: list[float]
) -> None:
    transaction = over_a_connection(machine, *events)
    seen = []
    while (deadline := transaction.next_deadline()) is not None:
        seen.append(deadline - START)
        assert Action.RESEND not in transaction.handle_timer(deadline)
    assert seen == deadlines
    assert transaction.state is State.TERMINATED
