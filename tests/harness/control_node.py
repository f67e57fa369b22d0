"""A node as the APIs see it: calls, records and events that a test holds in its hands."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from control.api.service import ControlService, NodeView
from control.events import codec
from control.pbx.records import (
    CallDirection,
    CallId,
    CallRecord,
    CallState,
    CallView,
    Event,
    RegistrationView,
)
from control.pbx.routing import Refusal
from control.store.events import EventsGoneError, StoredEvent
from tests.harness.records import call_record

STARTED_AT = datetime(2026, 3, 1, 9, 0, tzinfo=UTC)


def call_view(call_id: str = "c1", *, caller: str = "1001", callee: str = "1002", after_s: float = 0.0) -> CallView:
    """A call that was just asked for, `after_s` after the node started."""
    return CallView(
        CallId(call_id),
        CallState.CALLING,
        CallDirection.INTERNAL,
        caller,
        callee,
        STARTED_AT + timedelta(seconds=after_s),
    )


class Calls:
    """A transaction user: makes calls unless it has a `refusal`, and writes down what it is asked.

    With `short_lived`, its calls are over at once, and their records are there.
    """

    def __init__(self) -> None:
        self.running: dict[str, CallView] = {}
        self.bindings: list[RegistrationView] = []
        self.refusal: Refusal | None = None
        self.short_lived: list[CallRecord] | None = None
        self.originated: list[str] = []
        self.hung_up: list[tuple[str, str]] = []

    def add(self, *calls: CallView) -> None:
        self.running |= {call.call_id: call for call in calls}

    def calls(self) -> list[CallView]:
        return list(self.running.values())

    def call(self, call_id: CallId) -> CallView | None:
        return self.running.get(call_id)

    def registrations(self) -> list[RegistrationView]:
        return self.bindings

    def originate(self, call_id: CallId, caller: str, callee: str) -> CallView | Refusal:
        if self.refusal is not None:
            return self.refusal
        self.originated.append(call_id)
        call = call_view(call_id, caller=caller, callee=callee)
        if self.short_lived is None:
            self.running[call_id] = call
        else:
            self.short_lived.append(call_record(call_id, caller=caller, callee=callee))
        return call

    def hang_up(self, call_id: CallId, detail: str) -> CallView | None:
        self.hung_up.append((call_id, detail))
        return self.running.get(call_id)


class Records:
    """A store of records; a read takes until `readable`, and fails with `failure`."""

    def __init__(self) -> None:
        self.kept: list[CallRecord] = []
        self.failure: Exception | None = None
        self.readable = asyncio.Event()
        self.readable.set()
        self.reads = 0

    async def get(self, call_id: CallId) -> CallRecord | None:
        found = next((record for record in self.kept if record.call_id == call_id), None)
        await self._read()
        return found

    async def newest(self, limit: int = 100, before: CallId | None = None) -> list[CallRecord]:
        await self._read()
        newest = self.kept[::-1]
        ids = [record.call_id for record in newest]
        start = 0 if before is None else ids.index(before) + 1
        return newest[start : start + limit]

    async def _read(self) -> None:
        self.reads += 1
        await self.readable.wait()
        if self.failure is not None:
            raise self.failure


class Events:
    """A store of events, of which those up to `gone_through` are no longer kept."""

    def __init__(self) -> None:
        self.kept: list[StoredEvent] = []
        self.gone_through = 0
        self._advanced = asyncio.Event()

    def append(self, event: Event, *, data: bytes | None = None) -> StoredEvent:
        event_type = codec.event_type(event)
        assert event_type is not None
        sequence = self.last_sequence + 1
        call_id = getattr(event, "call_id", None)
        stored = StoredEvent(
            sequence,
            f"evt_{sequence}",
            event_type,
            event.at,
            call_id,
            data if data is not None else codec.encode(event),
        )
        self.kept.append(stored)
        advanced, self._advanced = self._advanced, asyncio.Event()
        advanced.set()
        return stored

    @property
    def last_sequence(self) -> int:
        return self.kept[-1].sequence if self.kept else 0

    async def read_after(self, sequence: int, limit: int = 256) -> Sequence[StoredEvent]:
        if sequence > self.last_sequence or sequence < self.gone_through:
            raise EventsGoneError(f"events up to {self.gone_through} are no longer kept")
        return self.kept[sequence : sequence + limit]

    async def wait_beyond(self, sequence: int) -> None:
        while self.last_sequence <= sequence:
            await self._advanced.wait()


class ControlNode:
    """A service with all that it needs."""

    def __init__(self) -> None:
        self.calls = Calls()
        self.records = Records()
        self.events = Events()
        self.draining = False
        self.service = ControlService(
            calls=self.calls, records=self.records, events=self.events, node=self.view, drain=self._drain
        )

    def view(self) -> NodeView:
        reasons = ("draining",) if self.draining else ()
        return NodeView(
            "node-1", "1.2.3", STARTED_AT, not reasons, reasons, self.draining, len(self.calls.running), 9, 3
        )

    def _drain(self) -> None:
        self.draining = True
