from datetime import UTC, datetime, timedelta

import orjson
import pytest

from control.events.cdr import cdr_document
from control.events.codec import call_id_of, decode, encode, event_id, event_type
from control.pbx.records import (
    EVENT_TYPES,
    CallEventKind,
    CallId,
    ErrorEvent,
    Event,
    LegName,
    RegistrationEvent,
    RegistrationEventKind,
    RegistrationView,
    UnregisterCause,
)
from tests.harness.records import call_event, call_record

AT = datetime(2026, 3, 1, 9, 30, 0, 250_000, tzinfo=UTC)
PHONE = RegistrationView("1001", "sip:1001@192.0.2.1", "192.0.2.1:5060", None, AT + timedelta(seconds=60))
EVENTS: list[Event] = [
    call_event(CallEventKind.STARTED),
    call_event(CallEventKind.RINGING, leg=LegName.CALLER),
    call_event(CallEventKind.RINGING, leg=LegName.CALLEE),
    call_event(CallEventKind.ANSWERED),
    call_event(CallEventKind.ENDED),
    call_event(CallEventKind.ENDED, record=call_record(ringing_at=None, answered_at=None, legs=(), streams=())),
    RegistrationEvent(RegistrationEventKind.REGISTERED, AT, PHONE),
    RegistrationEvent(RegistrationEventKind.UNREGISTERED, AT, PHONE, UnregisterCause.EXPIRED),
    ErrorEvent(AT, "media", "data-plane-lost", "unavailable"),
    ErrorEvent(AT, "sip", "event-failed", "see the log", CallId("call-1")),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_survives_being_written_and_read(event: Event) -> None:
    kind = event_type(event)
    assert kind is not None
    assert decode(kind, event.at, encode(event)) == event


def test_every_type_has_an_event_here() -> None:
    assert {event_type(event) for event in EVENTS} == set(EVENT_TYPES)


def test_a_forwarded_invite_is_for_this_process_alone() -> None:
    assert event_type(call_event(CallEventKind.FORWARDED)) is None


def test_the_end_of_a_call_has_exactly_the_keys_of_its_record() -> None:
    data = orjson.loads(encode(call_event(CallEventKind.ENDED)))
    assert data == orjson.loads(orjson.dumps(cdr_document(call_record()), option=orjson.OPT_UTC_Z))


def test_ids_of_a_call_s_events_are_made_of_the_call_s_and_differ() -> None:
    ids = [event_id(event, lambda: "token") for event in EVENTS[:5]]
    assert ids == [
        "evt_call-1_started",
        "evt_call-1_ringing-caller",
        "evt_call-1_ringing-callee",
        "evt_call-1_answered",
        "evt_call-1_ended",
    ]
    assert event_id(EVENTS[-1], lambda: "token") == "evt_token"


def test_events_name_the_call_that_they_are_about() -> None:
    assert [call_id_of(event) for event in (EVENTS[0], *EVENTS[-3:])] == ["call-1", None, None, "call-1"]


@pytest.mark.parametrize(("kind", "data"), [("call.started", b"{}"), ("call.unknown", b"{}"), ("node.error", b"[")])
def test_what_is_no_event_of_ours_is_refused(kind: str, data: bytes) -> None:
    with pytest.raises((ValueError, KeyError)):
        decode(kind, AT, data)
