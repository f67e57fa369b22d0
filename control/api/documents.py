"""What the HTTP API says, as JSON: in the words of the call detail record, times in UTC (RFC 3339)."""

from collections.abc import Callable
from typing import TypeVar

import orjson

from control.api.paging import Page
from control.api.service import NodeView
from control.events.cdr import cdr_document
from control.pbx.records import CallView, RegistrationView

T = TypeVar("T")


def call_document(call: CallView) -> dict[str, object]:
    """A call; `record` is its CDR once it has ended, and null before."""
    return {
        "call_id": call.call_id,
        "state": call.state,
        "direction": call.direction,
        "caller": valid_unicode(call.caller),
        "callee": valid_unicode(call.callee),
        "invited_at": call.invited_at,
        "ringing_at": call.ringing_at,
        "answered_at": call.answered_at,
        "record": None if call.record is None else cdr_document(call.record),
    }


def registration_document(registration: RegistrationView) -> dict[str, object]:
    """One phone of a user."""
    return {
        "user": registration.user,
        "contact": valid_unicode(registration.contact),
        "source": registration.source,
        "user_agent": None if registration.user_agent is None else valid_unicode(registration.user_agent),
        "expires_at": registration.expires_at,
    }


def node_document(node: NodeView) -> dict[str, object]:
    """The node."""
    return {
        "name": node.name,
        "version": node.version,
        "started_at": node.started_at,
        "ready": node.ready,
        "not_ready_reasons": node.not_ready_reasons,
        "draining": node.draining,
        "active_calls": node.active_calls,
        "max_calls": node.max_calls,
        "registrations": node.registrations,
    }


def page_document(name: str, page: Page[T], document: Callable[[T], object]) -> dict[str, object]:
    """One page of a list, under the name of what is listed; `next_page_token` is empty on the last."""
    return {name: [document(item) for item in page.items], "next_page_token": page.next_page_token}


def dump(document: object) -> bytes:
    """The document as JSON."""
    return orjson.dumps(document, option=orjson.OPT_UTC_Z)


def valid_unicode(text: str) -> str:
    """Octets of the wire that were not UTF-8 are lone surrogates (PEP 383), which JSON cannot carry."""
    return text if text.isascii() else text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
