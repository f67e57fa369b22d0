"""Between the node's values and sippbx.media.v1: the one place that knows both."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from dataplane.ports import PortBlock
from dataplane.service.events import (
    Capacity,
    CapacityChanged,
    CloseReason,
    Record,
    RelayInterrupted,
    SessionClosed,
)
from dataplane.service.node import Refusal, RefusedError, SessionView
from dataplane.session.relay import (
    DropReason,
    FirstPacket,
    LearnedSource,
    Resumed,
    Silence,
    SourceLatched,
    StreamSnapshot,
)
from dataplane.session.spec import (
    Address,
    Direction,
    Endpoint,
    LatchPolicy,
    Leg,
    MediaKind,
    MediaMode,
    PayloadType,
    SessionSpec,
    numeric,
    plan,
)
from sippbx.media.v1 import event_pb2, node_pb2, session_pb2

N = TypeVar("N")
T = TypeVar("T")

_LEGS = {session_pb2.LEG_CALLER: Leg.CALLER, session_pb2.LEG_CALLEE: Leg.CALLEE}
_LEG_NUMBERS = {leg: number for number, leg in _LEGS.items()}
_KINDS = {session_pb2.MEDIA_KIND_AUDIO: MediaKind.AUDIO, session_pb2.MEDIA_KIND_VIDEO: MediaKind.VIDEO}
_KIND_NUMBERS = {kind: number for number, kind in _KINDS.items()}
_MODES = {session_pb2.MEDIA_MODE_BYPASS: MediaMode.BYPASS}
_MODE_NUMBERS = {mode: number for number, mode in _MODES.items()}
_DIRECTIONS = {
    session_pb2.DIRECTION_UNSPECIFIED: Direction.SENDRECV,
    session_pb2.DIRECTION_SENDRECV: Direction.SENDRECV,
    session_pb2.DIRECTION_SENDONLY: Direction.SENDONLY,
    session_pb2.DIRECTION_RECVONLY: Direction.RECVONLY,
    session_pb2.DIRECTION_INACTIVE: Direction.INACTIVE,
}
_DIRECTION_NUMBERS = {direction: number for number, direction in _DIRECTIONS.items()}
_LATCH_POLICIES = {
    session_pb2.LATCH_POLICY_UNSPECIFIED: LatchPolicy.NAT_AWARE,
    session_pb2.LATCH_POLICY_STRICT: LatchPolicy.STRICT,
    session_pb2.LATCH_POLICY_NAT_AWARE: LatchPolicy.NAT_AWARE,
}
_LATCH_NUMBERS = {policy: number for number, policy in _LATCH_POLICIES.items()}


def spec_from_wire(wire: session_pb2.SessionSpec) -> SessionSpec:
    """The wanted state that a message names; what it says of values is checked by the node.

    Raises:
        RefusedError: INVALID_ARGUMENT, an enum or an address that is unknown; the message names the field.
    """
    return SessionSpec(
        wire.session_id,
        wire.generation,
        _known(_MODES, wire.mode, "spec.mode"),
        tuple(
            sorted(
                (_endpoint(i, endpoint) for i, endpoint in enumerate(wire.endpoints)),
                key=lambda endpoint: (endpoint.leg, endpoint.line, endpoint.branch),
            )
        ),
        wire.selected_branch,
    )


def _known(values: Mapping[N, T], number: N, field: str) -> T:
    value = values.get(number)
    if value is None:
        raise RefusedError(Refusal.INVALID_ARGUMENT, f"{field}: {number} is not set or not known")
    return value


def _endpoint(index: int, wire: session_pb2.Endpoint) -> Endpoint:
    at = f"spec.endpoints[{index}]"
    return Endpoint(
        leg=_known(_LEGS, wire.leg, f"{at}.leg"),
        line=wire.line,
        branch=wire.branch,
        kind=_known(_KINDS, wire.kind, f"{at}.kind"),
        local_address=_numeric(f"{at}.local_address", wire.local_address),
        remote_rtp=_address(f"{at}.remote_rtp", wire.remote_rtp) if wire.HasField("remote_rtp") else None,
        remote_rtcp=_address(f"{at}.remote_rtcp", wire.remote_rtcp) if wire.HasField("remote_rtcp") else None,
        rtcp_mux=wire.rtcp_mux,
        direction=_known(_DIRECTIONS, wire.direction, f"{at}.direction"),
        latch_policy=_known(_LATCH_POLICIES, wire.latch_policy, f"{at}.latch_policy"),
        signalling_address=_numeric(f"{at}.signalling_address", wire.signalling_address)
        if wire.signalling_address
        else "",
        payload_types=tuple(PayloadType(p.number, p.encoding_name, p.clock_rate) for p in wire.payload_types),
    )


def learned_from_wire(wire: Iterable[session_pb2.LearnedSource]) -> tuple[LearnedSource, ...]:
    """The sources that were locked before.

    Raises:
        RefusedError: INVALID_ARGUMENT, an enum or an address that is unknown; the message names the field.
    """
    return tuple(_learned_source(f"learned_sources[{index}]", source) for index, source in enumerate(wire))


def _learned_source(at: str, wire: session_pb2.LearnedSource) -> LearnedSource:
    return LearnedSource(
        _known(_LEGS, wire.leg, f"{at}.leg"),
        wire.line,
        _source_address(f"{at}.signalled", wire.signalled),
        _source_address(f"{at}.rtp", wire.rtp) if wire.HasField("rtp") else None,
        _source_address(f"{at}.rtcp", wire.rtcp) if wire.HasField("rtcp") else None,
    )


def _source_address(field: str, wire: session_pb2.SocketAddress) -> Address:
    if not 1 <= wire.port <= 65535:
        raise RefusedError(Refusal.INVALID_ARGUMENT, f"{field}.port: {wire.port} is not between 1 and 65535")
    return _address(field, wire)


def _numeric(field: str, text: str) -> str:
    try:
        return numeric(field, text)
    except ValueError as error:
        raise RefusedError(Refusal.INVALID_ARGUMENT, str(error)) from error


def _address(field: str, wire: session_pb2.SocketAddress) -> Address:
    return _numeric(f"{field}.address", wire.address), wire.port


def spec_to_wire(spec: SessionSpec) -> session_pb2.SessionSpec:
    """The wanted state as a message."""
    return session_pb2.SessionSpec(
        session_id=spec.session_id,
        generation=spec.generation,
        mode=_MODE_NUMBERS[spec.mode],
        endpoints=[
            session_pb2.Endpoint(
                leg=_LEG_NUMBERS[endpoint.leg],
                line=endpoint.line,
                branch=endpoint.branch,
                kind=_KIND_NUMBERS[endpoint.kind],
                local_address=endpoint.local_address,
                remote_rtp=_socket_address(endpoint.remote_rtp),
                remote_rtcp=_socket_address(endpoint.remote_rtcp),
                rtcp_mux=endpoint.rtcp_mux,
                direction=_DIRECTION_NUMBERS[endpoint.direction],
                latch_policy=_LATCH_NUMBERS[endpoint.latch_policy],
                signalling_address=endpoint.signalling_address,
                payload_types=[
                    session_pb2.PayloadType(
                        number=payload.number, encoding_name=payload.encoding_name, clock_rate=payload.clock_rate
                    )
                    for payload in endpoint.payload_types
                ],
            )
            for endpoint in spec.endpoints
        ],
        selected_branch=spec.selected_branch,
    )


def _socket_address(address: Address | None) -> session_pb2.SocketAddress | None:
    return None if address is None else session_pb2.SocketAddress(address=address[0], port=address[1])


class Translator:
    """Makes messages; it knows how monotonic seconds and wall clock hang together (`monotonic` now is `utc` now)."""

    def __init__(self, monotonic: float, utc: datetime) -> None:
        self._monotonic = monotonic
        self._utc = utc

    def timestamp(self, at: float) -> Timestamp:
        """The wall clock at a moment of the monotonic one."""
        return timestamp(self._utc + timedelta(seconds=at - self._monotonic))

    def session(self, view: SessionView) -> session_pb2.Session:
        """A session with what is bound for it, and its figures where they were asked for."""
        return session_pb2.Session(
            session_id=view.spec.session_id,
            generation=view.spec.generation,
            first_port=view.block.first,
            block_size=view.block.size,
            local_endpoints=_local_endpoints(view.spec, view.block),
            spec=spec_to_wire(view.spec),
            create_time=timestamp(view.created_at),
            statistics=self.statistics(view.streams),
        )

    def statistics(self, streams: Iterable[StreamSnapshot]) -> list[session_pb2.StreamStatistics]:
        """What was received on each stream."""
        return [
            session_pb2.StreamStatistics(
                leg=_LEG_NUMBERS[stream.leg],
                line=stream.line,
                packets=stream.packets,
                octets=stream.octets,
                lost=stream.lost,
                reordered=stream.reordered,
                jitter=None if stream.jitter_s is None else _duration(stream.jitter_s),
                rtcp_packets=stream.rtcp_packets,
                relayed_packets=stream.relayed_rtp + stream.relayed_rtcp,
                first_packet_time=None if stream.first_at is None else self.timestamp(stream.first_at),
                last_packet_time=None if stream.last_at is None else self.timestamp(stream.last_at),
                ssrc=stream.ssrc,
                drops=[
                    session_pb2.DropCount(reason=_drop_reason(reason), packets=packets)
                    for reason, packets in stream.drops
                    if packets
                ],
                source=_socket_address(stream.source),
            )
            for stream in streams
        ]

    def event(self, record: Record) -> event_pb2.MediaEvent:
        """An event in its place of the order."""
        wire = event_pb2.MediaEvent(sequence=record.sequence, event_time=timestamp(record.at))
        match record.event:
            case FirstPacket(session_id, _, leg, line, source):
                wire.session_id = session_id
                packet = event_pb2.FirstPacket(leg=_LEG_NUMBERS[leg], line=line, source=_socket_address(source))
                wire.first_packet.CopyFrom(packet)
            case SourceLatched(session_id, _, leg, line, signalled, rtp, rtcp):
                wire.session_id = session_id
                wire.source_latched.CopyFrom(
                    event_pb2.SourceLatched(
                        leg=_LEG_NUMBERS[leg],
                        line=line,
                        source=_socket_address(rtp),
                        differs_from_signalled=rtp not in {None, signalled},
                        rtcp_source=_socket_address(rtcp),
                        signalled=_socket_address(signalled),
                    )
                )
            case Silence(session_id, _, leg, line, last_packet_at):
                wire.session_id = session_id
                last = None if last_packet_at is None else self.timestamp(last_packet_at)
                wire.silence.CopyFrom(event_pb2.Silence(leg=_LEG_NUMBERS[leg], line=line, last_packet_time=last))
            case Resumed(session_id, _, leg, line):
                wire.session_id = session_id
                wire.resumed.CopyFrom(event_pb2.Resumed(leg=_LEG_NUMBERS[leg], line=line))
            case SessionClosed(session_id, reason, streams):
                wire.session_id = session_id
                wire.session_closed.CopyFrom(
                    event_pb2.SessionClosed(reason=close_reason(reason), statistics=self.statistics(streams))
                )
            case CapacityChanged(changed):
                wire.capacity_changed.CopyFrom(event_pb2.CapacityChanged(capacity=capacity(changed)))
            case RelayInterrupted(gap_s):
                wire.relay_interrupted.CopyFrom(event_pb2.RelayInterrupted(gap=_duration(gap_s)))
        return wire


def _duration(seconds: float) -> Duration:
    wire = Duration()
    wire.FromTimedelta(timedelta(seconds=seconds))
    return wire


def timestamp(at: datetime) -> Timestamp:
    """A moment as a message."""
    wire = Timestamp()
    wire.FromDatetime(at.astimezone(UTC))
    return wire


def _local_endpoints(spec: SessionSpec, block: PortBlock) -> list[session_pb2.LocalEndpoint]:
    found: dict[tuple[Leg, int], session_pb2.LocalEndpoint] = {}
    for port in plan(spec, block).ports:
        found[port.leg, port.line] = session_pb2.LocalEndpoint(
            leg=_LEG_NUMBERS[port.leg],
            line=port.line,
            address=port.local_address,
            rtp_port=port.rtp_port,
            rtcp_port=port.rtcp_port,
        )
    return list(found.values())


def _drop_reason(reason: DropReason) -> session_pb2.DropReason.ValueType:
    return session_pb2.DropReason.Value(f"DROP_REASON_{reason.name}")


def close_reason(reason: CloseReason) -> event_pb2.CloseReason.ValueType:
    """Why a session ended, as the contract has it."""
    return event_pb2.CloseReason.Value(f"CLOSE_REASON_{reason.name}")


def error(refused: RefusedError) -> node_pb2.Error:
    """Why something was refused, as the contract has it."""
    return node_pb2.Error(
        reason=node_pb2.ErrorReason.Value(f"ERROR_REASON_{refused.refusal.name}"), message=refused.message
    )


def capacity(state: Capacity) -> node_pb2.Capacity:
    """How much room there is, as a message."""
    return node_pb2.Capacity(
        blocks_total=state.blocks_total,
        blocks_in_use=state.blocks_in_use,
        blocks_resting=state.blocks_resting,
        blocks_free=state.blocks_free,
        block_size=state.block_size,
        first_port=state.first_port,
        last_port=state.last_port,
        accepting=state.accepting,
        not_accepting_reason=state.not_accepting_reason,
    )
