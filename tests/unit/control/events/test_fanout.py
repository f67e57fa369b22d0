from dataclasses import replace
from datetime import timedelta

import pytest

from control.events.fanout import ERROR_INTERVAL_S, EventFanOut
from control.metrics import ControlMetrics
from control.pbx.records import (
    CallEventKind,
    ErrorEvent,
    Event,
    RegistrationEvent,
    RegistrationEventKind,
    RegistrationView,
)
from tests.harness.records import INVITED_AT, call_event, call_record

BAD = b"J\xfcrg".decode("utf-8", "surrogateescape")
GOOD = "J\N{REPLACEMENT CHARACTER}rg"
LOST = ErrorEvent(INVITED_AT, "media", "data-plane-lost", "unavailable")


@pytest.fixture
def metrics() -> ControlMetrics:
    return ControlMetrics()


def test_each_observer_hears_each_event_in_order(metrics: ControlMetrics) -> None:
    heard: list[tuple[str, Event]] = []
    fan_out = EventFanOut(metrics)
    fan_out.subscribe("one", lambda event: heard.append(("one", event)))
    fan_out.subscribe("two", lambda event: heard.append(("two", event)))
    started, ended = call_event(CallEventKind.STARTED), call_event(CallEventKind.ENDED)
    fan_out.publish(started)
    fan_out.publish(ended)
    assert heard == [("one", started), ("two", started), ("one", ended), ("two", ended)]


def test_an_observer_that_raises_is_counted_and_harms_no_other(metrics: ControlMetrics) -> None:
    heard: list[Event] = []

    def broken(event: Event) -> None:
        raise RuntimeError("a bug")

    fan_out = EventFanOut(metrics)
    fan_out.subscribe("broken", broken)
    fan_out.subscribe("sound", heard.append)
    fan_out.publish(call_event(CallEventKind.STARTED))
    assert heard == [call_event(CallEventKind.STARTED)]
    labels = {"component": "events", "kind": "observer_failed"}
    assert metrics.registry.get_sample_value("sip_pbx_errors_total", labels) == 1


def test_octets_that_are_not_utf_8_become_replacement_characters_everywhere(metrics: ControlMetrics) -> None:
    heard: list[Event] = []
    fan_out = EventFanOut(metrics)
    fan_out.subscribe("observer", heard.append)
    record = call_record(caller=BAD, callee=BAD)
    record = replace(
        record,
        termination=replace(record.termination, detail=BAD),
        legs=tuple(
            replace(leg, sip_call_id=BAD, from_uri=BAD, to_uri=BAD, user=BAD, user_agent=BAD) for leg in record.legs
        ),
    )
    fan_out.publish(call_event(CallEventKind.ENDED, caller=BAD, callee=BAD, record=record))
    [event] = heard
    assert f"caller='{GOOD}'" in repr(event)
    assert "\\udc" not in repr(event)


def test_phones_and_errors_are_made_valid_unicode_too(metrics: ControlMetrics) -> None:
    heard: list[Event] = []
    fan_out = EventFanOut(metrics)
    fan_out.subscribe("observer", heard.append)
    phone = RegistrationView(BAD, f"sip:{BAD}@192.0.2.1", "192.0.2.1:5060", BAD, INVITED_AT)
    fan_out.publish(RegistrationEvent(RegistrationEventKind.REGISTERED, INVITED_AT, phone))
    fan_out.publish(replace(LOST, detail=BAD))
    phone = RegistrationView(GOOD, f"sip:{GOOD}@192.0.2.1", "192.0.2.1:5060", GOOD, INVITED_AT)
    assert heard == [
        RegistrationEvent(RegistrationEventKind.REGISTERED, INVITED_AT, phone),
        replace(LOST, detail=GOOD),
    ]


def test_proper_unicode_passes_unchanged(metrics: ControlMetrics) -> None:
    heard: list[Event] = []
    fan_out = EventFanOut(metrics)
    fan_out.subscribe("observer", heard.append)
    fan_out.publish(call_event(CallEventKind.STARTED, caller="J\N{LATIN SMALL LETTER U WITH DIAERESIS}rg"))
    assert heard == [call_event(CallEventKind.STARTED, caller="J\N{LATIN SMALL LETTER U WITH DIAERESIS}rg")]


def test_an_error_that_comes_again_is_told_once_in_ten_seconds(metrics: ControlMetrics) -> None:
    heard: list[Event] = []
    fan_out = EventFanOut(metrics)
    fan_out.subscribe("observer", heard.append)
    errors = [
        replace(LOST, at=INVITED_AT + timedelta(seconds=seconds), detail=str(seconds)) for seconds in (0, 3, 6, 9.9, 10)
    ]
    for error in errors:
        fan_out.publish(error)
    assert heard == [errors[0], errors[-1]], "each repetition must not put the next telling off"


@pytest.mark.parametrize("change", [{"kind": "event-failed"}, {"component": "sip"}])
def test_another_error_is_no_repetition(metrics: ControlMetrics, change: dict[str, str]) -> None:
    heard: list[Event] = []
    fan_out = EventFanOut(metrics)
    fan_out.subscribe("observer", heard.append)
    another = replace(LOST, **change)  # type: ignore[arg-type]
    fan_out.publish(LOST)
    fan_out.publish(another)
    assert heard == [LOST, another]


def test_a_clock_that_was_set_back_silences_no_error(metrics: ControlMetrics) -> None:
    heard: list[Event] = []
    fan_out = EventFanOut(metrics)
    fan_out.subscribe("observer", heard.append)
    earlier = replace(LOST, at=INVITED_AT - timedelta(seconds=ERROR_INTERVAL_S))
    fan_out.publish(LOST)
    fan_out.publish(earlier)
    assert heard == [LOST, earlier]
