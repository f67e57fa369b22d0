"""Hands each call event to everybody who asked for it, in the order in which they asked.

An observer is a plain callable that returns at once; one that has I/O to do queues the event and works in a task of its
own, so that a slow one delays nobody. Text from the wire is made valid Unicode here, once, because no observer could
write it otherwise.
"""

from collections.abc import Callable
from dataclasses import replace

import structlog

from control.metrics import ControlMetrics
from control.pbx.records import CallEvent, CallRecord, LegRecord

Observer = Callable[[CallEvent], None]

_log = structlog.get_logger(__name__)


class EventFanOut:
    """Delivers events to observers; an observer that raises is logged and counted and harms no other."""

    def __init__(self, metrics: ControlMetrics) -> None:
        self._metrics = metrics
        self._observers: list[tuple[str, Observer]] = []

    def subscribe(self, name: str, observer: Observer) -> None:
        """Add an observer; the name is for logs."""
        self._observers.append((name, observer))

    def publish(self, event: CallEvent) -> None:
        """Deliver one event."""
        event = replace(
            event,
            caller=_unicode(event.caller),
            callee=_unicode(event.callee),
            record=None if event.record is None else _unicode_record(event.record),
        )
        for name, observer in self._observers:
            try:
                observer(event)
            except Exception:  # noqa: BLE001 - the boundary
                # The boundary between the call and its observers: nothing that they do may end a call.
                self._metrics.error("events", "observer_failed")
                _log.exception("events.observer_failed", observer=name, call_id=event.call_id, kind=event.kind)


def _unicode(text: str) -> str:
    """Octets that were not UTF-8 arrive as lone surrogates (PEP 383); they become U+FFFD."""
    return text if text.isascii() else text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _optional(text: str | None) -> str | None:
    return None if text is None else _unicode(text)


def _unicode_record(record: CallRecord) -> CallRecord:
    return replace(
        record,
        caller=_unicode(record.caller),
        callee=_unicode(record.callee),
        termination=replace(record.termination, detail=_unicode(record.termination.detail)),
        legs=tuple(_unicode_leg(leg) for leg in record.legs),
    )


def _unicode_leg(leg: LegRecord) -> LegRecord:
    return replace(
        leg,
        sip_call_id=_unicode(leg.sip_call_id),
        from_uri=_unicode(leg.from_uri),
        to_uri=_unicode(leg.to_uri),
        user=_optional(leg.user),
        user_agent=_optional(leg.user_agent),
    )
