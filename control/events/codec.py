"""Events as the JSON objects that the store keeps, webhooks deliver and other programs read.

call.started, call.answered
call_id, direction, caller, callee
call.ringing      the same, and leg: the side that rings
call.ended        the call's record, with the keys of control.events.cdr
user.registered   user, contact, source, user_agent, expires_at
user.unregistered the same, and cause: removed | expired
node.error        component, kind, detail, call_id (null when it concerns no call)
"""

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Final, assert_never

import orjson

from control.events.cdr import cdr_document
from control.pbx.records import (
    NODE_ERROR,
    CallDirection,
    CallEvent,
    CallEventKind,
    CallId,
    CallRecord,
    ErrorEvent,
    Event,
    LegName,
    RegistrationEvent,
    RegistrationEventKind,
    RegistrationView,
    UnregisterCause,
)
from control.store.records import record_from_plain

_OPTIONS: Final = orjson.OPT_UTC_Z


def event_type(event: Event) -> str | None:
    """The name that others know it by; None for what is for this process alone."""
    match event:
        case CallEvent():
            return None if event.kind is CallEventKind.FORWARDED else event.kind.value
        case RegistrationEvent():
            return event.kind.value
        case ErrorEvent():
            return NODE_ERROR
        case _:
            assert_never(event)


def event_id(event: Event, new_token: Callable[[], str]) -> str:
    """Its id. That of a call's event is made of the call's, so that it is the same if a crash makes it happen again."""
    if not isinstance(event, CallEvent):
        return f"evt_{new_token()}"
    what = event.kind.value.removeprefix("call.")
    return f"evt_{event.call_id}_{what if event.leg is None else f'{what}-{event.leg.value}'}"


def call_id_of(event: Event) -> str | None:
    """The call that it is about."""
    return None if isinstance(event, RegistrationEvent) else event.call_id


def encode(event: Event) -> bytes:
    """The event as a JSON object.

    Raises:
        TypeError: its text has lone surrogates (orjson.JSONEncodeError).
    """
    return orjson.dumps(_document(event), option=_OPTIONS)


def decode(event_type: str, at: datetime, data: bytes) -> Event:
    """The event of such an object; `elapsed_s` of a call's is not kept, and 0.

    Raises:
        ValueError, KeyError: it is none of ours.
    """
    values = orjson.loads(data)
    if event_type == NODE_ERROR:
        call_id = values["call_id"]
        return ErrorEvent(at, values["component"], values["kind"], values["detail"], call_id and CallId(call_id))
    if event_type in set(RegistrationEventKind):
        return _registration_event(RegistrationEventKind(event_type), at, values)
    kind = CallEventKind(event_type)
    record = record_from_plain({**values, **values["termination"]}) if kind is CallEventKind.ENDED else None
    leg = LegName(values["leg"]) if kind is CallEventKind.RINGING else None
    direction = CallDirection(values["direction"])
    return CallEvent(
        kind, CallId(values["call_id"]), at, direction, values["caller"], values["callee"], 0.0, leg, record
    )


def _document(event: Event) -> Mapping[str, object]:
    match event:
        case CallEvent(record=CallRecord() as record):
            return cdr_document(record)
        case CallEvent():
            parties = {
                "call_id": event.call_id,
                "direction": event.direction,
                "caller": event.caller,
                "callee": event.callee,
            }
            return parties if event.leg is None else {**parties, "leg": event.leg}
        case RegistrationEvent():
            registration = event.registration
            binding = {
                "user": registration.user,
                "contact": registration.contact,
                "source": registration.source,
                "user_agent": registration.user_agent,
                "expires_at": registration.expires_at,
            }
            return binding if event.cause is None else {**binding, "cause": event.cause}
        case ErrorEvent():
            return {
                "component": event.component,
                "kind": event.kind,
                "detail": event.detail,
                "call_id": event.call_id,
            }
        case _:
            assert_never(event)


def _registration_event(kind: RegistrationEventKind, at: datetime, values: Mapping[str, Any]) -> RegistrationEvent:
    registration = RegistrationView(
        values["user"],
        values["contact"],
        values["source"],
        values["user_agent"],
        datetime.fromisoformat(values["expires_at"]),
    )
    return RegistrationEvent(kind, at, registration, UnregisterCause(values["cause"]) if "cause" in values else None)
