"""Call records and events to test with."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from control.pbx.records import (
    CallDirection,
    CallEvent,
    CallEventKind,
    CallId,
    CallRecord,
    LegName,
    LegRecord,
    Reason,
    Result,
    StreamRecord,
    Termination,
)

INVITED_AT = datetime(2026, 3, 1, 9, 30, 0, 250_000, tzinfo=UTC)


def call_record(call_id: str = "call-1", **changes: Any) -> CallRecord:
    """An answered internal call of five seconds with audio both ways."""
    record = CallRecord(
        call_id=CallId(call_id),
        direction=CallDirection.INTERNAL,
        caller="1001",
        callee="1002",
        invited_at=INVITED_AT,
        ringing_at=INVITED_AT + timedelta(seconds=0.5),
        answered_at=INVITED_AT + timedelta(seconds=3),
        ended_at=INVITED_AT + timedelta(seconds=8),
        setup_s=3.0,
        duration_s=5.0,
        termination=Termination(Result.ANSWERED, Reason.HANGUP, 200, LegName.CALLER),
        legs=(
            LegRecord(
                LegName.CALLER,
                "a@x",
                "sip:1001@pbx",
                "sip:1002@pbx",
                "127.0.0.2:5060",
                user="1001",
                user_agent="phone/1",
            ),
            LegRecord(LegName.CALLEE, "b@pbx", "sip:1001@pbx", "sip:1002@pbx", "127.0.0.3:5060", user="1002"),
        ),
        streams=(
            StreamRecord(LegName.CALLER, 0, "audio", 250, 43_000, 0, 0, 0.125, 1, 250, 0, INVITED_AT, INVITED_AT),
            StreamRecord(LegName.CALLEE, 0, "audio", 249, 42_828, 1, 0, None, 1, 249, 2, None, None),
        ),
        media_interruptions=1,
        media_gap_s=0.25,
    )
    return replace(record, **changes)


def call_event(kind: CallEventKind, call_id: str = "call-1", elapsed_s: float = 0.0, **changes: Any) -> CallEvent:
    """An event of such a call; `ENDED` carries its record."""
    event = CallEvent(
        kind=kind,
        call_id=CallId(call_id),
        at=INVITED_AT,
        direction=CallDirection.INTERNAL,
        caller="1001",
        callee="1002",
        elapsed_s=elapsed_s,
        record=call_record(call_id) if kind is CallEventKind.ENDED else None,
    )
    return replace(event, **changes)
