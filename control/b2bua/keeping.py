"""Keeps calls in the journal: what far ends rely on is on the disk before they hear of it, the rest soon after."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final, Protocol

import structlog

from control.b2bua.departures import Departures
from control.events.fanout import record_in_unicode
from control.metrics import ControlMetrics
from control.pbx.call import Call
from control.pbx.records import CallId, CallRecord, CallState
from control.sip.snapshot import Plain
from control.sip.stack import MessageLabel, Transmit
from control.sip.transaction import TransactionId

# How long a change that nobody relies on may wait for others before it is saved.
FLUSH_S: Final = 0.05

_log = structlog.get_logger(__name__)


class JournalPort(Protocol):
    """Where calls are saved.

    `record` is what would be kept of a call that could not be taken up again; None when its record is written.
    """

    def begin(self, record: CallRecord, snapshot: Plain) -> None:
        """The event that is published next tells of a new call."""

    def save(
        self,
        call_id: CallId,
        record: CallRecord | None,
        snapshot: Plain,
        *,
        committed: Callable[[], None],
        given_up: Callable[[str], None],
    ) -> None:
        """Save the state of a call; one of the callbacks follows."""

    def end(self, record: CallRecord, snapshot: Plain | None) -> None:
        """The event that is published next ends a call, of which `snapshot` is left to be done."""

    def forget(self, call_id: CallId) -> None:
        """Nothing of a call is left to be done."""


class CallKeeper:
    """Sends what calls say, behind their saved state. Without a journal nothing waits, and nothing is kept.

    `snapshot` gives a call, with its transactions, as plain data. `border` is what a bug in one call may cost.
    """

    def __init__(
        self,
        journal: JournalPort | None,
        *,
        transmit: Callable[[Transmit], None],
        snapshot: Callable[[Call], Plain],
        border: Callable[[Call], contextlib.AbstractContextManager[None]],
        metrics: ControlMetrics,
        clock: Callable[[], float],
    ) -> None:
        self._journal = journal
        self._snapshot = snapshot
        self._border = border
        self._metrics = metrics
        self._clock = clock
        self.departures = Departures(transmit, self._overdue)
        # Calls that have a row, and those whose state has changed since without anybody relying on it.
        self._rows: set[CallId] = set()
        self._dirty: dict[CallId, Call] = {}
        # What leaves with the state that is saved next.
        self._promises: dict[CallId, Transmit] = {}
        self._flush: asyncio.TimerHandle | None = None

    def depart(self, call: Call, leaving: list[Transmit]) -> None:
        """Send what a step of a call gave, behind its state when a far end may rely on it."""
        promise = self._promises.get(call.call_id)
        if promise is not None and any(_is_final(message, promise.transaction) for message in leaving):
            del self._promises[call.call_id]
        if self._journal is not None and self._is_kept(call):
            if any(_is_relied_on(message.label) for message in leaving):
                self._dirty.pop(call.call_id, None)
                self._save_before_leaving(self._journal, call)
            else:
                self._save_soon(call)
        for message in leaving:
            self.departures.send(call.call_id, message)

    def promise(self, call: Call, trying: Transmit) -> None:
        """Send a provisional response that nobody waits for, but that ends repetitions: behind the next saved state."""
        if self._journal is None or not self._is_kept(call) or self.departures.waits(call.call_id):
            self.departures.send(call.call_id, trying)
        else:
            self._promises[call.call_id] = trying
            self._save_soon(call)

    def save_changes(self) -> None:
        """Save what has changed and nobody relies on."""
        self._flush = None
        dirty, self._dirty = self._dirty, {}
        for call in dirty.values():
            with self._border(call):
                if self._journal is not None and call.call_id in self._promises:
                    self._save_before_leaving(self._journal, call)
                elif self._journal is not None:
                    self._save(self._journal, call, _nothing)

    def taken_up(self, call_id: CallId) -> None:
        """A call came out of the journal."""
        self._rows.add(call_id)

    def begin(self, call: Call) -> None:
        """The call's start is published next: whoever hears of it will hear of its end, whatever is killed."""
        if self._journal is None or call.state is CallState.ENDED:
            return
        self._rows.add(call.call_id)
        self._journal.begin(record_in_unicode(call.record_if_lost(self._clock())), self._snapshot(call))

    def end(self, call: Call, record: CallRecord) -> None:
        """The call's end is published next: its row goes with its record, or keeps what is left to be done."""
        self._dirty.pop(call.call_id, None)
        if self._journal is None or call.call_id not in self._rows:
            return
        if call.done:
            self._rows.discard(call.call_id)
        self._journal.end(record, None if call.done else self._snapshot(call))

    def forget(self, call_id: CallId) -> None:
        """Nothing can come of a call any more."""
        self._dirty.pop(call_id, None)
        self._promises.pop(call_id, None)
        if call_id in self._rows and self._journal is not None:
            self._rows.discard(call_id)
            self._journal.forget(call_id)

    def close(self) -> None:
        """Hold back nothing any more."""
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None
        self.departures.flush()

    def _is_kept(self, call: Call) -> bool:
        """An ended call is kept as long as something is left to be done of what was kept."""
        return call.state is not CallState.ENDED or (call.call_id in self._rows and not call.done)

    def _save_soon(self, call: Call) -> None:
        self._dirty[call.call_id] = call
        if self._flush is None:
            self._flush = asyncio.get_running_loop().call_later(FLUSH_S, self.save_changes)

    def _save_before_leaving(self, journal: JournalPort, call: Call) -> None:
        """Save the state that what leaves from here on relies on, a promise first."""
        self._save(journal, call, self.departures.barrier(call.call_id))
        if (promise := self._promises.pop(call.call_id, None)) is not None:
            self.departures.send(call.call_id, promise)

    def _save(self, journal: JournalPort, call: Call, lift: Callable[[], None]) -> None:
        self._rows.add(call.call_id)

        def given_up(_: str) -> None:
            # The store has told why; the call goes on.
            lift()

        ended = call.state is CallState.ENDED
        record = None if ended else record_in_unicode(call.record_if_lost(self._clock()))
        journal.save(call.call_id, record, self._snapshot(call), committed=lift, given_up=given_up)

    def _overdue(self, call_id: CallId) -> None:
        self._metrics.error("store", "journal-overdue")
        _log.warning("journal.overdue", call_id=call_id, advice="the disk is slow; a crash now might cost the call")


def _is_relied_on(label: MessageLabel) -> bool:
    """Whether whoever gets this message believes something of the call that must be remembered."""
    if label.retransmission:
        return False
    if label.status is None:
        return label.method not in ("CANCEL", "OPTIONS")
    return label.status >= 200 and label.method in ("INVITE", "UPDATE", "PRACK", "BYE")


def _is_final(message: Transmit, transaction: TransactionId | None) -> bool:
    return message.transaction == transaction and (message.label.status or 0) >= 200


def _nothing() -> None:
    """The callback of those who do not wait."""
