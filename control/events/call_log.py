"""A call's life in the log: one INFO line for each of its events."""

import structlog

from control.pbx.records import CallEvent, CallEventKind, Event

_log = structlog.get_logger("control.calls")


def log_call_event(event: Event) -> None:
    """Log `call.started`, `call.forwarded` (DEBUG), `call.ringing`, `call.answered` or `call.ended`."""
    if not isinstance(event, CallEvent):
        return
    fields: dict[str, object] = {
        "call_id": event.call_id,
        "direction": event.direction.value,
        "caller": event.caller,
        "callee": event.callee,
        "elapsed_s": round(event.elapsed_s, 3),
    }
    if event.record is not None:
        end = event.record.termination
        fields |= {
            "result": end.result.value,
            "reason": end.reason.value,
            "sip_status": end.sip_status,
            "ended_by": None if end.ended_by is None else end.ended_by.value,
            "detail": end.detail,
            "duration_s": round(event.record.duration_s, 3),
            "sip_call_ids": [leg.sip_call_id for leg in event.record.legs],
        }
    if event.kind is CallEventKind.FORWARDED:
        _log.debug(event.kind.value, **fields)
    else:
        _log.info(event.kind.value, **fields)
