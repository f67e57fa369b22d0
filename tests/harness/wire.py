"""A network in virtual time: joins pure machines and decides of each datagram whether, when and how often it arrives.

A machine has the shape of all in the core: `receive(data, flow, now)`, `handle_timer(now)`, `next_deadline()`.
Its user is called with every output that is not for the wire and returns the outputs of what it did about it.
"""

import heapq
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from hypothesis import strategies as st

from control.sip.address import Address, Flow, Transport
from control.sip.stack import Output, Transmit

Fate = tuple[float, ...]  # delays in seconds, one for each copy that arrives: () is lost, two are a duplicate
Schedule = Iterator[Fate]

LATENCY_S = 0.01


class WireMachine(Protocol):
    """What can be attached to a wire."""

    def receive(self, data: bytes, flow: Flow, now: float) -> list[Output]: ...

    def handle_timer(self, now: float) -> list[Output]: ...

    def next_deadline(self) -> float | None: ...


User = Callable[[Output, float], Sequence[Output]]


def perfect() -> Schedule:
    """Each datagram arrives once, in order."""
    return itertools.repeat((LATENCY_S,))


def scripted(fates: Sequence[Fate]) -> Schedule:
    """The given fates, one for each datagram in the order of sending, then a perfect network."""
    return itertools.chain(fates, perfect())


def seeded(seed: int, *, loss: float = 0.2, duplication: float = 0.1, longest_delay_s: float = 1.0) -> Schedule:
    """Endless random fates that are the same for the same seed."""
    lots = random.Random(seed)
    while True:
        copies = 0 if lots.random() < loss else 2 if lots.random() < duplication else 1
        yield tuple(lots.uniform(LATENCY_S, longest_delay_s) for _ in range(copies))


def fates(*, longest_delay_s: float = 3.0, max_size: int = 40) -> st.SearchStrategy[list[Fate]]:
    """Scripts for `scripted`, of loss, delay, duplication and so reordering; they shrink to a perfect network."""
    delay = st.floats(LATENCY_S, longest_delay_s)
    fate = st.one_of(
        st.just((LATENCY_S,)),
        st.just(()),
        st.tuples(delay),
        st.tuples(delay, delay),
    )
    return st.lists(fate, max_size=max_size)


@dataclass(frozen=True, slots=True)
class Datagram:
    """What was sent, for a look afterwards."""

    sent_at: float
    source: Address
    destination: Address
    data: bytes
    copies: int


class Wire:
    """Attach machines, perform first outputs, run until nothing is left to happen."""

    def __init__(self, schedule: Schedule, *, start: float = 1000.0) -> None:
        self.now = start
        self.sent: list[Datagram] = []
        self._schedule = schedule
        self._nodes: dict[Address, tuple[WireMachine, User]] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def attach(self, address: Address, machine: WireMachine, user: User) -> None:
        """Make a machine reachable at an address."""
        self._nodes[address] = (machine, user)

    def flow(self, remote: Address) -> Flow:
        """The way to a node."""
        return Flow(Transport.UDP, "wire", remote)

    def at(self, time: float, act: Callable[[], None]) -> None:
        """Call `act` at this time."""
        heapq.heappush(self._events, (time, next(self._order), act))

    def perform(self, source: Address, outputs: Sequence[Output]) -> None:
        """Perform the outputs of the node at `source`, and those of its user, in order."""
        _, user = self._nodes[source]
        for output in outputs:
            if isinstance(output, Transmit):
                self._transmit(source, output)
            else:
                self.perform(source, user(output, self.now))

    def run(self, until: float = float("inf"), *, max_steps: int = 100_000) -> None:
        """Let time pass until nothing is under way and no timer runs, or until that time."""
        for _ in range(max_steps):
            timers = [(deadline, address) for address, deadline in self._timers()]
            next_timer = min(timers, default=(float("inf"), None), key=lambda timer: timer[0])
            next_event = self._events[0][0] if self._events else float("inf")
            time = min(next_timer[0], next_event)
            if time == float("inf") or time > until:
                return
            self.now = max(self.now, time)
            if next_event <= next_timer[0]:
                heapq.heappop(self._events)[2]()
            elif next_timer[1] is not None:
                self.perform(next_timer[1], self._nodes[next_timer[1]][0].handle_timer(self.now))
        raise AssertionError(f"still busy after {max_steps} steps")

    def _timers(self) -> Iterator[tuple[Address, float]]:
        for address, (machine, _) in self._nodes.items():
            deadline = machine.next_deadline()
            if deadline is not None:
                yield address, deadline

    def _transmit(self, source: Address, output: Transmit) -> None:
        delays = next(self._schedule)
        destination = output.flow.remote
        self.sent.append(Datagram(self.now, source, destination, output.data, len(delays)))
        for delay in delays:
            self.at(self.now + delay, lambda: self._deliver(source, destination, output.data))

    def _deliver(self, source: Address, destination: Address, data: bytes) -> None:
        node = self._nodes.get(destination)
        if node is not None:
            self.perform(destination, node[0].receive(data, self.flow(source), self.now))
