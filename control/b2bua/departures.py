"""What is to leave for far ends, held back until the journal has what makes it true.

Messages of a call leave in order. A barrier holds back all that comes behind it, until its state is on the disk; a disk
that takes too long holds nobody up for more than `HOLD_S`: a running call goes on, less safe against a crash.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from control.pbx.records import CallId
from control.sip.stack import Transmit

# T1 of RFC 3261: a peer would repeat itself soon after.
HOLD_S: Final = 0.5


class Barrier:
    """One state on its way to the disk."""

    __slots__ = ("open", "timer")

    def __init__(self) -> None:
        self.open = False
        self.timer: asyncio.TimerHandle | None = None


class Departures:
    """The queues of all calls that wait for the disk. `overdue` is told of each barrier that took too long."""

    def __init__(self, transmit: Callable[[Transmit], None], overdue: Callable[[CallId], None]) -> None:
        self._transmit = transmit
        self._overdue = overdue
        self._queues: dict[CallId, deque[Transmit | Barrier]] = {}

    def __len__(self) -> int:
        """Calls that wait."""
        return len(self._queues)

    def waits(self, call_id: CallId) -> bool:
        """Whether what a call sends now has to wait."""
        return call_id in self._queues

    def send(self, call_id: CallId | None, message: Transmit) -> None:
        """Send a message behind what the call has waiting; at once when it has nothing."""
        queue = self._queues.get(call_id) if call_id is not None else None
        if queue is None:
            self._transmit(message)
        else:
            queue.append(message)

    def barrier(self, call_id: CallId) -> Callable[[], None]:
        """Hold back what the call sends from here on; what is returned lets it go, and may be called more than once."""
        barrier = Barrier()
        self._queues.setdefault(call_id, deque()).append(barrier)
        barrier.timer = asyncio.get_running_loop().call_later(HOLD_S, self._give_in, call_id, barrier)
        return lambda: self._lift(call_id, barrier)

    def flush(self) -> None:
        """Send everything."""
        for call_id in list(self._queues):
            for item in list(self._queues.get(call_id, ())):
                if isinstance(item, Barrier):
                    self._lift(call_id, item)

    def _give_in(self, call_id: CallId, barrier: Barrier) -> None:
        self._overdue(call_id)
        self._lift(call_id, barrier)

    def _lift(self, call_id: CallId, barrier: Barrier) -> None:
        if barrier.timer is not None:
            barrier.timer.cancel()
            barrier.timer = None
        barrier.open = True
        queue = self._queues.get(call_id)
        while queue:
            item = queue[0]
            if isinstance(item, Barrier):
                if not item.open:
                    return
                queue.popleft()
            else:
                queue.popleft()
                self._transmit(item)
        self._queues.pop(call_id, None)
