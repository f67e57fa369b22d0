"""What a call wants of the data plane, and what it hears back.

These values mirror sippbx.media.v1 without its wire format, so that call logic stays free of it; control.media
translates.
"""

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
    """The session is gone; `streams` is None when its statistics could not be had."""

    session_id: str
    streams: tuple[StreamRecord, ...] | None


@dataclass(frozen=True, slots=True)
class MediaLost:
    """The session's media has been gone for longer than is tolerated, or the data plane gave it up."""

    session_id: str
    detail: str


MediaInput = MediaOpened | MediaUpdated | MediaFailed | MediaClosed | MediaLost
