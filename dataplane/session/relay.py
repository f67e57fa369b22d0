"""A media session at work: whose packets are taken, where they go, what is counted.

RelayPort is the one owner of these rules, for the userspace engine and for any engine that takes flows off its hands:

- Latching. Packets of a far end are accepted from the address it signalled; with LatchPolicy.NAT_AWARE also, until
  a source is locked, from another port of that address or from the address of its signalling, a better-ranked source
  going before a worse one. The exact address locks at once, others after _LOCK_AFTER packets in a row of one SSRC.
  From then on nothing else is accepted, until the signalled address changes. RTCP follows: its signalled address, or
  the host that RTP is locked to.
- Destination. Packets for a far end go to its locked source, before that to its signalled address.
- Direction (RFC 3264 section 5.1) binds RTP; RTCP always flows.
- RTCP on the RTP port is told apart by its type (RFC 5761 section 4), where the far end multiplexes.

Times are monotonic seconds. Pure: a datagram goes in, where to send it comes out; what happened is put in an outbox.
"""

from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Final

from dataplane.rtp import Packet, StreamStats, is_rtcp, is_rtp
from dataplane.session.spec import Address, LatchPolicy, Leg, PortPlan, RelayPlan

MAX_PACKET_BYTES: Final = 2048

Source = tuple[str, int] | tuple[str, int, int, int]
"""A datagram's source as a socket gives it."""

_LOCK_AFTER: Final = 3
_CANDIDATE_LIFE_S: Final = 1.0
_FORMER_SOURCE_REST_S: Final = 2.0


class DropReason(StrEnum):
    """Why a packet was not relayed."""

    UNKNOWN_SOURCE = "unknown_source"
    BAD_HEADER = "bad_header"
    PAYLOAD_TYPE = "payload_type"
    NO_PEER = "no_peer"
    DIRECTION = "direction"
    SEND_FAILED = "send_failed"
    TOO_BIG = "too_big"


class Component(IntEnum):
    """Which of the two sockets of a port pair."""

    RTP = 0
    RTCP = 1


class _Rank(IntEnum):
    """How well a source fits what was signalled."""

    SIGNALLING_HOST = 1
    SAME_HOST = 2
    EXACT = 3


@dataclass(frozen=True, slots=True)
class Forward:
    """Where to send a packet: from which socket of the opposite port pair, and to whom."""

    component: Component
    destination: Source


@dataclass(frozen=True, slots=True)
class StreamSnapshot:
    """What was received from one far end on one line. Times are monotonic seconds; `source` is the locked one."""

    leg: Leg
    line: int
    packets: int = 0
    octets: int = 0
    lost: int = 0
    reordered: int = 0
    jitter_s: float | None = None
    rtcp_packets: int = 0
    rtcp_octets: int = 0
    relayed_rtp: int = 0
    relayed_rtp_octets: int = 0
    relayed_rtcp: int = 0
    relayed_rtcp_octets: int = 0
    first_at: float | None = None
    last_at: float | None = None
    ssrc: int = 0
    drops: tuple[tuple[DropReason, int], ...] = ()
    source: Address | None = None


@dataclass(frozen=True, slots=True)
class FirstPacket:
    """The first packet of a far end on a line was accepted."""

    session_id: str
    at: float
    leg: Leg
    line: int
    source: Address


@dataclass(frozen=True, slots=True)
class SourceLatched:
    """A source of this far end was locked: all that is locked now, while `signalled` is its address for RTP."""

    session_id: str
    at: float
    leg: Leg
    line: int
    signalled: Address
    rtp: Address | None
    rtcp: Address | None


@dataclass(frozen=True, slots=True)
class Silence:
    """A far end that should be sending has been silent; said once."""

    session_id: str
    at: float
    leg: Leg
    line: int
    last_packet_at: float | None


@dataclass(frozen=True, slots=True)
class Resumed:
    """Packets came again after a Silence."""

    session_id: str
    at: float
    leg: Leg
    line: int


StreamEvent = FirstPacket | SourceLatched | Silence | Resumed


@dataclass(frozen=True, slots=True)
class LearnedSource:
    """What was locked while `signalled` was in force, so that it need not be learned again."""

    leg: Leg
    line: int
    signalled: Address
    rtp: Address | None
    rtcp: Address | None


@dataclass(slots=True)
class _Candidate:
    source: Source
    rank: _Rank
    ssrc: bytes
    packets: int
    at: float


class RelayPort:
    """The port pair of one leg and line: takes in what its far end sends, and knows where the far end is to be reached.

    `opposite` is the port pair of the same line on the other leg; `configure` both before the first packet.
    """

    def __init__(self, session_id: str, plan: PortPlan, outbox: list[StreamEvent]) -> None:
        self.session_id = session_id
        self.plan = plan
        self.opposite: RelayPort | None = None
        self._outbox = outbox
        self._stats = StreamStats()
        self._rtcp_packets = 0
        self._rtcp_octets = 0
        self._relayed_rtp = 0
        self._relayed_rtp_octets = 0
        self._relayed_rtcp = 0
        self._relayed_rtcp_octets = 0
        self._drops = dict.fromkeys(DropReason, 0)
        self._source: Source | None = None
        self._rtcp_source: Source | None = None
        self._candidate: _Candidate | None = None
        self._former: Source | None = None
        self._former_until = 0.0
        self._forward_rtp: Forward | None = None
        self._forward_rtcp: Forward | None = None
        self._rtp_refusal = DropReason.NO_PEER
        self._clock_rates: dict[int, int] = {}
        self._mux = False
        self._expected_since: float | None = None
        self._silent_since: float | None = None
        self._adopt(plan)

    def receive(self, component: Component, packet: Packet, size: int, source: Source, now: float) -> Forward | None:
        """Take in a datagram of `size` octets and say where it goes; None when it is dropped."""
        if component is Component.RTCP:
            return self.receive_rtcp(packet, size, source, now)
        return self.receive_rtp(packet, size, source, now)

    def receive_rtp(self, packet: Packet, size: int, source: Source, now: float) -> Forward | None:
        """As `receive`, for the RTP port; quickest for a plain packet of the locked source, which is what most are."""
        if size < 12 or packet[0] != 0x80 or size > MAX_PACKET_BYTES or self._mux:
            if size > MAX_PACKET_BYTES:
                return self._drop(DropReason.TOO_BIG)
            if self._mux and is_rtcp(packet, size):
                return self.receive_rtcp(packet, size, source, now)
            if not is_rtp(packet, size):
                return self._drop(DropReason.BAD_HEADER)
        if source == self._source:
            rank = None
        else:
            rank = self._rank(source, now)
            if rank is None:
                return self._drop(DropReason.UNKNOWN_SOURCE)
        clock_rate = self._clock_rates.get(packet[1] & 0x7F)
        if clock_rate is None:
            if self._clock_rates:
                return self._drop(DropReason.PAYLOAD_TYPE)
            clock_rate = 0
        if rank is not None:
            self._learn(source, rank, bytes(packet[8:12]), now)
        self._stats.receive(packet, size, clock_rate, now)
        forward = self._forward_rtp
        if forward is None:
            return self._drop(self._rtp_refusal)
        self._relayed_rtp += 1
        self._relayed_rtp_octets += size
        return forward

    def receive_rtcp(self, packet: Packet, size: int, source: Source, now: float) -> Forward | None:
        """As `receive`, for the RTCP port, and for RTCP that came to the RTP port."""
        if size > MAX_PACKET_BYTES:
            return self._drop(DropReason.TOO_BIG)
        if not is_rtcp(packet, size):
            return self._drop(DropReason.BAD_HEADER)
        if source != self._rtcp_source and not self._admits_rtcp(source, now):
            return self._drop(DropReason.UNKNOWN_SOURCE)
        self._rtcp_packets += 1
        self._rtcp_octets += size
        forward = self._forward_rtcp
        if forward is None:
            return self._drop(DropReason.NO_PEER)
        self._relayed_rtcp += 1
        self._relayed_rtcp_octets += size
        return forward

    def send_failed(self, component: Component, packet: Packet, size: int) -> None:
        """Take back that a packet which came to `component` was relayed: the system did not send it."""
        if component is Component.RTCP or (self._mux and is_rtcp(packet, size)):
            self._relayed_rtcp -= 1
            self._relayed_rtcp_octets -= size
        else:
            self._relayed_rtp -= 1
            self._relayed_rtp_octets -= size
        self._drops[DropReason.SEND_FAILED] += 1

    def configure(self, plan: PortPlan, now: float) -> None:
        """Put a new plan in force. What was learned stays, unless the far end's signalled address or policy changed."""
        old = self.plan
        if _learning_key(plan) != _learning_key(old):
            if self._source is not None:
                # Its late packets must not take the lock again (they would qualify where only the port changed).
                self._former, self._former_until = self._source, now + _FORMER_SOURCE_REST_S
            self._source = self._rtcp_source = self._candidate = None
            self._adopt(plan)
        elif self._rtcp_source is not None and (plan.remote_rtcp, plan.rtcp_mux) != (old.remote_rtcp, old.rtcp_mux):
            self._rtcp_source = None
            self._adopt(plan)
            self._locked(now)
        else:
            self._adopt(plan)

    def connect(self, opposite: "RelayPort", now: float) -> None:
        """Join with the opposite port pair, or take note that either plan changed."""
        self.opposite = opposite
        self.route()
        expected = self.plan.direction.sends and opposite.plan.direction.receives and self.plan.remote_rtp is not None
        if not expected:
            self._expected_since = self._silent_since = None
        elif self._expected_since is None:
            self._expected_since = now

    def restore(self, snapshot: StreamSnapshot | None, learned: LearnedSource | None) -> None:
        """Go on with the figures and the source that another engine or an earlier process had."""
        if snapshot is not None:
            self._stats.resume(
                packets=snapshot.packets,
                octets=snapshot.octets,
                lost=snapshot.lost,
                reordered=snapshot.reordered,
                jitter_s=snapshot.jitter_s,
                first_at=snapshot.first_at,
                last_at=snapshot.last_at,
            )
            self._rtcp_packets, self._rtcp_octets = snapshot.rtcp_packets, snapshot.rtcp_octets
            self._relayed_rtp, self._relayed_rtp_octets = snapshot.relayed_rtp, snapshot.relayed_rtp_octets
            self._relayed_rtcp, self._relayed_rtcp_octets = snapshot.relayed_rtcp, snapshot.relayed_rtcp_octets
            self._drops.update(snapshot.drops)
        if learned is None or learned.signalled != self.plan.remote_rtp:
            return
        rtp = learned.rtp
        if rtp is not None and self._fit(rtp) is not None and (":" in rtp[0]) == (":" in learned.signalled[0]):
            self._source = _source(rtp)
        if learned.rtcp is not None and not self._mux and self._is_admitted_rtcp(learned.rtcp):
            self._rtcp_source = _source(learned.rtcp)

    def check_silence(self, now: float, silence_s: float) -> None:
        """Report a Silence or its end; to be called about once a second."""
        if self._expected_since is None:
            return
        last = self._stats.last_at
        if self._silent_since is not None:
            if last is not None and last > self._silent_since:
                self._silent_since = None
                self._outbox.append(Resumed(self.session_id, last, self.plan.leg, self.plan.line))
        elif now - max(last or 0.0, self._expected_since) >= silence_s:
            self._silent_since = now
            self._outbox.append(Silence(self.session_id, now, self.plan.leg, self.plan.line, last))

    def snapshot(self) -> StreamSnapshot:
        """Return the figures as they are now."""
        stats = self._stats
        return StreamSnapshot(
            leg=self.plan.leg,
            line=self.plan.line,
            packets=stats.packets,
            octets=stats.octets,
            lost=stats.lost,
            reordered=stats.reordered,
            jitter_s=stats.jitter_s,
            rtcp_packets=self._rtcp_packets,
            rtcp_octets=self._rtcp_octets,
            relayed_rtp=self._relayed_rtp,
            relayed_rtp_octets=self._relayed_rtp_octets,
            relayed_rtcp=self._relayed_rtcp,
            relayed_rtcp_octets=self._relayed_rtcp_octets,
            first_at=stats.first_at,
            last_at=stats.last_at,
            ssrc=stats.ssrc or 0,
            drops=tuple((reason, count) for reason, count in self._drops.items() if count),
            source=None if self._source is None else _address(self._source),
        )

    def _adopt(self, plan: PortPlan) -> None:
        self.plan = plan
        self._clock_rates = dict(plan.clock_rates)
        self._mux = plan.rtcp_mux

    def rtp_destination(self) -> Source | None:
        """Where RTP for this far end goes; None while that is not known."""
        return self._source or self.plan.remote_rtp

    def rtcp_destination(self) -> Source | None:
        """Where RTCP for this far end goes; None while that is not known."""
        return self.rtp_destination() if self._mux else self._rtcp_source or self.plan.remote_rtcp

    def route(self) -> None:
        """Work out once, for all packets to come, where they go; to be called when the opposite far end moved."""
        far = self.opposite
        if far is None:
            self._forward_rtp = self._forward_rtcp = None
            return
        rtp, rtcp = far.rtp_destination(), far.rtcp_destination()
        allowed = self.plan.direction.sends and far.plan.direction.receives
        self._rtp_refusal = DropReason.NO_PEER if allowed else DropReason.DIRECTION
        self._forward_rtp = Forward(Component.RTP, rtp) if rtp and allowed else None
        rtcp_component = Component.RTP if far.plan.rtcp_mux else Component.RTCP
        self._forward_rtcp = Forward(rtcp_component, rtcp) if rtcp else None

    def _drop(self, reason: DropReason) -> Forward | None:
        self._drops[reason] += 1
        return None

    def _rank(self, source: Source, now: float) -> _Rank | None:
        """Rank a source that is not the locked one; None means not acceptable now."""
        if self._source is not None:
            return None
        rank = self._fit(_address(source))
        if rank is None or rank is _Rank.EXACT:
            return rank
        if source == self._former and now < self._former_until:
            return None
        candidate = self._candidate
        if candidate is not None and rank < candidate.rank and now - candidate.at < _CANDIDATE_LIFE_S:
            return None
        return rank

    def _fit(self, address: Address) -> _Rank | None:
        """Rank an address by what was signalled; None where the policy does not admit it."""
        plan = self.plan
        if plan.remote_rtp is None:
            return None
        if address == plan.remote_rtp:
            return _Rank.EXACT
        if plan.latch_policy is LatchPolicy.STRICT:
            return None
        if address[0] == plan.remote_rtp[0]:
            return _Rank.SAME_HOST
        return _Rank.SIGNALLING_HOST if address[0] == plan.signalling_address else None

    def _learn(self, source: Source, rank: _Rank, ssrc: bytes, now: float) -> None:
        """Take a step towards locking `source`, whose packet has passed every test."""
        plan = self.plan
        if self._stats.first_at is None:
            self._outbox.append(FirstPacket(self.session_id, now, plan.leg, plan.line, _address(source)))
        candidate = self._candidate
        if candidate is None or candidate.source != source or candidate.ssrc != ssrc:
            candidate = self._candidate = _Candidate(source, rank, ssrc, 0, now)
        candidate.packets += 1
        candidate.at = now
        if rank is _Rank.EXACT or candidate.packets >= _LOCK_AFTER:
            self._source = source
            self._candidate = None
            self._locked(now)

    def _locked(self, now: float) -> None:
        """Tell what is locked now, and let the opposite port send there."""
        plan = self.plan
        if plan.remote_rtp is not None:
            rtp = None if self._source is None else _address(self._source)
            rtcp = None if self._rtcp_source is None else _address(self._rtcp_source)
            latched = SourceLatched(self.session_id, now, plan.leg, plan.line, plan.remote_rtp, rtp, rtcp)
            self._outbox.append(latched)
        if self.opposite is not None:
            self.opposite.route()

    def _admits_rtcp(self, source: Source, now: float) -> bool:
        plan = self.plan
        if plan.rtcp_mux:
            # The RTP port's source is the one to go by; RTCP alone does not lock it.
            return source == self._source or self._rank(source, now) is _Rank.EXACT
        if self._rtcp_source is not None or not self._is_admitted_rtcp(_address(source)):
            return False
        self._rtcp_source = source
        self._locked(now)
        return True

    def _is_admitted_rtcp(self, address: Address) -> bool:
        plan = self.plan
        if address == plan.remote_rtcp:
            return True
        is_nat_aware = plan.latch_policy is LatchPolicy.NAT_AWARE
        return is_nat_aware and self._source is not None and address[0] == self._source[0]


class MediaSession:
    """The relay ports of one session under the plan in force. A line that goes keeps its figures and may come back."""

    def __init__(self, session_id: str, outbox: list[StreamEvent]) -> None:
        self.session_id = session_id
        self.ports: dict[tuple[Leg, int], RelayPort] = {}
        self._retired: dict[tuple[Leg, int], StreamSnapshot] = {}
        self._outbox = outbox

    def apply(
        self,
        plan: RelayPlan,
        now: float,
        learned: tuple[LearnedSource, ...] = (),
        carried: tuple[StreamSnapshot, ...] = (),
    ) -> None:
        """Put a plan in force. `learned` and `carried` restore what is known about ports that are new here."""
        sources = {(entry.leg, entry.line): entry for entry in learned}
        self._retired.update({(snapshot.leg, snapshot.line): snapshot for snapshot in carried})
        wanted = {(port.leg, port.line): port for port in plan.ports}
        for key in self.ports.keys() - wanted.keys():
            port = self.ports.pop(key)
            port.opposite = None
            self._retired[key] = port.snapshot()
        for key, port_plan in wanted.items():
            if key in self.ports:
                self.ports[key].configure(port_plan, now)
            else:
                port = self.ports[key] = RelayPort(self.session_id, port_plan, self._outbox)
                port.restore(self._retired.pop(key, None), sources.get(key))
        for (leg, line), port in self.ports.items():
            port.connect(self.ports[leg.opposite, line], now)

    def check_silence(self, now: float, silence_s: float) -> None:
        """Report far ends that fell silent or came back."""
        for port in self.ports.values():
            port.check_silence(now, silence_s)

    def snapshot(self) -> tuple[StreamSnapshot, ...]:
        """Return the figures of all lines that there are or were, sorted by line and leg."""
        streams = [port.snapshot() for port in self.ports.values()] + list(self._retired.values())
        return tuple(sorted(streams, key=lambda stream: (stream.line, stream.leg is Leg.CALLEE)))

    def close(self) -> tuple[StreamSnapshot, ...]:
        """End the session and return its final figures. Ports let go of each other, so that no cycle is left behind."""
        streams = self.snapshot()
        for port in self.ports.values():
            port.opposite = None
        self.ports.clear()
        return streams


def _address(source: Source) -> Address:
    return source[0], source[1]


def _source(address: Address) -> Source:
    return (*address, 0, 0) if ":" in address[0] else address


def _learning_key(plan: PortPlan) -> tuple[str, Address | None, LatchPolicy, str]:
    return plan.branch, plan.remote_rtp, plan.latch_policy, plan.signalling_address
