"""Between control.pbx.media and sippbx.media.v1: the one place that knows both."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from control.pbx.media import (
    LatchPolicy,
    LearnedSource,
    LocalPorts,
    MediaEndpoint,
    MediaFailure,
    MediaKind,
    MediaMode,
    MediaSpec,
)
from control.pbx.records import LegName, StreamRecord
from control.sip.address import Address
from control.sip.sdp import Direction
from sippbx.media.v1 import event_pb2, media_service_pb2, node_pb2, session_pb2

_LEGS = {LegName.CALLER: session_pb2.LEG_CALLER, LegName.CALLEE: session_pb2.LEG_CALLEE}
_LEG_NAMES = {wire: leg for leg, wire in _LEGS.items()}
_KINDS = {MediaKind.AUDIO: session_pb2.MEDIA_KIND_AUDIO, MediaKind.VIDEO: session_pb2.MEDIA_KIND_VIDEO}
_KIND_NAMES = {wire: kind for kind, wire in _KINDS.items()}
_MODES = {MediaMode.BYPASS: session_pb2.MEDIA_MODE_BYPASS}
_LATCH_POLICIES = {
    LatchPolicy.STRICT: session_pb2.LATCH_POLICY_STRICT,
    LatchPolicy.NAT_AWARE: session_pb2.LATCH_POLICY_NAT_AWARE,
}
_DIRECTIONS = {
    Direction.SENDRECV: session_pb2.DIRECTION_SENDRECV,
    Direction.SENDONLY: session_pb2.DIRECTION_SENDONLY,
    Direction.RECVONLY: session_pb2.DIRECTION_RECVONLY,
    Direction.INACTIVE: session_pb2.DIRECTION_INACTIVE,
}
# What is not listed was refused for what it asked and will be again.
_FAILURES = {
    node_pb2.ERROR_REASON_PORTS_EXHAUSTED: MediaFailure.PORTS_EXHAUSTED,
    node_pb2.ERROR_REASON_DRAINING: MediaFailure.UNAVAILABLE,
    node_pb2.ERROR_REASON_DEADLINE_EXCEEDED: MediaFailure.UNAVAILABLE,
    node_pb2.ERROR_REASON_FENCED: MediaFailure.UNAVAILABLE,
    node_pb2.ERROR_REASON_INTERNAL: MediaFailure.UNAVAILABLE,
}
_SESSION_GONE = frozenset({node_pb2.ERROR_REASON_UNKNOWN_SESSION, node_pb2.ERROR_REASON_SESSION_DELETED})


@dataclass(frozen=True, slots=True)
class SessionState:
    """A session as the data plane says it is; `streams` is filled by deletes."""

    first_port: int
    ports: tuple[LocalPorts, ...]
    streams: tuple[StreamRecord, ...]


@dataclass(frozen=True, slots=True)
class HeldSession:
    """What the data plane holds under a session's id; `content` is all of its wanted state but the generation."""

    generation: int
    content: bytes


@dataclass(frozen=True, slots=True)
class CommandError:
    """Why a command was not carried out. `code` is the contract's word for it, for metrics."""

    code: str
    failure: MediaFailure
    detail: str
    session_gone: bool = False
    fenced: bool = False


def spec_to_wire(spec: MediaSpec) -> session_pb2.SessionSpec:
    """The wanted state of a session."""
    return session_pb2.SessionSpec(
        session_id=spec.session_id,
        generation=spec.generation,
        mode=_MODES[spec.mode],
        endpoints=[_endpoint_to_wire(endpoint) for endpoint in spec.endpoints],
        selected_branch=spec.selected_branch,
    )


def held_from_wire(session: session_pb2.Session) -> HeldSession:
    """What the data plane holds."""
    return HeldSession(session.generation, _content(session.spec))


def is_held(held: HeldSession, spec: MediaSpec) -> bool:
    """Whether what the data plane holds is what is wanted, under whichever generation."""
    return held.content == _content(spec_to_wire(spec))


def _content(spec: session_pb2.SessionSpec) -> bytes:
    """A form that is equal for equal content; the order of endpoints has no meaning."""
    endpoints = sorted(spec.endpoints, key=lambda endpoint: (endpoint.leg, endpoint.line, endpoint.branch))
    content = session_pb2.SessionSpec(
        session_id=spec.session_id, mode=spec.mode, endpoints=endpoints, selected_branch=spec.selected_branch
    )
    return content.SerializeToString(deterministic=True)


def learned_to_wire(source: LearnedSource) -> session_pb2.LearnedSource:
    """A source that was locked before."""
    return session_pb2.LearnedSource(
        leg=_LEGS[source.leg],
        line=source.line,
        signalled=_address_to_wire(source.signalled),
        rtp=_address_to_wire(source.rtp),
        rtcp=_address_to_wire(source.rtcp),
    )


def learned_from_wire(event: event_pb2.SourceLatched) -> LearnedSource | None:
    """A source that was locked; None from a data plane of an earlier version, which does not say what was signalled."""
    if event.leg not in _LEG_NAMES or not event.HasField("signalled"):
        return None
    return LearnedSource(
        _LEG_NAMES[event.leg],
        event.line,
        _address_from_wire(event.signalled),
        _address_from_wire(event.source) if event.HasField("source") else None,
        _address_from_wire(event.rtcp_source) if event.HasField("rtcp_source") else None,
    )


def _address_from_wire(address: session_pb2.SocketAddress) -> Address:
    return Address(address.address, address.port)


def _endpoint_to_wire(endpoint: MediaEndpoint) -> session_pb2.Endpoint:
    return session_pb2.Endpoint(
        leg=_LEGS[endpoint.leg],
        line=endpoint.line,
        branch=endpoint.branch,
        kind=_KINDS[endpoint.kind],
        local_address=endpoint.local_address,
        remote_rtp=_address_to_wire(endpoint.remote_rtp),
        remote_rtcp=_address_to_wire(endpoint.remote_rtcp),
        rtcp_mux=endpoint.rtcp_mux,
        direction=_DIRECTIONS[endpoint.direction],
        latch_policy=_LATCH_POLICIES[endpoint.latch_policy],
        signalling_address=endpoint.signalling_address,
        payload_types=[
            session_pb2.PayloadType(
                number=payload.number, encoding_name=payload.encoding_name, clock_rate=payload.clock_rate
            )
            for payload in endpoint.payload_types
        ],
    )


def _address_to_wire(address: Address | None) -> session_pb2.SocketAddress | None:
    return None if address is None else session_pb2.SocketAddress(address=address.host, port=address.port)


def duration_to_wire(seconds: float) -> Duration:
    """A span of time, never negative."""
    duration = Duration()
    duration.FromMilliseconds(max(0, int(seconds * 1000)))
    return duration


def outcome_from_wire(result: media_service_pb2.CommandResult) -> SessionState | CommandError:
    """What became of a command."""
    if result.WhichOneof("outcome") == "session":
        session = result.session
        return SessionState(session.first_port, _ports(session.local_endpoints), _streams(session))
    return error_from_wire(result.error)


def error_from_wire(error: node_pb2.Error) -> CommandError:
    """Why something was refused; a reason that a newer data plane may have is a refusal like any other."""
    return CommandError(
        code=reason_name(error.reason),
        failure=_FAILURES.get(error.reason, MediaFailure.REFUSED),
        detail=error.message or reason_name(error.reason),
        session_gone=error.reason in _SESSION_GONE,
        fenced=error.reason == node_pb2.ERROR_REASON_FENCED,
    )


def reason_name(reason: node_pb2.ErrorReason.ValueType) -> str:
    """The reason as logs and metrics write it: `ports_exhausted`; `other` for one that this version does not know."""
    if reason not in node_pb2.ErrorReason.values():
        return "other"
    return node_pb2.ErrorReason.Name(reason).removeprefix("ERROR_REASON_").lower()


def leg_name(leg: session_pb2.Leg.ValueType) -> str:
    """The leg as logs write it."""
    return _LEG_NAMES[leg].value if leg in _LEG_NAMES else "unspecified"


def close_reason_name(reason: event_pb2.CloseReason.ValueType) -> str:
    """The reason as logs write it: `worker_lost`."""
    if reason not in event_pb2.CloseReason.values():
        return "other"
    return event_pb2.CloseReason.Name(reason).removeprefix("CLOSE_REASON_").lower()


def _ports(endpoints: Iterable[session_pb2.LocalEndpoint]) -> tuple[LocalPorts, ...]:
    return tuple(
        LocalPorts(_LEG_NAMES[endpoint.leg], endpoint.line, endpoint.rtp_port, endpoint.rtcp_port)
        for endpoint in endpoints
    )


def _streams(session: session_pb2.Session) -> tuple[StreamRecord, ...]:
    kinds = {endpoint.line: _KIND_NAMES[endpoint.kind] for endpoint in session.spec.endpoints}
    return tuple(_stream(statistics, kinds) for statistics in session.statistics)


def _stream(statistics: session_pb2.StreamStatistics, kinds: Mapping[int, MediaKind]) -> StreamRecord:
    return StreamRecord(
        leg=_LEG_NAMES[statistics.leg],
        line=statistics.line,
        kind=kinds.get(statistics.line, MediaKind.AUDIO).value,
        packets=statistics.packets,
        octets=statistics.octets,
        lost=statistics.lost,
        reordered=statistics.reordered,
        jitter_ms=statistics.jitter.ToNanoseconds() / 1e6 if statistics.HasField("jitter") else None,
        rtcp_packets=statistics.rtcp_packets,
        relayed_packets=statistics.relayed_packets,
        dropped_packets=sum(drop.packets for drop in statistics.drops),
        first_packet_at=_time(statistics.first_packet_time) if statistics.HasField("first_packet_time") else None,
        last_packet_at=_time(statistics.last_packet_time) if statistics.HasField("last_packet_time") else None,
    )


def _time(timestamp: Timestamp) -> datetime:
    return timestamp.ToDatetime(tzinfo=UTC)
