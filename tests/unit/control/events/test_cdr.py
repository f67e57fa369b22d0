"""control.events.cdr: call detail records as JSON lines."""

import json
from datetime import datetime, timedelta

import pytest

from control.events import cdr
from control.events.cdr import JsonLines, cdr_line
from control.pbx.records import Reason, Result, Termination
from tests.harness.records import INVITED_AT, call_record


def test_a_line_has_the_documented_keys_and_forms() -> None:
    line = cdr_line(call_record())
    assert line.endswith(b"}\n")
    document = json.loads(line)
    assert list(document) == [
        "version", "call_id", "direction", "caller", "callee", "invited_at", "ringing_at", "answered_at", "ended_at",
        "setup_s", "duration_s", "termination", "legs", "streams", "media_complete", "media_interruptions",
        "media_gap_s",
    ]  # fmt: skip
    assert set(document) | {key for part in ("termination",) for key in document[part]} <= set(
        (cdr.__doc__ or "").replace(",", " ").split()
    )
    assert document["invited_at"] == "2026-03-01T09:30:00.250000Z"
    assert datetime.fromisoformat(document["ended_at"]) == INVITED_AT + timedelta(seconds=8)
    assert document["termination"] == {
        "result": "answered", "reason": "hangup", "sip_status": 200, "ended_by": "caller", "detail": "",
    }  # fmt: skip
    assert [leg["name"] for leg in document["legs"]] == ["caller", "callee"]
    assert document["streams"][0]["jitter_ms"] == 0.125
    assert document["streams"][1]["jitter_ms"] is None


def test_what_did_not_happen_is_null() -> None:
    termination = Termination(Result.BUSY, Reason.CALLEE_BUSY, 486)
    document = json.loads(cdr_line(call_record(ringing_at=None, answered_at=None, termination=termination)))
    assert (document["ringing_at"], document["answered_at"]) == (None, None)
    assert document["termination"]["ended_by"] is None


def test_a_line_is_known_by_its_call_id() -> None:
    assert JsonLines().key(JsonLines().line(call_record("call-7"))) == "call-7"


@pytest.mark.parametrize("line", [b"", b"\n", b'{"version":1,"call_', b"[]\n", b"7\n", b'{"call_id":7}\n', b"\xff\n"])
def test_what_is_no_line_of_a_record_has_no_key(line: bytes) -> None:
    assert JsonLines().key(line) is None
