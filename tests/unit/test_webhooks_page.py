"""docs/webhooks.md: its examples are what is sent, and its code does what it says."""

import json
import re
from base64 import b64encode
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook

from control.events.codec import encode
from control.events.webhook_client import cloud_event, signed_headers
from control.pbx.records import (
    EVENT_TYPES,
    CallEventKind,
    CallId,
    ErrorEvent,
    Event,
    LegName,
    RegistrationEvent,
    RegistrationEventKind,
    RegistrationView,
    UnregisterCause,
)
from control.store.events import StoredEvent
from tests.harness.records import INVITED_AT, call_event

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "webhooks.md").read_text()
SECRET = "whsec_" + b64encode(b"k" * 32).decode()

REGISTRATION = RegistrationView("1001", "sip:1001@192.0.2.10:5060", "192.0.2.10:5060", "phone/1.0", INVITED_AT)
SENT: dict[str, Event] = {
    "call.started": call_event(CallEventKind.STARTED),
    "call.ringing": call_event(CallEventKind.RINGING, leg=LegName.CALLEE),
    "call.answered": call_event(CallEventKind.ANSWERED),
    "call.ended": call_event(CallEventKind.ENDED),
    "user.registered": RegistrationEvent(RegistrationEventKind.REGISTERED, INVITED_AT, REGISTRATION),
    "user.unregistered": RegistrationEvent(
        RegistrationEventKind.UNREGISTERED, INVITED_AT, REGISTRATION, UnregisterCause.REMOVED
    ),
    "node.error": ErrorEvent(INVITED_AT, "webhook", "delivery-given-up", "a detail", CallId("call-1")),
}


def blocks(language: str, text: str = PAGE) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def shape(value: Any) -> Any:
    """The members of a document, whatever their values; of a list, those of its first entry."""
    if isinstance(value, dict):
        return {key: shape(member) for key, member in value.items()}
    return [shape(value[0])] if isinstance(value, list) else None


def test_page_has_each_type_once_in_the_order_of_the_code() -> None:
    assert re.findall(r"^### `([a-z.]+)`$", PAGE, re.MULTILINE) == list(EVENT_TYPES)


@pytest.mark.parametrize("event_type", EVENT_TYPES)
def test_the_example_of_a_type_has_the_members_that_are_sent(event_type: str) -> None:
    [section] = re.findall(rf"^### `{re.escape(event_type)}`$(.*?)(?=^### |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    [example] = blocks("json", section)
    assert shape(json.loads(example)) == shape(json.loads(encode(SENT[event_type])))


def test_the_example_of_a_request_has_the_members_that_are_sent() -> None:
    example = json.loads(blocks("json")[0])
    event = SENT["call.answered"]
    stored = StoredEvent(1041, "evt_1", "call.answered", INVITED_AT, "mEoPhpEpDX1p", encode(event))
    sent = json.loads(cloud_event(stored, "/sippbx/sip-pbx-0"))
    assert shape(example) == shape(sent)
    assert example["sequence"] == sent["sequence"]
    for member in example.keys() - {"specversion", "datacontenttype"}:
        assert f"| `{member}` |" in PAGE


@pytest.fixture
def is_genuine() -> Callable[[str, dict[str, str], bytes], bool]:
    names: dict[str, Any] = {}
    exec(blocks("python")[1], names)
    checker: Callable[[str, dict[str, str], bytes], bool] = names["is_genuine"]
    return checker


def test_the_check_by_hand_takes_what_is_genuine_and_nothing_else(
    is_genuine: Callable[[str, dict[str, str], bytes], bool],
) -> None:
    now = datetime.now(UTC)
    headers = signed_headers(Webhook(SECRET), "evt_1", b"{}", now)
    other_key = "whsec_" + b64encode(b"x" * 32).decode()
    assert is_genuine(SECRET, headers, b"{}")
    assert is_genuine(SECRET, {**headers, "webhook-signature": "v1,AAAA " + headers["webhook-signature"]}, b"{}")
    assert not is_genuine(other_key, headers, b"{}")
    assert not is_genuine(SECRET, headers, b"{ }")
    assert not is_genuine(SECRET, {**headers, "webhook-id": "evt_2"}, b"{}")
    old = signed_headers(Webhook(SECRET), "evt_1", b"{}", now - timedelta(minutes=6))
    assert not is_genuine(SECRET, old, b"{}")
