"""What people see of calls, phones, records and events."""

import json
from io import StringIO
from typing import Any

import pytest
from rich.console import Console, RenderableType

from control.events.cdr import cdr_line
from sippbx import tables
from tests.harness.records import call_record

RECORD: dict[str, Any] = json.loads(cdr_line(call_record()))
CALL: dict[str, Any] = {
    "call_id": "call-1",
    "state": "ringing",
    "direction": "internal",
    "caller": "1001",
    "callee": "1002",
    "invited_at": "2026-03-01T09:30:00.250000Z",
    "ringing_at": "2026-03-01T09:30:00.750000Z",
    "answered_at": None,
    "record": None,
}


def shown(*renderables: RenderableType) -> list[str]:
    output = StringIO()
    console = Console(file=output, width=tables.PIPE_WIDTH, markup=False, emoji=False, highlight=False)
    for renderable in renderables:
        console.print(renderable)
    return [line.rstrip() for line in output.getvalue().splitlines()]


def test_list_has_a_heading_and_a_line_for_each() -> None:
    assert shown(tables.table(tables.CALLS, [CALL, CALL | {"call_id": "call-2"}])) == [
        "call    state    direction  caller  callee  invited               answered",
        "call-1  ringing  internal   1001    1002    2026-03-01 09:30:00Z  -",
        "call-2  ringing  internal   1001    1002    2026-03-01 09:30:00Z  -",
    ]


def test_record_is_one_line_with_its_outcome() -> None:
    (_, line) = shown(tables.table(tables.RECORDS, [RECORD]))
    assert line.split() == [
        "call-1", "2026-03-01", "09:30:00Z", "internal", "1001", "1002", "5.0", "answered", "hangup",
    ]  # fmt: skip


def test_running_call_is_shown_without_what_has_not_happened() -> None:
    lines = shown(*tables.call_details(CALL))
    assert ["state", "ringing"] in [line.split() for line in lines]
    assert not any(line.startswith(("answered_at", "record")) for line in lines)


def test_ended_call_is_shown_with_its_outcome_and_its_streams() -> None:
    lines = [line.split() for line in shown(*tables.call_details(CALL | {"state": "ended", "record": RECORD}))]
    assert ["reason", "hangup"] in lines
    assert ["duration_s", "5.0"] in lines
    assert ["caller", "audio", "250", "0", "0", "0.12", "250"] in lines
    assert ["callee", "audio", "249", "1", "0", "-", "249"] in lines


@pytest.mark.parametrize("text", ["sip:a@x\x1b[31m", "sip:a@x\x9b31m", "sip:a@x\r\nforged"])
def test_nothing_that_came_over_the_wire_reaches_the_terminal_as_a_command(text: str) -> None:
    phone = {"user": "1001", "contact": text, "source": "h:1", "user_agent": None, "expires_at": None}
    (_, line) = shown(tables.table(tables.REGISTRATIONS, [phone]))
    assert "sip:a@x\N{REPLACEMENT CHARACTER}" in line
    assert line.isprintable()


def test_brackets_are_text_and_no_markup() -> None:
    phone = {"user": "[bold]1001[/]", "contact": ":smile:", "source": "h", "user_agent": "", "expires_at": None}
    (_, line) = shown(tables.table(tables.REGISTRATIONS, [phone]))
    assert line.split() == ["[bold]1001[/]", ":smile:", "h", "-", "-"]


@pytest.mark.parametrize(
    ("kind", "data", "told"),
    [
        ("call.started", {"call_id": "c", "caller": "1", "callee": "2"}, "call.started       c  1 -> 2"),
        ("call.ringing", {"call_id": "c", "caller": "1", "callee": "2", "leg": "callee"}, "1 -> 2  callee"),
        ("call.ended", RECORD, "call-1  1001 -> 1002  answered (hangup), 5.0 s"),
        ("user.unregistered", {"user": "1", "contact": "sip:x", "cause": "expired"}, "1  sip:x  expired"),
        ("node.error", {"component": "store", "kind": "write-failed", "detail": "full"}, "store  write-failed  full"),
        (None, {}, "unknown"),
    ],
)
def test_event_is_one_line(kind: str | None, data: dict[str, Any], told: str) -> None:
    (line,) = shown(tables.event_line({"at": "2026-03-01T09:30:00.250000Z", "type": kind, "data": data}))
    assert line.startswith("2026-03-01 09:30:00Z  ")
    assert line.endswith(told)
