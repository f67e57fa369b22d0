"""Between the values of the PBX and the contracts: nothing is lost, nothing is made up."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum

import pytest
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.message import Message

from control.api import wire
from control.api.service import NodeView
from control.pbx.records import (
    CallDirection,
    CallEventKind,
    CallId,
    CallRecord,
    CallState,
    CallView,
    ErrorEvent,
    Event,
    LegName,
    LegRecord,
    Reason,
    RegistrationEvent,
    RegistrationEventKind,
    RegistrationView,
    Result,
    StreamRecord,
    Termination,
    UnregisterCause,
)
from control.store.events import StoredEvent
from sippbx.control.v1 import call_service_pb2, node_service_pb2, registration_service_pb2
from sippbx.events.v1 import event_pb2, record_pb2
from tests.harness.records import call_event, call_record

AT = datetime(2026, 3, 1, 9, 30, 0, 123_456, tzinfo=UTC)
REGISTRATION = RegistrationView("1001", "sip:1001@192.0.2.1", "192.0.2.1:5060", "phone/1", AT)


@pytest.mark.parametrize(
    ("ours", "table", "theirs"),
    [
        (CallState, wire.STATES, call_service_pb2.CallState),
        (CallDirection, wire.DIRECTIONS, record_pb2.CallDirection),
        (LegName, wire.LEGS, record_pb2.Leg),
        (Result, wire.RESULTS, record_pb2.Result),
        (Reason, wire.REASONS, record_pb2.Reason),
        (UnregisterCause, wire.UNREGISTER_CAUSES, event_pb2.UnregisterCause),
    ],
)
def test_words_are_the_same_on_both_sides(
    ours: Iterable[StrEnum], table: Mapping[StrEnum, int], theirs: EnumTypeWrapper
) -> None:
    assert set(table) == set(ours)
    assert sorted(table.values()) == sorted(set(theirs.values()) - {0})
    prefix = theirs.Name(0).removesuffix("UNSPECIFIED")
    for word, value in table.items():
        assert theirs.Name(value) == prefix + word.value.upper().replace("-", "_")


def absent(message: Message, path: str = "") -> Iterator[str]:
    """The fields that are not set, or empty, in the message and all that is in it."""
    set_fields = {field.name: value for field, value in message.ListFields()}
    for field in message.DESCRIPTOR.fields:
        if field.containing_oneof is not None and field.name not in set_fields:
            continue
        where = f"{path}{field.name}"
        value = set_fields.get(field.name)
        if value is None:
            yield where
        elif isinstance(value, Message):
            if not value.DESCRIPTOR.full_name.startswith("google."):
                yield from absent(value, f"{where}.")
        elif field.is_repeated and field.message_type is not None:
            for item in value:
                yield from absent(item, f"{where}.")


FULL_STREAM = StreamRecord(LegName.CALLEE, 1, "video", 2, 3, -4, 5, 6.5, 7, 8, 9, AT, AT + timedelta(seconds=1))
FULL_LEG = LegRecord(LegName.CALLER, "a@x", "sip:a", "sip:b", "192.0.2.1:5060", "carrier", "1001", "phone/1")
FULL_RECORD = call_record(
    direction=CallDirection.OUTBOUND,
    termination=Termination(Result.FAILED, Reason.MEDIA_LOST, 500, LegName.CALLEE, "it broke"),
    legs=(FULL_LEG,),
    streams=(FULL_STREAM,),
)
FULL_CALL = replace(CallView.of_record(FULL_RECORD), state=CallState.RELEASING)
FULL_NODE = NodeView("node-1", "1.2.3", AT, True, ("because",), True, 1, 2, 3)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (FULL_STREAM, wire.record_to_wire(FULL_RECORD).streams[0]),
        (FULL_LEG, wire.record_to_wire(FULL_RECORD).legs[0]),
        (FULL_RECORD.termination, wire.record_to_wire(FULL_RECORD).termination),
        (FULL_RECORD, wire.record_to_wire(FULL_RECORD)),
        (FULL_CALL, wire.call_to_wire(FULL_CALL)),
        (REGISTRATION, wire.registration_to_wire(REGISTRATION)),
        (FULL_NODE, wire.node_to_wire(FULL_NODE)),
    ],
)
def test_every_field_reaches_the_message(
    value: StreamRecord | LegRecord | Termination | CallRecord | CallView | RegistrationView | NodeView,
    message: Message,
) -> None:
    assert list(absent(message)) == []
    assert len(message.DESCRIPTOR.fields) == len(fields(value))


def test_record_is_written_as_it_is() -> None:
    message = wire.record_to_wire(FULL_RECORD)
    assert message.call_id == "call-1"
    assert message.direction == record_pb2.CALL_DIRECTION_OUTBOUND
    assert (message.caller, message.callee) == ("1001", "1002")
    assert message.invite_time.ToDatetime(UTC) == FULL_RECORD.invited_at
    assert message.ring_time.ToDatetime(UTC) == FULL_RECORD.ringing_at
    assert message.answer_time.ToDatetime(UTC) == FULL_RECORD.answered_at
    assert message.end_time.ToDatetime(UTC) == FULL_RECORD.ended_at
    assert message.setup_duration.ToTimedelta() == timedelta(seconds=3)
    assert message.talk_duration.ToTimedelta() == timedelta(seconds=5)
    assert message.media_complete
    assert message.termination == record_pb2.Termination(
        result=record_pb2.RESULT_FAILED,
        reason=record_pb2.REASON_MEDIA_LOST,
        sip_status=500,
        ended_by=record_pb2.LEG_CALLEE,
        detail="it broke",
    )
    assert list(message.legs) == [
        record_pb2.LegRecord(
            leg=record_pb2.LEG_CALLER,
            sip_call_id="a@x",
            from_uri="sip:a",
            to_uri="sip:b",
            remote="192.0.2.1:5060",
            trunk="carrier",
            user="1001",
            user_agent="phone/1",
        )
    ]
    [stream] = message.streams
    assert (stream.leg, stream.line, stream.kind) == (record_pb2.LEG_CALLEE, 1, "video")
    assert (stream.packets, stream.octets, stream.lost, stream.reordered) == (2, 3, -4, 5)
    assert stream.jitter.ToTimedelta() == timedelta(milliseconds=6.5)
    assert (stream.rtcp_packets, stream.relayed_packets, stream.dropped_packets) == (7, 8, 9)
    assert stream.first_packet_time.ToDatetime(UTC) == AT
    assert stream.last_packet_time.ToDatetime(UTC) == AT + timedelta(seconds=1)


def test_what_did_not_happen_is_absent() -> None:
    stream = replace(FULL_STREAM, jitter_ms=None, first_packet_at=None, last_packet_at=None)
    unanswered = call_record(
        ringing_at=None,
        answered_at=None,
        termination=Termination(Result.REJECTED, Reason.CALL_LIMIT, 503),
        legs=(replace(FULL_LEG, trunk=None, user=None, user_agent=None),),
        streams=(stream,),
    )
    record = wire.record_to_wire(unanswered)
    assert set(absent(record)) == {
        "ring_time",
        "answer_time",
        "termination.ended_by",
        "termination.detail",
        "legs.trunk",
        "legs.user",
        "legs.user_agent",
        "streams.jitter",
        "streams.first_packet_time",
        "streams.last_packet_time",
    }
    call = CallView(CallId("c1"), CallState.CALLING, CallDirection.INTERNAL, "1001", "1002", AT)
    assert set(absent(wire.call_to_wire(call))) == {"ring_time", "answer_time", "record"}


def event_message(event: Event) -> event_pb2.Event:
    kind = "node.error" if isinstance(event, ErrorEvent) else event.kind.value
    return wire.event_to_wire(StoredEvent(7, "evt_7", kind, event.at, None, b"{}"), event, "node-1")


@pytest.mark.parametrize(
    "event",
    [
        call_event(CallEventKind.STARTED),
        call_event(CallEventKind.RINGING, leg=LegName.CALLEE),
        call_event(CallEventKind.ANSWERED),
        call_event(CallEventKind.ENDED, record=FULL_RECORD),
        RegistrationEvent(RegistrationEventKind.REGISTERED, AT, REGISTRATION),
        RegistrationEvent(RegistrationEventKind.UNREGISTERED, AT, REGISTRATION, UnregisterCause.EXPIRED),
        ErrorEvent(AT, "media", "connection-lost", "the data plane is away", CallId("c1")),
    ],
)
def test_every_kind_of_event_is_written_whole(event: Event) -> None:
    message = event_message(event)
    assert list(absent(message)) == []
    assert (message.sequence, message.id, message.node) == (7, "evt_7", "node-1")
    assert message.time.ToDatetime(UTC) == event.at
    payload = message.WhichOneof("payload")
    kind = "node.error" if isinstance(event, ErrorEvent) else event.kind.value
    assert payload == kind.replace(".", "_")


def test_events_carry_their_parties_and_sides() -> None:
    ringing = event_message(call_event(CallEventKind.RINGING, leg=LegName.CALLER)).call_ringing
    assert (ringing.call_id, ringing.caller, ringing.callee) == ("call-1", "1001", "1002")
    assert ringing.leg == record_pb2.LEG_CALLER
    gone = RegistrationEvent(RegistrationEventKind.UNREGISTERED, AT, REGISTRATION, UnregisterCause.REMOVED)
    unregistered = event_message(gone).user_unregistered
    assert (unregistered.user, unregistered.contact) == ("1001", "sip:1001@192.0.2.1")
    assert unregistered.cause == event_pb2.UNREGISTER_CAUSE_REMOVED


def test_registration_and_node_are_written_as_they_are() -> None:
    registration = wire.registration_to_wire(replace(REGISTRATION, user_agent=None))
    assert registration == registration_service_pb2.Registration(
        user="1001",
        contact="sip:1001@192.0.2.1",
        source="192.0.2.1:5060",
        expire_time=registration.expire_time,
    )
    assert registration.expire_time.ToDatetime(UTC) == AT
    node = wire.node_to_wire(FULL_NODE)
    assert node == node_service_pb2.Node(
        name="node-1",
        version="1.2.3",
        start_time=node.start_time,
        ready=True,
        not_ready_reasons=["because"],
        draining=True,
        active_calls=1,
        max_calls=2,
        registrations=3,
    )


def test_octets_that_are_no_unicode_are_told_all_the_same() -> None:
    call = CallView(CallId("c1"), CallState.CALLING, CallDirection.INTERNAL, "\udcff1", "ö", AT)
    message = wire.call_to_wire(call)
    assert (message.caller, message.callee) == ("\N{REPLACEMENT CHARACTER}1", "ö")
