"""Translates between sippbx.media.v1 and the types of this plane.

What comes in is checked here as far as the types of this plane do not admit it at all; `validate` does the rest. Problems
are told by the field's path in the message.
"""

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Final, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from dataplane.service.events import Capacity, CapacityChanged, CloseReason, Record, SessionClosed
from dataplane.service.node import Refusal, RefusedError, SessionView
from dataplane.session import spec as wanted
from dataplane.session.relay import DropReason, FirstPacket, Resumed, Silence, SourceLatched, StreamSnapshot
from dataplane.session.spec import Address, InvalidSpecError, Leg, numeric, plan
from sippbx.media.v1 import event_pb2, media_service_pb2, node_pb2, session_pb2

Enum = TypeVar("Enum")
Utc = Callable[[float], datetime]
"""Turns monotonic seconds into a time of day."""

_LEGS: Final[Mapping[int, Leg]] = {session_pb2.LEG_CALLER: Leg.CALLER, session_pb2.LEG_CALLEE: Leg.CALLEE}
_KINDS: Final[Mapping[int, wanted.MediaKind]] = {
    session_pb2.MEDIA_KIND_AUDIO: wanted.MediaKind.AUDIO,
    session_pb2.MEDIA_KIND_VIDEO: wanted.MediaKind.VIDEO,
}
_MODES: Final[Mapping[int, wanted.MediaMode]] = {session_pb2.MEDIA_MODE_BYPASS: wanted.MediaMode.BYPASS}
_DIRECTIONS: Final[Mapping[int, wanted.Direction]] = {
    session_pb2.DIRECTION_SENDRECV: wanted.Direction.SENDRECV,
    session_pb2.DIRECTION_SENDONLY: wanted.Direction.SENDONLY,
    session_pb2.DIRECTION_RECVONLY: wanted.Direction.RECVONLY,
    session_pb2.DIRECTION_INACTIVE: wanted.Direction.INACTIVE,
}
_POLICIES: Final[Mapping[int, wanted.LatchPolicy]] = {
    session_pb2.LATCH_POLICY_STRICT: wanted.LatchPolicy.STRICT,
    session_pb2.LATCH_POLICY_NAT_AWARE: wanted.LatchPolicy.NAT_AWARE,
}
_LEG_NUMBERS: Final = {Leg.CALLER: session_pb2.LEG_CALLER, Leg.CALLEE: session_pb2.LEG_CALLEE}
_KIND_NUMBERS: Final = {
    wanted.MediaKind.AUDIO: session_pb2.MEDIA_KIND_AUDIO,
    wanted.MediaKind.VIDEO: session_pb2.MEDIA_KIND_VIDEO,
}
_MODE_NUMBERS: Final = {wanted.MediaMode.BYPASS: session_pb2.MEDIA_MODE_BYPASS}
_DIRECTION_NUMBERS: Final = {
    wanted.Direction.SENDRECV: session_pb2.DIRECTION_SENDRECV,
    wanted.Direction.SENDONLY: session_pb2.DIRECTION_SENDONLY,
    wanted.Direction.RECVONLY: session_pb2.DIRECTION_RECVONLY,
    wanted.Direction.INACTIVE: session_pb2.DIRECTION_INACTIVE,
}
_POLICY_NUMBERS: Final = {
    wanted.LatchPolicy.STRICT: session_pb2.LATCH_POLICY_STRICT,
    wanted.LatchPolicy.NAT_AWARE: session_pb2.LATCH_POLICY_NAT_AWARE,
}
_DROP_NUMBERS: Final = {
    DropReason.UNKNOWN_SOURCE: session_pb2.DROP_REASON_UNKNOWN_SOURCE,
    DropReason.BAD_HEADER: session_pb2.DROP_REASON_BAD_HEADER,
    DropReason.PAYLOAD_TYPE: session_pb2.DROP_REASON_PAYLOAD_TYPE,
    DropReason.NO_PEER: session_pb2.DROP_REASON_NO_PEER,
    DropReason.DIRECTION: session_pb2.DROP_REASON_DIRECTION,
    DropReason.SEND_FAILED: session_pb2.DROP_REASON_SEND_FAILED,
    DropReason.TOO_BIG: session_pb2.DROP_REASON_TOO_BIG,
}
_CLOSE_NUMBERS: Final = {
    CloseReason.DELETED: event_pb2.CLOSE_REASON_DELETED,
    CloseReason.OWNER_LOST: event_pb2.CLOSE_REASON_OWNER_LOST,
    CloseReason.WORKER_LOST: event_pb2.CLOSE_REASON_WORKER_LOST,
    CloseReason.SHUTDOWN: event_pb2.CLOSE_REASON_SHUTDOWN,
}
_ERROR_NUMBERS: Final = {
    Refusal.INVALID_ARGUMENT: node_pb2.ERROR_REASON_INVALID_ARGUMENT,
    Refusal.PORTS_EXHAUSTED: node_pb2.ERROR_REASON_PORTS_EXHAUSTED,
    Refusal.BIND_FAILED: node_pb2.ERROR_REASON_BIND_FAILED,
    Refusal.ADDRESS_NOT_LOCAL: node_pb2.ERROR_REASON_ADDRESS_NOT_LOCAL,
    Refusal.BLOCK_UNAVAILABLE: node_pb2.ERROR_REASON_BLOCK_UNAVAILABLE,
    Refusal.STALE_GENERATION: node_pb2.ERROR_REASON_STALE_GENERATION,
    Refusal.FENCED: node_pb2.ERROR_REASON_FENCED,
    Refusal.UNKNOWN_SESSION: node_pb2.ERROR_REASON_UNKNOWN_SESSION,
    Refusal.SESSION_DELETED: node_pb2.ERROR_REASON_SESSION_DELETED,
    Refusal.DRAINING: node_pb2.ERROR_REASON_DRAINING,
    Refusal.DEADLINE_EXCEEDED: node_pb2.ERROR_REASON_DEADLINE_EXCEEDED,
    Refusal.UNSUPPORTED: node_pb2.ERROR_REASON_UNSUPPORTED,
    Refusal.INTERNAL: node_pb2.ERROR_REASON_INTERNAL,
}


def spec_from(message: session_pb2.SessionSpec) -> wanted.SessionSpec:
    """Return the wanted state in a message. Raises RefusedError, INVALID_ARGUMENT or UNSUPPORTED."""
    try:
        endpoints = [_endpoint_from(entry, f"endpoints[{i}]") for i, entry in enumerate(message.endpoints)]
        mode = _enum(_MODES, message.mode, "mode")
    except InvalidSpecError as error:
        raise RefusedError(Refusal.INVALID_ARGUMENT, f"spec.{error}") from error
    return wanted.SessionSpec(
        session_id=message.session_id,
        generation=message.generation,
        mode=mode,
        endpoints=tuple(sorted(endpoints, key=lambda entry: (entry.leg, entry.line, entry.branch))),
        selected_branch=message.selected_branch,
    )


def session_to(view: SessionView, utc: Utc) -> session_pb2.Session:
    """Return the message of a session."""
    message = session_pb2.Session(
        session_id=view.spec.session_id,
        generation=view.spec.generation,
        first_port=view.block.first,
        block_size=view.block.size,
        local_endpoints=[
            session_pb2.LocalEndpoint(
                leg=_LEG_NUMBERS[port.leg],
                line=port.line,
                address=port.local_address,
                rtp_port=port.rtp_port,
                rtcp_port=port.rtcp_port,
            )
            for port in plan(view.spec, view.block).ports
        ],
        spec=_spec_to(view.spec),
        statistics=[_stream_to(stream, utc) for stream in view.streams],
    )
    message.create_time.FromDatetime(view.created_at)
    return message


def event_to(record: Record, utc: Utc) -> event_pb2.MediaEvent:
    """Return the message of an event."""
    message = event_pb2.MediaEvent(sequence=record.sequence)
    message.event_time.FromDatetime(record.at)
    match record.event:
        case FirstPacket(session_id, _, leg, line, source):
            first = event_pb2.FirstPacket(leg=_LEG_NUMBERS[leg], line=line, source=_address_to(source))
            message.session_id = session_id
            message.first_packet.CopyFrom(first)
        case SourceLatched(session_id, _, leg, line, source, differs):
            latched = event_pb2.SourceLatched(
                leg=_LEG_NUMBERS[leg], line=line, source=_address_to(source), differs_from_signalled=differs
            )
            message.session_id = session_id
            message.source_latched.CopyFrom(latched)
        case Silence(session_id, _, leg, line, last_packet_at):
            silence = event_pb2.Silence(
                leg=_LEG_NUMBERS[leg], line=line, last_packet_time=_time_to(last_packet_at, utc)
            )
            message.session_id = session_id
            message.silence.CopyFrom(silence)
        case Resumed(session_id, _, leg, line):
            message.session_id = session_id
            message.resumed.CopyFrom(event_pb2.Resumed(leg=_LEG_NUMBERS[leg], line=line))
        case SessionClosed(session_id, reason, streams):
            statistics = [_stream_to(stream, utc) for stream in streams]
            message.session_id = session_id
            message.session_closed.CopyFrom(
                event_pb2.SessionClosed(reason=_CLOSE_NUMBERS[reason], statistics=statistics)
            )
        case CapacityChanged(capacity):
            message.capacity_changed.CopyFrom(event_pb2.CapacityChanged(capacity=capacity_to(capacity)))
    return message


def events_lost_to(next_sequence: int, at: datetime) -> event_pb2.MediaEvent:
    """Return the message that tells a watcher of a gap; a watcher that resumes after it gets what there still is."""
    message = event_pb2.MediaEvent(
        sequence=next_sequence - 1, events_lost=event_pb2.EventsLost(next_sequence=next_sequence)
    )
    message.event_time.FromDatetime(at)
    return message


def capacity_to(capacity: Capacity) -> node_pb2.Capacity:
    """Return the message of the capacity."""
    return node_pb2.Capacity(
        blocks_total=capacity.blocks_total,
        blocks_in_use=capacity.blocks_in_use,
        blocks_resting=capacity.blocks_resting,
        blocks_free=capacity.blocks_free,
        block_size=capacity.block_size,
        first_port=capacity.first_port,
        last_port=capacity.last_port,
        accepting=capacity.accepting,
        not_accepting_reason=capacity.not_accepting_reason,
    )


def error_to(error: RefusedError) -> node_pb2.Error:
    """Return the message of a refusal."""
    return node_pb2.Error(reason=_ERROR_NUMBERS[error.refusal], message=error.message)


def timeout_of(command: media_service_pb2.Command) -> float:
    """Return how long a command's result is worth waiting for, in seconds."""
    if not command.HasField("timeout"):
        return 5.0
    return max(0.0, command.timeout.ToTimedelta().total_seconds())


def _enum(values: Mapping[int, Enum], number: int, field: str, default: Enum | None = None) -> Enum:
    if number == 0 and default is not None:
        return default
    if number == 0:
        raise InvalidSpecError(field, "is required")
    if number not in values:
        raise RefusedError(Refusal.UNSUPPORTED, f"spec.{field}: {number} is not known to this version")
    return values[number]


def _endpoint_from(message: session_pb2.Endpoint, where: str) -> wanted.Endpoint:
    kind = _enum(_KINDS, message.kind, f"{where}.kind")
    signalling = message.signalling_address
    for entry in message.payload_types:
        if entry.number > 127:
            raise InvalidSpecError(f"{where}.payload_types", f"{entry.number} is above 127")
    return wanted.Endpoint(
        leg=_enum(_LEGS, message.leg, f"{where}.leg"),
        line=message.line,
        branch=message.branch,
        kind=kind,
        local_address=numeric(f"{where}.local_address", message.local_address),
        remote_rtp=_remote_from(message, "remote_rtp", where),
        remote_rtcp=_remote_from(message, "remote_rtcp", where),
        rtcp_mux=message.rtcp_mux,
        direction=_enum(_DIRECTIONS, message.direction, f"{where}.direction", wanted.Direction.SENDRECV),
        latch_policy=_enum(_POLICIES, message.latch_policy, f"{where}.latch_policy", wanted.LatchPolicy.NAT_AWARE),
        signalling_address=numeric(f"{where}.signalling_address", signalling) if signalling else "",
        payload_types=tuple(
            wanted.PayloadType(entry.number, entry.encoding_name, entry.clock_rate) for entry in message.payload_types
        ),
    )


def _remote_from(message: session_pb2.Endpoint, field: str, where: str) -> Address | None:
    if not message.HasField(field):
        return None
    remote: session_pb2.SocketAddress = getattr(message, field)
    if not 1 <= remote.port <= 65535:
        raise InvalidSpecError(f"{where}.{field}.port", f"{remote.port} is not between 1 and 65535")
    return numeric(f"{where}.{field}.address", remote.address), remote.port


def _spec_to(spec: wanted.SessionSpec) -> session_pb2.SessionSpec:
    return session_pb2.SessionSpec(
        session_id=spec.session_id,
        generation=spec.generation,
        mode=_MODE_NUMBERS[spec.mode],
        endpoints=[_endpoint_to(endpoint) for endpoint in spec.endpoints],
        selected_branch=spec.selected_branch,
    )


def _endpoint_to(endpoint: wanted.Endpoint) -> session_pb2.Endpoint:
    return session_pb2.Endpoint(
        leg=_LEG_NUMBERS[endpoint.leg],
        line=endpoint.line,
        branch=endpoint.branch,
        kind=_KIND_NUMBERS[endpoint.kind],
        local_address=endpoint.local_address,
        remote_rtp=_address_to(endpoint.remote_rtp),
        remote_rtcp=_address_to(endpoint.remote_rtcp),
        rtcp_mux=endpoint.rtcp_mux,
        direction=_DIRECTION_NUMBERS[endpoint.direction],
        latch_policy=_POLICY_NUMBERS[endpoint.latch_policy],
        signalling_address=endpoint.signalling_address,
        payload_types=[
            session_pb2.PayloadType(number=entry.number, encoding_name=entry.encoding_name, clock_rate=entry.clock_rate)
            for entry in endpoint.payload_types
        ],
    )


def _stream_to(stream: StreamSnapshot, utc: Utc) -> session_pb2.StreamStatistics:
    return session_pb2.StreamStatistics(
        leg=_LEG_NUMBERS[stream.leg],
        line=stream.line,
        packets=stream.packets,
        octets=stream.octets,
        lost=stream.lost,
        reordered=stream.reordered,
        jitter=_duration_to(stream.jitter_s),
        rtcp_packets=stream.rtcp_packets,
        relayed_packets=stream.relayed_rtp + stream.relayed_rtcp,
        first_packet_time=_time_to(stream.first_at, utc),
        last_packet_time=_time_to(stream.last_at, utc),
        ssrc=stream.ssrc,
        drops=[
            session_pb2.DropCount(reason=_DROP_NUMBERS[reason], packets=packets) for reason, packets in stream.drops
        ],
        source=_address_to(stream.source),
    )


def _address_to(address: Address | None) -> session_pb2.SocketAddress | None:
    return None if address is None else session_pb2.SocketAddress(address=address[0], port=address[1])


def _time_to(at: float | None, utc: Utc) -> Timestamp | None:
    if at is None:
        return None
    message = Timestamp()
    message.FromDatetime(utc(at))
    return message


def _duration_to(seconds: float | None) -> Duration | None:
    if seconds is None:
        return None
    message = Duration()
    message.FromTimedelta(timedelta(seconds=seconds))
    return message
