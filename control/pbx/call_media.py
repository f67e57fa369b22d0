"""The media of one call: which lines are relayed, on which ports, and what each leg is told of the other.

Every line of a description keeps its place, relayed or refused (RFC 3264 section 6). A relayed line has a slot of the
port block for the whole call, so that ports stay the same across re-INVITEs.
"""

from dataclasses import dataclass, field

from control.pbx.media import (
    LatchPolicy,
    LearnedSource,
    LocalPorts,
    MediaEndpoint,
    MediaKind,
    MediaMode,
    MediaSpec,
    RestoredSession,
    first_port_of,
    still_learned,
)
from control.pbx.records import LegName
from control.sip.sdp import Origin, PayloadType, SessionDescription, anchor

KINDS = {"audio": MediaKind.AUDIO, "video": MediaKind.VIDEO}
MAX_SLOTS = 2


@dataclass(frozen=True, slots=True)
class MediaAddress:
    """Where the data plane binds for a leg, and what SDP says of it."""

    bind: str
    advertised: str


@dataclass(slots=True)
class _Side:
    """What is known of one leg's far end, and what it was told last."""

    address: MediaAddress
    signalling_address: str
    session_id: str
    remote: SessionDescription | None = None
    told: SessionDescription | None = None
    version: int = 0


@dataclass(slots=True)
class CallMedia:
    """Turns the descriptions of both legs into the wanted media session, and into descriptions for the opposite leg.

    `session_ids` are the numbers for our o= lines, one for each leg (RFC 8866 section 5.2).
    """

    session_id: str
    mode: MediaMode
    latch_policy: LatchPolicy
    sides: dict[LegName, _Side]
    generation: int = 0
    _reserved: bool = False
    interruptions: int = 0
    gap_s: float = 0.0
    _wanted: MediaSpec | None = None
    _learned: dict[tuple[LegName, int], LearnedSource] = field(default_factory=dict)
    _slots: dict[int, tuple[int, MediaKind]] = field(default_factory=dict)
    _ports: dict[tuple[LegName, int], LocalPorts] = field(default_factory=dict)

    @classmethod
    def between(
        cls,
        session_id: str,
        mode: MediaMode,
        latch_policy: LatchPolicy,
        *,
        addresses: dict[LegName, MediaAddress],
        signalling: dict[LegName, str],
        session_ids: dict[LegName, str],
    ) -> "CallMedia":
        """The media of a call whose two legs are reached at these addresses."""
        sides = {leg: _Side(addresses[leg], signalling[leg], session_ids[leg]) for leg in LegName}
        return cls(session_id, mode, latch_policy, sides)

    def plan(self, sdp: SessionDescription) -> bool:
        """Gives each new line that can be relayed a slot; True when there is one that has no ports yet."""
        if self._reserved:
            # What was asked for before anybody had said what the lines are goes to the first that can be relayed.
            self._slots.clear()
            self._reserved = False
        for index, line in enumerate(sdp.media):
            kind = KINDS.get(line.kind)
            relayable = kind is not None and "RTP/" in line.protocol.upper()
            if (
                kind is not None
                and relayable
                and line.port
                and index not in self._slots
                and len(self._slots) < MAX_SLOTS
            ):
                self._slots[index] = (len(self._slots), kind)
        return any((LegName.CALLER, slot) not in self._ports for slot, _ in self._slots.values())

    def relays(self, sdp: SessionDescription) -> bool:
        """Whether any line of it is relayed."""
        return any(line.port and index in self._slots for index, line in enumerate(sdp.media))

    def learn(self, leg: LegName, sdp: SessionDescription) -> None:
        """Takes what a far end said of itself."""
        self.sides[leg].remote = sdp

    def reserve(self) -> None:
        """Asks for one audio line, for a caller that leaves the offer to the callee."""
        self._slots[0] = (0, MediaKind.AUDIO)
        self._reserved = True

    def bound(self, ports: tuple[LocalPorts, ...]) -> None:
        """Takes the ports that the data plane gave."""
        for pair in ports:
            self._ports[pair.leg, pair.line] = pair

    def spec(self) -> MediaSpec:
        """The wanted media session, one generation on."""
        self.generation += 1
        endpoints = [
            self._endpoint(leg, index, slot, kind)
            for leg in LegName
            for index, (slot, kind) in self._slots.items()
            if self._is_in_use(index)
        ]
        self._wanted = MediaSpec(self.session_id, self.generation, self.mode, tuple(endpoints))
        return self._wanted

    def latched(self, source: LearnedSource) -> None:
        """Takes what the data plane has locked."""
        self._learned[source.leg, source.line] = source

    def interrupted(self, interruptions: int, gap_s: float) -> None:
        """Takes how often and how long in all the relay was interrupted."""
        self.interruptions, self.gap_s = interruptions, gap_s

    def restored(self) -> RestoredSession | None:
        """The session as the data plane must have it again; None when it had given no ports yet."""
        if self._wanted is None or not self._ports:
            return None
        learned = still_learned(self._wanted, self._learned.values())
        first_port = first_port_of(self._ports.values())
        return RestoredSession(self._wanted, first_port, learned, self.interruptions, self.gap_s)

    def describe(self, leg: LegName, sdp: SessionDescription) -> bytes:
        """What `leg` is told of a description of the opposite leg.

        The same content goes out with the same version, another with the next (RFC 3264 section 8).
        """
        side = self.sides[leg]
        pairs = [self._pair(leg, index) for index in range(len(sdp.media))]
        origin = Origin("-", side.session_id, side.version, side.address.advertised)
        told = anchor(sdp, origin=origin, address=side.address.advertised, ports=pairs)
        if told != side.told:
            side.version += 1
            origin = Origin("-", side.session_id, side.version, side.address.advertised)
            told = anchor(sdp, origin=origin, address=side.address.advertised, ports=pairs)
        side.told = told
        return told.encode()

    def _pair(self, leg: LegName, index: int) -> tuple[int, int] | None:
        slot = self._slots.get(index)
        ports = self._ports.get((leg, slot[0])) if slot else None
        return (ports.rtp_port, ports.rtcp_port) if ports else None

    def _is_in_use(self, index: int) -> bool:
        """A line is in use until one of the legs says that it is not, by port 0."""
        remotes = [side.remote for side in self.sides.values() if side.remote is not None]
        return all(index < len(remote.media) and remote.media[index].port for remote in remotes)

    def _endpoint(self, leg: LegName, index: int, slot: int, kind: MediaKind) -> MediaEndpoint:
        side = self.sides[leg]
        remote = side.remote
        if remote is None:
            return MediaEndpoint(
                leg,
                slot,
                kind,
                side.address.bind,
                latch_policy=self.latch_policy,
                signalling_address=side.signalling_address,
            )
        other = self.sides[leg.opposite].remote
        line = remote.media[index]
        mux = line.rtcp_mux and other is not None and index < len(other.media) and other.media[index].rtcp_mux
        return MediaEndpoint(
            leg,
            slot,
            kind,
            side.address.bind,
            remote_rtp=remote.rtp_address_of(index),
            remote_rtcp=remote.rtcp_address_of(index, mux=mux),
            rtcp_mux=mux,
            direction=remote.direction_of(index),
            latch_policy=self.latch_policy,
            signalling_address=side.signalling_address,
            payload_types=self._payload_types(index),
        )

    def _payload_types(self, index: int) -> tuple[PayloadType, ...]:
        """What may arrive on a line: what either end listed, as numbers may differ by direction (RFC 3264 s. 5.1)."""
        known: dict[int, PayloadType] = {}
        for side in self.sides.values():
            if side.remote is not None and index < len(side.remote.media):
                for payload_type in side.remote.media[index].payload_types:
                    known.setdefault(payload_type.number, payload_type)
        return tuple(known.values())


def sdp_number(token: str) -> str:
    """A number for an o= line out of a random token (RFC 8866 section 5.2): 15 digits, so that no peer overflows."""
    return str(int.from_bytes(token.encode(), "big") % 10**15)
