"""What a call wants of the data plane, and what it hears back.

These values mirror sippbx.media.v1 without its wire format, so that call logic stays free of it; control.media
translates.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from control.pbx.records import LegName, StreamRecord
from control.sip.address import Address
from control.sip.sdp import Direction, PayloadType


class MediaKind(StrEnum):
    """What a line carries."""

    AUDIO = "audio"
    VIDEO = "video"


class MediaMode(StrEnum):
    """How packets travel between the legs."""

    BYPASS = "bypass"


class LatchPolicy(StrEnum):
    """Which sources the data plane accepts from a far end."""

    STRICT = "strict"
    NAT_AWARE = "nat-aware"


@dataclass(frozen=True, slots=True)
class MediaEndpoint:
    """One far end's view of one line. `local_address` is what the data plane binds; unknown remotes are None."""

    leg: LegName
    line: int
    kind: MediaKind
    local_address: str
    remote_rtp: Address | None = None
    remote_rtcp: Address | None = None
    rtcp_mux: bool = False
    direction: Direction = Direction.SENDRECV
    latch_policy: LatchPolicy = LatchPolicy.NAT_AWARE
    signalling_address: str = ""
    payload_types: tuple[PayloadType, ...] = ()
    branch: str = ""


@dataclass(frozen=True, slots=True)
class MediaSpec:
    """The wanted state of a media session, whole; `generation` grows with each change of it."""

    session_id: str
    generation: int
    mode: MediaMode
    endpoints: tuple[MediaEndpoint, ...]
    selected_branch: str = ""


@dataclass(frozen=True, slots=True)
class LocalPorts:
    """The ports that the data plane bound for one line of one leg."""

    leg: LegName
    line: int
    rtp_port: int
    rtcp_port: int


@dataclass(frozen=True, slots=True)
class LearnedSource:
    """The source that the data plane locked for a far end on a line; packets from elsewhere are not accepted any more.

    It holds as long as `signalled`, the RTP address that was signalled when it was locked, is the far end's: see
    `still_learned`. `rtp` and `rtcp` are None where nothing is locked; `rtcp` also where RTCP comes with RTP.
    """

    leg: LegName
    line: int
    signalled: Address
    rtp: Address | None
    rtcp: Address | None


@dataclass(frozen=True, slots=True)
class RestoredSession:
    """A media session that an earlier process of the control plane had.

    `first_port` is that of its port block: see `first_port_of`. `interruptions` and `gap_s` are the last sums that
    MediaInterrupted told.
    """

    spec: MediaSpec
    first_port: int
    learned: tuple[LearnedSource, ...] = ()
    interruptions: int = 0
    gap_s: float = 0.0


def first_port_of(ports: Iterable[LocalPorts]) -> int:
    """The first port of the block that `ports` are of: the caller's lines begin there, two ports to a line.

    Raises:
        ValueError: none of them is the caller's.
    """
    for pair in ports:
        if pair.leg is LegName.CALLER:
            return pair.rtp_port - 2 * pair.line
    raise ValueError("no port of the caller's leg is known")


def still_learned(spec: MediaSpec, learned: Iterable[LearnedSource]) -> tuple[LearnedSource, ...]:
    """Those of `learned` that hold under `spec`: their far end's signalled address has not changed since."""
    signalled = {(endpoint.leg, endpoint.line, endpoint.remote_rtp) for endpoint in spec.endpoints}
    return tuple(source for source in learned if (source.leg, source.line, source.signalled) in signalled)


class MediaFailure(StrEnum):
    """Why the data plane could not do what was asked."""

    PORTS_EXHAUSTED = "ports-exhausted"
    UNAVAILABLE = "unavailable"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class MediaOpened:
    """The session stands, on these ports."""

    session_id: str
    ports: tuple[LocalPorts, ...]


@dataclass(frozen=True, slots=True)
class MediaUpdated:
    """The session has this generation now; lines that were added have ports."""

    session_id: str
    generation: int
    ports: tuple[LocalPorts, ...]


@dataclass(frozen=True, slots=True)
class MediaFailed:
    """An open or update was not carried out; `generation` says which (1 is the open)."""

    session_id: str
    generation: int
    failure: MediaFailure
    detail: str


@dataclass(frozen=True, slots=True)
class MediaClosed:
    """The session is gone; `streams` is None when its statistics could not be had.

    `interruptions` and `gap_s` tell how often and how long in all it was without a relay.
    """

    session_id: str
    streams: tuple[StreamRecord, ...] | None
    interruptions: int = 0
    gap_s: float = 0.0


@dataclass(frozen=True, slots=True)
class MediaLatched:
    """The data plane locked a source of the session; it replaces what was told of the same leg and line before."""

    session_id: str
    source: LearnedSource


@dataclass(frozen=True, slots=True)
class MediaInterrupted:
    """The session was without a relay and has one again; `interruptions` and `gap_s` are sums since its beginning."""

    session_id: str
    interruptions: int
    gap_s: float


@dataclass(frozen=True, slots=True)
class MediaLost:
    """The session's media has been gone for longer than is tolerated, or the data plane gave it up."""

    session_id: str
    detail: str


MediaInput = MediaOpened | MediaUpdated | MediaFailed | MediaLatched | MediaInterrupted | MediaClosed | MediaLost
