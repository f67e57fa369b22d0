from dataclasses import replace

import pytest

from control.events.fanout import EventFanOut
from control.metrics import ControlMetrics
from control.pbx.records import CallEvent, CallEventKind
from tests.harness.records import call_event, call_record


@pytest.fixture
def metrics() -> ControlMetrics:
    return ControlMetrics()


def test_each_observer_hears_each_event_in_order(metrics: ControlMetrics) -> None:
    heard: list[tuple[str, CallEventKind]] = []
    fan_out = EventFanOut(metrics)
    fan_out.subscribe("one", lambda event: heard.append(("one", event.kind)))
    fan_out.subscribe("two", lambda event: heard.append(("two", event.kind)))
    fan_out.publish(call_event(CallEventKind.STARTED))
    fan_out.publish(call_event(CallEventKind.ENDED))
    assert heard == [
        ("one", CallEventKind.STARTED),
        ("two", CallEventKind.STARTED),
        ("one", CallEventKind.ENDED),
        ("two", CallEventKind.ENDED),
    ]


def test_an_observer_that_raises_is_counted_and_harms_no_other(metrics: ControlMetrics) -> None:
    heard: list[CallEvent] = []

    def broken(event: CallEvent) -> None:
        raise RuntimeError("a bug")

    fan_out = EventFanOut(metrics)
    fan_out.subscribe("broken", broken)
    fan_out.subscribe("sound", heard.append)
    fan_out.publish(call_event(CallEventKind.STARTED))
    assert heard == [call_event(CallEventKind.STARTED)]
    labels = {"component": "events", "kind": "observer_failed"}
    assert metrics.registry.get_sample_value("sip_pbx_errors_total", labels) == 1


def test_octets_that_are_not_utf_8_become_replacement_characters_everywhere(metrics: ControlMetrics) -> None:
    heard: list[CallEvent] = []
    fan_out = EventFanOut(metrics)
    fan_out.subscribe("observer", heard.append)
    bad = b"J\xfcrg".decode("utf-8", "surrogateescape")
    record = call_record(caller=bad, callee=bad)
    record = replace(
        record,
        termination=replace(record.termination, detail=bad),
        legs=tuple(
            replace(leg, sip_call_id=bad, from_uri=bad, to_uri=bad, user=bad, user_agent=bad) for leg in record.legs
        ),
    )
    fan_out.publish(call_event(CallEventKind.ENDED, caller=bad, callee=bad, record=record))
    [event] = heard
    assert event.caller == "J\N{REPLACEMENT CHARACTER}rg"
    repr(event).encode()
    assert "\\udc" not in repr(event)


def test_proper_unicode_passes_unchanged(metrics: ControlMetrics) -> None:
    heard: list[CallEvent] = []
    fan_out = EventFanOut(metrics)
    fan_out.subscribe("observer", heard.append)
    fan_out.publish(call_event(CallEventKind.STARTED, caller="J\N{LATIN SMALL LETTER U WITH DIAERESIS}rg"))
    assert heard[0].caller == "J\N{LATIN SMALL LETTER U WITH DIAERESIS}rg"
