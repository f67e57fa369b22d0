"""Hands each event to everybody who asked for it, in the order in which they asked.

An observer is a plain callable that returns at once; one that has I/O to do queues the event and works in a task of its
own, so that a slow one delays nobody. Text from the wire is made valid Unicode here, once, because no observer could
write it otherwise.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Final, assert_never

import structlog

from control.metrics import ControlMetrics
from control.pbx.records import CallEvent, CallRecord, ErrorEvent, Event, LegRecord, RegistrationEvent, RegistrationView

ERROR_INTERVAL_S: Final = 10.0

Observer = Callable[[Event], None]

_log = structlog.get_logger(__name__)


class EventFanOut:
    """Delivers events to observers; an observer that raises is logged and counted and harms no other.

    An error that comes again within ten seconds is not delivered again: what fails in a loop must fill no disk.
    """

    def __init__(self, metrics: ControlMetrics) -> None:
        self._metrics = metrics
        self._observers: list[tuple[str, Observer]] = []
        self._errors: dict[tuple[str, str], ErrorEvent] = {}

    def subscribe(self, name: str, observer: Observer) -> None:
        """Add an observer; the name is for logs."""
        self._observers.append((name, observer))

    def publish(self, event: Event) -> None:
        """Deliver one event."""
        if isinstance(event, ErrorEvent) and self._is_repetition(event):
            return
        event = _in_unicode(event)
        for name, observer in self._observers:
            try:
                observer(event)
            except Exception:  # noqa: BLE001 - the boundary
                # The boundary between the call and its observers: nothing that they do may end a call.
                self._metrics.error("events", "observer_failed")
                _log.exception("events.observer_failed", observer=name, published=repr(event))

    def _is_repetition(self, event: ErrorEvent) -> bool:
        # Both words are literals of the code, so the table has an end.
        what = (event.component, event.kind)
        last = self._errors.get(what)
        if last is not None and abs((event.at - last.at).total_seconds()) < ERROR_INTERVAL_S:
            return True
        self._errors[what] = event
        return False


def _in_unicode(event: Event) -> Event:
    match event:
        case CallEvent():
            record = None if event.record is None else record_in_unicode(event.record)
            return replace(event, caller=_text(event.caller), callee=_text(event.callee), record=record)
        case RegistrationEvent():
            return replace(event, registration=_registration(event.registration))
        case ErrorEvent():
            return replace(event, detail=_text(event.detail))
        case _:
            assert_never(event)


def _text(text: str) -> str:
    """Octets that were not UTF-8 arrive as lone surrogates (PEP 383); they become U+FFFD."""
    return text if text.isascii() else text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _optional(text: str | None) -> str | None:
    return None if text is None else _text(text)


def _registration(registration: RegistrationView) -> RegistrationView:
    return replace(
        registration,
        user=_text(registration.user),
        contact=_text(registration.contact),
        user_agent=_optional(registration.user_agent),
    )


def record_in_unicode(record: CallRecord) -> CallRecord:
    """The record with text that can be written anywhere."""
    return replace(
        record,
        caller=_text(record.caller),
        callee=_text(record.callee),
        termination=replace(record.termination, detail=_text(record.termination.detail)),
        legs=tuple(_leg(leg) for leg in record.legs),
    )


def _leg(leg: LegRecord) -> LegRecord:
    return replace(
        leg,
        sip_call_id=_text(leg.sip_call_id),
        from_uri=_text(leg.from_uri),
        to_uri=_text(leg.to_uri),
        user=_optional(leg.user),
        user_agent=_optional(leg.user_agent),
    )
