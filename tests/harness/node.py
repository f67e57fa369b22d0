"""The tables of a node, without SIP and without a disk: what the control service stands on in tests."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from control.events.codec import call_id_of, encode, event_id, event_type
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
from tests.harness.records import INVITED_AT


@dataclass
class Calls:
    """The calls and phones of a node without SIP."""

    running: dict[str, CallView] = field(default_factory=dict)
    phones: list[RegistrationView] = field(default_factory=list)
    refusal: Refusal | None = None
    hung_up: list[str] = field(default_factory=list)

    def calls(self) -> list[CallView]:
        return list(self.running.values())

    def call(self, call_id: CallId) -> CallView | None:
        return self.running.get(call_id)

    def originate(self, call_id: CallId, caller: str, callee: str) -> CallView | Refusal:
        if self.refusal is not None:
            return self.refusal
        self.running[call_id] = running_call(call_id, caller=caller, callee=callee, state=CallState.CALLING)
        return self.running[call_id]

    def hang_up(self, call_id: CallId, detail: str) -> CallView | None:
        if call_id not in self.running:
            return None
        self.hung_up.append(call_id)
        self.running[call_id] = replace(self.running[call_id], state=CallState.RELEASING)
        return self.running[call_id]

    def registrations(self) -> list[RegistrationView]:
        return self.phones


@dataclass
class Records:
    """Records as the store gives them; it can be slow or broken."""

    kept: list[CallRecord] = field(default_factory=list)
    read: Callable[[], Any] | None = None

    async def get(self, call_id: CallId) -> CallRecord | None:
        await self._reading()
        return next((record for record in self.kept if record.call_id == call_id), None)

    async def newest(self, limit: int = 100, before: CallId | None = None) -> list[CallRecord]:
        await self._reading()
        ids = [record.call_id for record in self.kept]
        first = 0 if before is None else ids.index(before) + 1
        return self.kept[first : first + limit]

    async def _reading(self) -> None:
        if self.read is not None:
            await self.read()


class Events:
    """Events as the store gives them: all of them, from the first."""

    def __init__(self) -> None:
        self.stored: list[StoredEvent] = []
        self._more = asyncio.Condition()

    @property
    def last_sequence(self) -> int:
        return len(self.stored)

    async def read_after(self, sequence: int, limit: int = 256) -> list[StoredEvent]:
        if sequence > len(self.stored):
            raise EventsGoneError(f"{sequence} is of the future")
        return self.stored[sequence : sequence + limit]

    async def wait_beyond(self, sequence: int) -> None:
        async with self._more:
            await self._more.wait_for(lambda: len(self.stored) > sequence)

    async def append(self, event: Event) -> None:
        """Store one."""
        sequence = len(self.stored) + 1
        name, call_id = event_type(event), call_id_of(event)
        assert name is not None
        identity = event_id(event, lambda: f"{sequence:06}")
        self.stored.append(StoredEvent(sequence, identity, name, event.at, call_id, encode(event)))
        async with self._more:
            self._more.notify_all()


def running_call(call_id: str = "call-1", **changes: Any) -> CallView:
    view = CallView(
        CallId(call_id), CallState.ESTABLISHED, CallDirection.INTERNAL, "1001", "1002", INVITED_AT, INVITED_AT
    )
    return replace(view, **changes)


def phone(user: str = "1001", **changes: Any) -> RegistrationView:
    expires_at = INVITED_AT + timedelta(minutes=5)
    return replace(RegistrationView(user, f"sip:{user}@127.0.0.2", "127.0.0.2:5060", "phone/1", expires_at), **changes)
