"""control.events.cdr_csv: call detail records as CSV."""

import csv
import re
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from control.events import cdr_csv
from control.events.cdr_csv import COLUMNS, CsvLines
from control.pbx.records import LegName, Reason, Result, StreamRecord, Termination
from tests.harness.records import INVITED_AT, call_record

CALLEE_VIDEO = StreamRecord(LegName.CALLEE, 1, "video", 100, 9, 5, 0, 2.5, 1, 100, 0, None, None)


def row(**changes: Any) -> dict[str, str]:
    """A record's line, read as any program would."""
    text = (CsvLines().header + CsvLines().line(call_record(**changes))).decode()
    (read,) = csv.DictReader(text.splitlines(keepends=True), strict=True)
    return read


def test_the_columns_are_those_that_the_module_documents() -> None:
    listed = re.findall(r"^    (\w+(?:, \w+)*)(?:\s|$)", cdr_csv.__doc__ or "", re.MULTILINE)
    names = [name for line in listed for name in line.split(", ")]
    of_a_leg = [name.removeprefix("caller_") for name in names if name.startswith("caller_")]
    assert list(COLUMNS) == [*names, *(f"callee_{name}" for name in of_a_leg)]


def test_a_line_holds_the_record() -> None:
    assert row() == {
        "call_id": "call-1", "direction": "internal", "caller": "1001", "callee": "1002",
        "invited_at": "2026-03-01T09:30:00.250000Z", "ringing_at": "2026-03-01T09:30:00.750000Z",
        "answered_at": "2026-03-01T09:30:03.250000Z", "ended_at": "2026-03-01T09:30:08.250000Z",
        "setup_s": "3.0", "duration_s": "5.0", "result": "answered", "reason": "hangup", "sip_status": "200",
        "ended_by": "caller", "detail": "", "media_complete": "true", "media_interruptions": "1", "media_gap_s": "0.25",
        "caller_sip_call_id": "a@x", "caller_from_uri": "sip:1001@pbx", "caller_to_uri": "sip:1002@pbx",
        "caller_remote": "127.0.0.2:5060", "caller_trunk": "", "caller_user": "1001", "caller_user_agent": "phone/1",
        "caller_packets": "250", "caller_lost": "0", "caller_jitter_ms": "0.125",
        "callee_sip_call_id": "b@pbx", "callee_from_uri": "sip:1001@pbx", "callee_to_uri": "sip:1002@pbx",
        "callee_remote": "127.0.0.3:5060", "callee_trunk": "", "callee_user": "1002", "callee_user_agent": "",
        "callee_packets": "249", "callee_lost": "1", "callee_jitter_ms": "",
    }  # fmt: skip


def test_lines_end_as_rfc_4180_says() -> None:
    assert CsvLines().header.endswith(b",callee_jitter_ms\r\n")
    assert CsvLines().line(call_record()).endswith(b"\r\n")


def test_the_lines_of_a_leg_are_added_up_and_the_largest_jitter_counts() -> None:
    read = row(streams=(*call_record().streams, CALLEE_VIDEO))
    assert (read["callee_packets"], read["callee_lost"], read["callee_jitter_ms"]) == ("349", "6", "2.5")


def test_what_did_not_happen_is_empty() -> None:
    termination = Termination(Result.REJECTED, Reason.UNKNOWN_NUMBER, 404)
    read = row(ringing_at=None, answered_at=None, termination=termination, legs=call_record().legs[:1], streams=())
    absent = {name for name, value in read.items() if name.startswith("callee_") and value}
    assert (read["ringing_at"], read["answered_at"], read["ended_by"], absent) == ("", "", "", set())


@pytest.mark.parametrize("text", ['=HYPERLINK("x")', "+8225550100", "-1", "@SUM(A1)"])
def test_text_that_a_spreadsheet_would_take_for_a_formula_gets_an_apostrophe(text: str) -> None:
    assert row(callee=text)["callee"] == f"'{text}"


def test_a_formula_behind_a_control_character_is_none() -> None:
    assert row(callee="\t=1+1")["callee"] == " =1+1"


def test_quotes_and_commas_survive_and_line_breaks_become_spaces() -> None:
    detail = 'he said "no, thanks",\r\nthen\x00 hung\u2028up'
    line = CsvLines().line(
        call_record(termination=replace(call_record().termination, detail=detail), invited_at=INVITED_AT)
    )
    assert line.count(b"\n") == 1
    assert row(termination=replace(call_record().termination, detail=detail))["detail"] == (
        'he said "no, thanks",  then  hung up'
    )


def test_times_without_a_fraction_have_the_same_width() -> None:
    assert row(ended_at=INVITED_AT - timedelta(milliseconds=250))["ended_at"] == "2026-03-01T09:30:00.000000Z"


def test_a_line_is_known_by_its_call_id() -> None:
    assert CsvLines().key(CsvLines().line(call_record("call,7"))) == "call,7"


@pytest.mark.parametrize("line", [b"", b"\r\n", b"call-1,internal\r\n", b'"call-1\r\n', b"\xff\r\n"])
def test_what_is_no_line_of_a_record_has_no_key(line: bytes) -> None:
    assert CsvLines().key(line) is None
