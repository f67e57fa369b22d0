"""The four transaction machines as tables (RFC 3261 section 17, corrected by RFC 6026).

A `Transaction` knows its state and its running timers, nothing of messages: an `Event` goes in, `Action`s come out, and
the stack, which has the message at hand, performs them. Rows stand in the order of the RFC's figures.

Cancelling (section 9.1) is part of the INVITE client machine: two states of our own, WITHDRAWN and CANCELLING, hold a
CANCEL back until a provisional response came, and give up when no final response follows.

Over reliable transports timers A, E and G never run, and D, I, J and K are zero: the state that they guard is left as
soon as it is entered.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum, StrEnum
from typing import NamedTuple

from control.sip.address import Flow, Transport
from control.sip.message import Request
from control.sip.snapshot import Moment


class State(StrEnum):
    """States of all four machines."""

    CALLING = "calling"
    TRYING = "trying"
    PROCEEDING = "proceeding"
    WITHDRAWN = "withdrawn"  # cancelled by the transaction user before any provisional response
    CANCELLING = "cancelling"  # CANCEL was sent, the final response is awaited
    COMPLETED = "completed"
    ACCEPTED = "accepted"
    CONFIRMED = "confirmed"
    TERMINATED = "terminated"


class Event(StrEnum):
    """What a machine reacts to. Responses come from the wire to a client, from the transaction user to a server."""

    REQUEST = "request"  # a retransmission; the first one creates the server transaction
    ACK = "ack"
    CANCEL = "cancel"  # the transaction user's wish at a client, a CANCEL request at a server
    R1XX = "1xx"
    R2XX = "2xx"
    R3XX_6XX = "3xx-6xx"
    TRANSPORT_ERROR = "transport-error"
    TIMER_A = "timer-a"
    TIMER_B = "timer-b"
    TIMER_D = "timer-d"
    TIMER_E = "timer-e"
    TIMER_F = "timer-f"
    TIMER_G = "timer-g"
    TIMER_H = "timer-h"
    TIMER_I = "timer-i"
    TIMER_J = "timer-j"
    TIMER_K = "timer-k"
    TIMER_L = "timer-l"
    TIMER_M = "timer-m"
    TIMER_CANCELLED = "timer-cancelled"  # section 9.1 gives the interval, but no letter


class Action(StrEnum):
    """What the stack does for a machine."""

    SEND = "send"  # the response which the transaction user gave
    SEND_AGAIN = "send-again"  # the same, known to be a repetition
    RESEND = "resend"  # the message sent last
    SEND_ACK = "send-ack"  # build the ACK for a non-2xx final response
    SEND_CANCEL = "send-cancel"  # build the CANCEL and start its own transaction
    DELIVER = "deliver"  # the message at hand, to the transaction user
    REPORT_TIMEOUT = "report-timeout"
    REPORT_TRANSPORT_ERROR = "report-transport-error"


class Span(Enum):
    """How long a timer runs, in terms of the three base values."""

    T1 = "T1"
    T4 = "T4"
    T1_TIMES_64 = "64*T1"


class Restart(Enum):
    """The next interval of a timer that fired."""

    DOUBLED = "2*previous"
    DOUBLED_TO_T2 = "min(2*previous, T2)"
    AT_T2 = "T2"


@dataclass(frozen=True, slots=True)
class Timers:
    """Base values in seconds (RFC 3261 table 4): round trip, longest interval, life of a message in the network.

    Timer D is 64*T1 like its server's timer H, which is the 32 s of section 17.1.1.2 for the default T1.
    """

    t1: float = 0.5
    t2: float = 4.0
    t4: float = 5.0

    def span_s(self, span: Span) -> float:
        """Seconds of a span."""
        if span is Span.T1:
            return self.t1
        return self.t4 if span is Span.T4 else 64 * self.t1

    def restart_s(self, restart: Restart, previous_s: float) -> float:
        """Seconds until a timer fires again whose last interval was `previous_s`."""
        if restart is Restart.DOUBLED:
            return 2 * previous_s
        return min(2 * previous_s, self.t2) if restart is Restart.DOUBLED_TO_T2 else self.t2


class Row(NamedTuple):
    """One transition: the next state, what to do, and whether the timer that fired starts anew."""

    state: State
    actions: tuple[Action, ...] = ()
    restart: Restart | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Machine:
    """A kind of transaction: its table and the timers which start when a state is entered from another one.

    An absent row means: ignore. A running timer for which the state entered has no row is stopped by entering it.
    """

    name: str
    initial: State
    table: Mapping[State, Mapping[Event, Row]]
    enter: Mapping[State, Mapping[Event, Span]]


# RFC 3261 figure 5 with RFC 6026 section 7.2 (Accepted, timer M) and the cancelling of section 9.1.
INVITE_CLIENT = Machine(
    name="ict",
    initial=State.CALLING,
    table={
        State.CALLING: {
            Event.TIMER_A: Row(State.CALLING, (Action.RESEND,), Restart.DOUBLED),
            Event.TIMER_B: Row(State.TERMINATED, (Action.REPORT_TIMEOUT,)),
            Event.TRANSPORT_ERROR: Row(State.TERMINATED, (Action.REPORT_TRANSPORT_ERROR,)),
            Event.R1XX: Row(State.PROCEEDING, (Action.DELIVER,)),
            Event.R2XX: Row(State.ACCEPTED, (Action.DELIVER,)),
            Event.R3XX_6XX: Row(State.COMPLETED, (Action.SEND_ACK, Action.DELIVER)),
            Event.CANCEL: Row(State.WITHDRAWN),
        },
        State.PROCEEDING: {
            Event.R1XX: Row(State.PROCEEDING, (Action.DELIVER,)),
            Event.R2XX: Row(State.ACCEPTED, (Action.DELIVER,)),
            Event.R3XX_6XX: Row(State.COMPLETED, (Action.SEND_ACK, Action.DELIVER)),
            Event.CANCEL: Row(State.CANCELLING, (Action.SEND_CANCEL,)),
        },
        State.WITHDRAWN: {
            Event.TIMER_A: Row(State.WITHDRAWN, (Action.RESEND,), Restart.DOUBLED),
            Event.TIMER_B: Row(State.TERMINATED, (Action.REPORT_TIMEOUT,)),
            Event.TRANSPORT_ERROR: Row(State.TERMINATED, (Action.REPORT_TRANSPORT_ERROR,)),
            Event.R1XX: Row(State.CANCELLING, (Action.SEND_CANCEL, Action.DELIVER)),
            Event.R2XX: Row(State.ACCEPTED, (Action.DELIVER,)),
            Event.R3XX_6XX: Row(State.COMPLETED, (Action.SEND_ACK, Action.DELIVER)),
        },
        State.CANCELLING: {
            Event.TIMER_CANCELLED: Row(State.TERMINATED, (Action.REPORT_TIMEOUT,)),
            Event.R1XX: Row(State.CANCELLING, (Action.DELIVER,)),
            Event.R2XX: Row(State.ACCEPTED, (Action.DELIVER,)),
            Event.R3XX_6XX: Row(State.COMPLETED, (Action.SEND_ACK, Action.DELIVER)),
        },
        State.COMPLETED: {
            Event.R3XX_6XX: Row(State.COMPLETED, (Action.RESEND,)),
            Event.TRANSPORT_ERROR: Row(State.TERMINATED, (Action.REPORT_TRANSPORT_ERROR,)),
            Event.TIMER_D: Row(State.TERMINATED),
        },
        State.ACCEPTED: {
            Event.R2XX: Row(State.ACCEPTED, (Action.DELIVER,)),
            Event.TIMER_M: Row(State.TERMINATED),
        },
    },
    enter={
        State.CALLING: {Event.TIMER_A: Span.T1, Event.TIMER_B: Span.T1_TIMES_64},
        State.CANCELLING: {Event.TIMER_CANCELLED: Span.T1_TIMES_64},
        State.COMPLETED: {Event.TIMER_D: Span.T1_TIMES_64},
        State.ACCEPTED: {Event.TIMER_M: Span.T1_TIMES_64},
    },
)

# RFC 3261 figure 6.
NON_INVITE_CLIENT = Machine(
    name="nict",
    initial=State.TRYING,
    table={
        State.TRYING: {
            Event.TIMER_E: Row(State.TRYING, (Action.RESEND,), Restart.DOUBLED_TO_T2),
            Event.TIMER_F: Row(State.TERMINATED, (Action.REPORT_TIMEOUT,)),
            Event.TRANSPORT_ERROR: Row(State.TERMINATED, (Action.REPORT_TRANSPORT_ERROR,)),
            Event.R1XX: Row(State.PROCEEDING, (Action.DELIVER,)),
            Event.R2XX: Row(State.COMPLETED, (Action.DELIVER,)),
            Event.R3XX_6XX: Row(State.COMPLETED, (Action.DELIVER,)),
        },
        State.PROCEEDING: {
            Event.TIMER_E: Row(State.PROCEEDING, (Action.RESEND,), Restart.AT_T2),
            Event.TIMER_F: Row(State.TERMINATED, (Action.REPORT_TIMEOUT,)),
            Event.TRANSPORT_ERROR: Row(State.TERMINATED, (Action.REPORT_TRANSPORT_ERROR,)),
            Event.R1XX: Row(State.PROCEEDING, (Action.DELIVER,)),
            Event.R2XX: Row(State.COMPLETED, (Action.DELIVER,)),
            Event.R3XX_6XX: Row(State.COMPLETED, (Action.DELIVER,)),
        },
        State.COMPLETED: {
            Event.TIMER_K: Row(State.TERMINATED),
        },
    },
    enter={
        State.TRYING: {Event.TIMER_E: Span.T1, Event.TIMER_F: Span.T1_TIMES_64},
        State.COMPLETED: {Event.TIMER_K: Span.T4},
    },
)

# RFC 3261 figure 7 with RFC 6026 section 7.1 (Accepted, timer L; a transport error is told, but changes no state).
# Timer H ends the transaction in silence, although section 17.2.1 wants the transaction user told: it has refused the
# INVITE already, so that nothing is left for it to do.
INVITE_SERVER = Machine(
    name="ist",
    initial=State.PROCEEDING,
    table={
        State.PROCEEDING: {
            Event.REQUEST: Row(State.PROCEEDING, (Action.RESEND,)),
            Event.R1XX: Row(State.PROCEEDING, (Action.SEND,)),
            Event.TRANSPORT_ERROR: Row(State.PROCEEDING, (Action.REPORT_TRANSPORT_ERROR,)),
            Event.R2XX: Row(State.ACCEPTED, (Action.SEND,)),
            Event.R3XX_6XX: Row(State.COMPLETED, (Action.SEND,)),
            Event.CANCEL: Row(State.PROCEEDING, (Action.DELIVER,)),
        },
        State.COMPLETED: {
            Event.REQUEST: Row(State.COMPLETED, (Action.RESEND,)),
            Event.TIMER_G: Row(State.COMPLETED, (Action.RESEND,), Restart.DOUBLED_TO_T2),
            Event.TRANSPORT_ERROR: Row(State.COMPLETED, (Action.REPORT_TRANSPORT_ERROR,)),
            Event.ACK: Row(State.CONFIRMED),
            Event.TIMER_H: Row(State.TERMINATED),
        },
        State.CONFIRMED: {
            Event.TIMER_I: Row(State.TERMINATED),
        },
        State.ACCEPTED: {
            Event.R2XX: Row(State.ACCEPTED, (Action.SEND_AGAIN,)),
            Event.ACK: Row(State.ACCEPTED, (Action.DELIVER,)),
            Event.TRANSPORT_ERROR: Row(State.ACCEPTED, (Action.REPORT_TRANSPORT_ERROR,)),
            Event.TIMER_L: Row(State.TERMINATED),
        },
    },
    enter={
        State.COMPLETED: {Event.TIMER_G: Span.T1, Event.TIMER_H: Span.T1_TIMES_64},
        State.CONFIRMED: {Event.TIMER_I: Span.T4},
        State.ACCEPTED: {Event.TIMER_L: Span.T1_TIMES_64},
    },
)

# RFC 3261 figure 8.
NON_INVITE_SERVER = Machine(
    name="nist",
    initial=State.TRYING,
    table={
        State.TRYING: {
            Event.R1XX: Row(State.PROCEEDING, (Action.SEND,)),
            Event.R2XX: Row(State.COMPLETED, (Action.SEND,)),
            Event.R3XX_6XX: Row(State.COMPLETED, (Action.SEND,)),
        },
        State.PROCEEDING: {
            Event.REQUEST: Row(State.PROCEEDING, (Action.RESEND,)),
            Event.R1XX: Row(State.PROCEEDING, (Action.SEND,)),
            Event.R2XX: Row(State.COMPLETED, (Action.SEND,)),
            Event.R3XX_6XX: Row(State.COMPLETED, (Action.SEND,)),
            Event.TRANSPORT_ERROR: Row(State.TERMINATED, (Action.REPORT_TRANSPORT_ERROR,)),
        },
        State.COMPLETED: {
            Event.REQUEST: Row(State.COMPLETED, (Action.RESEND,)),
            Event.TRANSPORT_ERROR: Row(State.TERMINATED, (Action.REPORT_TRANSPORT_ERROR,)),
            Event.TIMER_J: Row(State.TERMINATED),
        },
    },
    enter={
        State.COMPLETED: {Event.TIMER_J: Span.T1_TIMES_64},
    },
)

# Timers of repetitions, and those of the time in which repetitions of the peer may come: with reliable transports there
# are none (RFC 3261 table 4). L and M are not among these: forking makes several 2xx (RFC 6026 section 7).
_OF_REPETITION = frozenset({Event.TIMER_A, Event.TIMER_E, Event.TIMER_G})
_OF_ABSORPTION = frozenset({Event.TIMER_D, Event.TIMER_I, Event.TIMER_J, Event.TIMER_K})

MACHINES = (INVITE_CLIENT, NON_INVITE_CLIENT, INVITE_SERVER, NON_INVITE_SERVER)


def response_event(status: int) -> Event:
    """The event which a response of this status is."""
    if status >= 300:
        return Event.R3XX_6XX
    return Event.R2XX if status >= 200 else Event.R1XX


@dataclass(frozen=True, slots=True)
class TransactionId:
    """What identifies a transaction: top Via branch, sent-by and method (RFC 3261 sections 17.1.3 and 17.2.3).

    `sent_by` is empty for client transactions, whose branch is of our making.
    """

    branch: str
    sent_by: str
    method: str


class _Timer(NamedTuple):
    deadline: float
    event: Event
    interval_s: float


@dataclass(frozen=True, slots=True)
class SavedTransaction:
    """A running transaction as plain data (control.sip.snapshot).

    `merge_key` is a server's, `request` and `instead_of` are a client's.
    """

    id: TransactionId
    flow: Flow
    state: State
    last_sent: bytes
    last_status: int | None
    running: tuple[tuple[Moment, Event, float], ...]
    request: Request | None = None
    merge_key: tuple[str, str, str] | None = None
    instead_of: Flow | None = None


class Transaction:
    """One running machine with its timers. Subclasses add what client and server must remember."""

    __slots__ = ("_timers", "flow", "id", "last_sent", "last_status", "machine", "scheduled_at", "state", "timers")

    def __init__(self, machine: Machine, transaction_id: TransactionId, flow: Flow, timers: Timers, now: float) -> None:
        self.machine = machine
        self.id = transaction_id
        self.flow = flow
        self.timers = timers
        self.state = machine.initial
        self.last_sent = b""  # kept for retransmissions
        self.last_status: int | None = None
        self.scheduled_at = float("inf")  # when the stack will look at this transaction next
        self._timers: list[_Timer] = []
        self._start_timers(now)

    def receive(self, event: Event, now: float) -> tuple[Action, ...]:
        """Take one transition and return the actions of its row, none if there is no row."""
        rows = self.machine.table.get(self.state)
        row = rows.get(event) if rows else None
        if row is None:
            return ()
        if row.state is not self.state:
            self._enter(row.state, now)
        return row.actions

    def handle_timer(self, now: float) -> list[Action]:
        """Fire, in order, every timer whose deadline is not after `now`.

        A timer that starts anew counts from `now`, so that a process which stood still does not send a burst.
        """
        actions: list[Action] = []
        while self._timers and self._timers[0].deadline <= now:
            timer = self._timers.pop(0)
            row = self.machine.table[self.state][timer.event]
            if row.restart is not None:
                interval_s = self.timers.restart_s(row.restart, timer.interval_s)
                self._timers.append(_Timer(now + interval_s, timer.event, interval_s))
                self._timers.sort()
            if row.state is not self.state:
                self._enter(row.state, now)
            actions += row.actions
        return actions

    def next_deadline(self) -> float | None:
        """When `handle_timer` wants to be called."""
        return self._timers[0].deadline if self._timers else None

    def save(self) -> SavedTransaction:
        """Everything that `restore` needs to go on in another process."""
        running = tuple((timer.deadline, timer.event, timer.interval_s) for timer in self._timers)
        return SavedTransaction(self.id, self.flow, self.state, self.last_sent, self.last_status, running)

    def restore(self, saved: SavedTransaction) -> None:
        """Take the place of the transaction that was saved."""
        self.state = saved.state
        self.last_sent = saved.last_sent
        self.last_status = saved.last_status
        self._timers = sorted(_Timer(*timer) for timer in saved.running)

    def _enter(self, state: State, now: float) -> None:
        self.state = state
        if self._timers:
            rows = self.machine.table.get(state, {})
            self._timers = [timer for timer in self._timers if timer.event in rows]
        self._start_timers(now)

    def _start_timers(self, now: float) -> None:
        is_reliable = self.flow.transport is not Transport.UDP
        for event, span in self.machine.enter.get(self.state, {}).items():
            if is_reliable and event in _OF_REPETITION:
                continue
            if is_reliable and event in _OF_ABSORPTION:
                self.state = self.machine.table[self.state][event].state
                self._timers.clear()
                return
            interval_s = self.timers.span_s(span)
            self._timers.append(_Timer(now + interval_s, event, interval_s))
        self._timers.sort()


class ClientTransaction(Transaction):
    """A client transaction and its request, from which ACK and CANCEL are built.

    `instead_of` is the flow that was meant, where a connection is tried because of the request's size.
    """

    __slots__ = ("instead_of", "request")

    def __init__(
        self,
        request: Request,
        transaction_id: TransactionId,
        flow: Flow,
        timers: Timers,
        now: float,
        *,
        instead_of: Flow | None = None,
    ) -> None:
        machine = INVITE_CLIENT if transaction_id.method == "INVITE" else NON_INVITE_CLIENT
        super().__init__(machine, transaction_id, flow, timers, now)
        self.request = request
        self.instead_of = instead_of

    def save(self) -> SavedTransaction:
        """As every transaction, with its request."""
        return replace(super().save(), request=self.request, instead_of=self.instead_of)


class ServerTransaction(Transaction):
    """A server transaction; `merge_key` finds the same request on another path (RFC 3261 section 8.2.2.2)."""

    __slots__ = ("merge_key",)

    def __init__(
        self,
        merge_key: tuple[str, str, str] | None,
        transaction_id: TransactionId,
        flow: Flow,
        timers: Timers,
        now: float,
    ) -> None:
        machine = INVITE_SERVER if transaction_id.method == "INVITE" else NON_INVITE_SERVER
        super().__init__(machine, transaction_id, flow, timers, now)
        self.merge_key = merge_key

    def save(self) -> SavedTransaction:
        """As every transaction, with what finds the same request on another path."""
        return replace(super().save(), merge_key=self.merge_key)
