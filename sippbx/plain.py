"""Messages of the contracts as plain values, in the words of the HTTP API and of the call detail record.

..._time        the name of the HTTP API (invite_time is invited_at), RFC 3339 in UTC; None where it is absent
durations       seconds, `jitter` milliseconds; None where it is absent
enums           their words without prefix: RESULT_NO_ANSWER is no_answer, REASON_RING_TIMEOUT is ring-timeout;
                None where they are unspecified, the number where it is newer than this program
what may lack   None for an empty string
"""

from datetime import UTC, datetime, timedelta
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

CDR_VERSION = 1

_Field = Any
"""A field's descriptor; each implementation of protobuf has a type of its own for it."""

_NAMES = {
    "invite_time": "invited_at",
    "ring_time": "ringing_at",
    "answer_time": "answered_at",
    "end_time": "ended_at",
    "first_packet_time": "first_packet_at",
    "last_packet_time": "last_packet_at",
    "expire_time": "expires_at",
    "start_time": "started_at",
    "setup_duration": "setup_s",
    "talk_duration": "duration_s",
    "media_gap": "media_gap_s",
    "jitter": "jitter_ms",
    "LegRecord.leg": "name",
}
# An empty string means that there is none.
_OPTIONAL = {"LegRecord.trunk", "LegRecord.user", "NodeError.call_id"}
_OPTIONAL_ANYWHERE = {"user_agent"}
_WITH_HYPHENS = {"Reason"}


def plain(message: Message) -> dict[str, Any]:
    """The message as a dictionary of plain values; of a oneof, only what is set."""
    kind = message.DESCRIPTOR.name
    document: dict[str, Any] = {"version": CDR_VERSION} if kind == "CallRecord" else {}
    for field in message.DESCRIPTOR.fields:
        if field.containing_oneof is None or message.HasField(field.name):
            qualified = f"{kind}.{field.name}"
            name = _NAMES.get(qualified) or _NAMES.get(field.name, field.name)
            value = _value(message, field)
            optional = qualified in _OPTIONAL or field.name in _OPTIONAL_ANYWHERE
            document[name] = (value or None) if optional else value
    return document


def event(message: Any) -> dict[str, Any]:
    """A `sippbx.events.v1.Event`: sequence, id, type, at, node, and the `data` that belong to the type.

    The data of call.ended are the call detail record. An event that is newer than this program has no type and no data.
    """
    payload = message.WhichOneof("payload")
    data = {} if payload is None else plain(getattr(message, payload))
    return {
        "sequence": message.sequence,
        "id": message.id,
        "type": None if payload is None else payload.replace("_", ".", 1),
        "at": rfc3339(message.time.ToDatetime(UTC)),
        "node": message.node,
        "data": data.get("record", data),
    }


def _value(message: Message, field: _Field) -> Any:
    value = getattr(message, field.name)
    if field.is_repeated:
        return [_single(item, field) for item in value]
    if field.message_type is not None and not message.HasField(field.name):
        return None
    return _single(value, field)


def _single(value: Any, field: _Field) -> Any:
    if field.enum_type is not None:
        return _word(field.enum_type, value)
    if isinstance(value, Timestamp):
        return rfc3339(value.ToDatetime(UTC))
    if isinstance(value, Duration):
        return value.ToTimedelta() / timedelta(milliseconds=1 if field.name == "jitter" else 1000)
    return plain(value) if isinstance(value, Message) else value


def rfc3339(at: datetime) -> str:
    """A time in UTC as the call detail record has it."""
    return at.isoformat().replace("+00:00", "Z")


def _word(enum: Any, number: int) -> str | int | None:
    value = enum.values_by_number.get(number)
    if value is None:
        return number
    prefix, _, _ = enum.values_by_number[0].name.rpartition("UNSPECIFIED")
    word: str = value.name.removeprefix(prefix).lower()
    if word == "unspecified":
        return None
    return word.replace("_", "-") if enum.name in _WITH_HYPHENS else word
