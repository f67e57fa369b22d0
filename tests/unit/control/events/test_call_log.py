import pytest
from structlog.testing import capture_logs

from control.events.call_log import log_call_event
from control.pbx.records import CallEventKind, ErrorEvent
from tests.harness.records import INVITED_AT, call_event


@pytest.mark.parametrize(
    ("kind", "level"),
    [
        (CallEventKind.STARTED, "info"),
        (CallEventKind.FORWARDED, "debug"),
        (CallEventKind.RINGING, "info"),
        (CallEventKind.ANSWERED, "info"),
        (CallEventKind.ENDED, "info"),
    ],
)
def test_each_event_is_one_line_with_its_call_and_parties(kind: CallEventKind, level: str) -> None:
    with capture_logs() as lines:
        log_call_event(call_event(kind, elapsed_s=0.12345))
    [line] = lines
    assert line["event"] == kind.value
    assert line["log_level"] == level
    assert (line["call_id"], line["direction"], line["caller"], line["callee"]) == (
        "call-1",
        "internal",
        "1001",
        "1002",
    )
    assert line["elapsed_s"] == 0.123


def test_the_last_line_tells_how_the_call_ended() -> None:
    with capture_logs() as lines:
        log_call_event(call_event(CallEventKind.ENDED))
    [line] = lines
    assert (line["result"], line["reason"], line["sip_status"], line["ended_by"]) == (
        "answered",
        "hangup",
        200,
        "caller",
    )
    assert line["duration_s"] == 5.0
    assert line["sip_call_ids"] == ["a@x", "b@pbx"]


def test_what_is_no_event_of_a_call_is_not_logged_here() -> None:
    with capture_logs() as lines:
        log_call_event(ErrorEvent(INVITED_AT, "media", "data-plane-lost", "unavailable"))
    assert lines == []
