"""From control.pbx.records to sippbx.control.v1 and sippbx.events.v1: the one place that knows both.

What is absent on one side is absent on the other. Text of the wire that was not UTF-8 (lone surrogates, PEP 383) cannot
travel in a message; its octets become U+FFFD.
"""

from datetime import datetime
from typing import assert_never

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from control.api.service import NodeView
from control.pbx.records import (
    CallDirection,
    CallEvent,
    CallEventKind,
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

STATES = {state: call_service_pb2.CallState.Value(f"CALL_STATE_{state.name}") for state in CallState}
DIRECTIONS = {
    direction: record_pb2.CallDirection.Value(f"CALL_DIRECTION_{direction.name}") for direction in CallDirection
}
LEGS = {leg: record_pb2.Leg.Value(f"LEG_{leg.name}") for leg in LegName}
RESULTS = {result: record_pb2.Result.Value(f"RESULT_{result.name}") for result in Result}
REASONS = {reason: record_pb2.Reason.Value(f"REASON_{reason.name}") for reason in Reason}
UNREGISTER_CAUSES = {
    cause: event_pb2.UnregisterCause.Value(f"UNREGISTER_CAUSE_{cause.name}") for cause in UnregisterCause
}


def call_to_wire(call: CallView) -> call_service_pb2.Call:
    """A call, running or ended."""
    return call_service_pb2.Call(
        call_id=call.call_id,
        state=STATES[call.state],
        direction=DIRECTIONS[call.direction],
        caller=_text(call.caller),
        callee=_text(call.callee),
        invite_time=_time(call.invited_at),
        ring_time=_time(call.ringing_at),
        answer_time=_time(call.answered_at),
        record=None if call.record is None else record_to_wire(call.record),
    )


def record_to_wire(record: CallRecord) -> record_pb2.CallRecord:
    """A call detail record."""
    return record_pb2.CallRecord(
        call_id=record.call_id,
        direction=DIRECTIONS[record.direction],
        caller=_text(record.caller),
        callee=_text(record.callee),
        invite_time=_time(record.invited_at),
        ring_time=_time(record.ringing_at),
        answer_time=_time(record.answered_at),
        end_time=_time(record.ended_at),
        setup_duration=_seconds(record.setup_s),
        talk_duration=_seconds(record.duration_s),
        termination=_termination(record.termination),
        legs=[_leg(leg) for leg in record.legs],
        streams=[_stream(stream) for stream in record.streams],
        media_complete=record.media_complete,
        media_interruptions=record.media_interruptions,
        media_gap=_seconds(record.media_gap_s),
    )


def registration_to_wire(registration: RegistrationView) -> registration_service_pb2.Registration:
    """One phone of a user."""
    return registration_service_pb2.Registration(
        user=_text(registration.user),
        contact=_text(registration.contact),
        source=registration.source,
        user_agent=_text(registration.user_agent),
        expire_time=_time(registration.expires_at),
    )


def node_to_wire(node: NodeView) -> node_service_pb2.Node:
    """The node."""
    return node_service_pb2.Node(
        name=node.name,
        version=node.version,
        start_time=_time(node.started_at),
        ready=node.ready,
        not_ready_reasons=node.not_ready_reasons,
        draining=node.draining,
        active_calls=node.active_calls,
        max_calls=node.max_calls,
        registrations=node.registrations,
    )


def event_to_wire(stored: StoredEvent, event: Event, node_name: str) -> event_pb2.Event:
    """An event with its place in the order of the node."""
    message = event_pb2.Event(sequence=stored.sequence, id=stored.id, time=_time(stored.at), node=node_name)
    match event:
        case CallEvent():
            _fill_call_event(message, event)
        case RegistrationEvent():
            _fill_registration_event(message, event)
        case ErrorEvent():
            message.node_error.component = event.component
            message.node_error.kind = event.kind
            message.node_error.detail = _text(event.detail)
            message.node_error.call_id = event.call_id or ""
        case _:
            assert_never(event)
    return message


def _fill_call_event(message: event_pb2.Event, event: CallEvent) -> None:
    call_id, direction = event.call_id, DIRECTIONS[event.direction]
    caller, callee = _text(event.caller), _text(event.callee)
    match event.kind:
        case CallEventKind.STARTED:
            message.call_started.CopyFrom(
                event_pb2.CallStarted(call_id=call_id, direction=direction, caller=caller, callee=callee)
            )
        case CallEventKind.RINGING:
            leg = _leg_name(event.leg)
            message.call_ringing.CopyFrom(
                event_pb2.CallRinging(call_id=call_id, direction=direction, caller=caller, callee=callee, leg=leg)
            )
        case CallEventKind.ANSWERED:
            message.call_answered.CopyFrom(
                event_pb2.CallAnswered(call_id=call_id, direction=direction, caller=caller, callee=callee)
            )
        case CallEventKind.ENDED:
            record = None if event.record is None else record_to_wire(event.record)
            message.call_ended.CopyFrom(event_pb2.CallEnded(record=record))
        case CallEventKind.FORWARDED:
            raise ValueError(f"{event.kind} is for the process alone")
        case _:
            assert_never(event.kind)


def _fill_registration_event(message: event_pb2.Event, event: RegistrationEvent) -> None:
    registration = registration_to_wire(event.registration)
    user, contact, source = registration.user, registration.contact, registration.source
    user_agent = registration.user_agent
    match event.kind:
        case RegistrationEventKind.REGISTERED:
            message.user_registered.CopyFrom(
                event_pb2.UserRegistered(
                    user=user,
                    contact=contact,
                    source=source,
                    user_agent=user_agent,
                    expire_time=registration.expire_time,
                )
            )
        case RegistrationEventKind.UNREGISTERED:
            cause = event_pb2.UNREGISTER_CAUSE_UNSPECIFIED if event.cause is None else UNREGISTER_CAUSES[event.cause]
            message.user_unregistered.CopyFrom(
                event_pb2.UserUnregistered(
                    user=user, contact=contact, source=source, user_agent=user_agent, cause=cause
                )
            )
        case _:
            assert_never(event.kind)


def _termination(end: Termination) -> record_pb2.Termination:
    return record_pb2.Termination(
        result=RESULTS[end.result],
        reason=REASONS[end.reason],
        sip_status=end.sip_status,
        ended_by=_leg_name(end.ended_by),
        detail=_text(end.detail),
    )


def _leg(leg: LegRecord) -> record_pb2.LegRecord:
    return record_pb2.LegRecord(
        leg=LEGS[leg.name],
        sip_call_id=_text(leg.sip_call_id),
        from_uri=_text(leg.from_uri),
        to_uri=_text(leg.to_uri),
        remote=leg.remote,
        trunk=_text(leg.trunk),
        user=_text(leg.user),
        user_agent=_text(leg.user_agent),
    )


def _stream(stream: StreamRecord) -> record_pb2.StreamRecord:
    return record_pb2.StreamRecord(
        leg=LEGS[stream.leg],
        line=stream.line,
        kind=stream.kind,
        packets=stream.packets,
        octets=stream.octets,
        lost=stream.lost,
        reordered=stream.reordered,
        jitter=None if stream.jitter_ms is None else _seconds(stream.jitter_ms / 1000),
        rtcp_packets=stream.rtcp_packets,
        relayed_packets=stream.relayed_packets,
        dropped_packets=stream.dropped_packets,
        first_packet_time=_time(stream.first_packet_at),
        last_packet_time=_time(stream.last_packet_at),
    )


def _leg_name(leg: LegName | None) -> record_pb2.Leg.ValueType:
    return record_pb2.LEG_UNSPECIFIED if leg is None else LEGS[leg]


def _text(text: str | None) -> str:
    if text is None or text.isascii():
        return text or ""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _time(at: datetime | None) -> Timestamp | None:
    if at is None:
        return None
    timestamp = Timestamp()
    timestamp.FromDatetime(at)
    return timestamp


def _seconds(seconds: float) -> Duration:
    duration = Duration()
    # To the microsecond, as in the record, so that both show the same.
    duration.FromMicroseconds(round(round(seconds, 6) * 1e6))
    return duration
