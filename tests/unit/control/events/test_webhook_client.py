"""What is sent; test_webhook.py in the integration tests sends it."""

import json
from base64 import b64encode
from datetime import UTC, datetime, timedelta

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from control.events.webhook_client import cloud_event, signed_headers
from control.store.events import StoredEvent

AT = datetime(2026, 3, 1, 9, 30, 0, 250_000, tzinfo=UTC)
SECRET = "whsec_" + b64encode(b"k" * 32).decode()
EVENT = StoredEvent(42, "evt_call-1_ended", "call.ended", AT, "call-1", b'{"call_id":"call-1","duration_s":5.0}')


def test_the_body_is_a_cloud_event_in_json() -> None:
    assert json.loads(cloud_event(EVENT, "/sippbx/node-1")) == {
        "specversion": "1.0",
        "id": "evt_call-1_ended",
        "source": "/sippbx/node-1",
        "type": "sippbx.call.ended",
        "subject": "call-1",
        "time": "2026-03-01T09:30:00.250000Z",
        "sequence": "00000000000000000042",
        "datacontenttype": "application/json",
        "data": {"call_id": "call-1", "duration_s": 5.0},
    }


def test_an_event_without_a_call_has_no_subject() -> None:
    event = StoredEvent(43, "evt_x", "user.registered", AT, None, b"{}")
    assert "subject" not in json.loads(cloud_event(event, "/sippbx/node-1"))


def test_sequences_compare_as_text_as_they_do_as_numbers() -> None:
    texts = [
        json.loads(cloud_event(StoredEvent(number, "evt_x", "call.ended", AT, None, b"{}"), "/s"))["sequence"]
        for number in (9, 10, 100, 2**63 - 1)
    ]
    assert texts == sorted(texts)
    assert [int(text) for text in texts] == [9, 10, 100, 2**63 - 1]


def test_the_signature_is_one_that_the_library_verifies() -> None:
    body = cloud_event(EVENT, "/s")
    headers = signed_headers(Webhook(SECRET), EVENT.id, body, datetime.now(UTC))
    assert headers["webhook-id"] == EVENT.id
    assert Webhook(SECRET).verify(body, headers) == json.loads(body)
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(body.replace(b"5.0", b"6.0"), headers)


def test_an_attempt_is_signed_with_its_own_time() -> None:
    body = cloud_event(EVENT, "/s")
    first = signed_headers(Webhook(SECRET), EVENT.id, body, AT)
    second = signed_headers(Webhook(SECRET), EVENT.id, body, AT + timedelta(minutes=10))
    assert first["webhook-timestamp"] == "1772357400"
    assert int(second["webhook-timestamp"]) - int(first["webhook-timestamp"]) == 600
    assert first["webhook-signature"] != second["webhook-signature"]
