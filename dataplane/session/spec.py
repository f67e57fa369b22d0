"""The wanted state of a media session: what sippbx.media.v1 says without its wire format, and what engines make of it.

A SessionSpec is what the control plane asks for; a RelayPlan is what an engine carries out: one PortPlan for each pair
of ports, after the media mode's strategy and the choice of a branch. Pure.
"""

import ipaddress
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from dataplane.ports import PortBlock

Address = tuple[str, int]
"""A numeric IP address, as the system writes it, and a port."""


class Leg(StrEnum):
    """The side of a call."""

    CALLER = "caller"
    CALLEE = "callee"

    @property
    def opposite(self) -> "Leg":
        """The other side."""
        return Leg.CALLEE if self is Leg.CALLER else Leg.CALLER


class MediaKind(StrEnum):
    """What a line carries."""

    AUDIO = "audio"
    VIDEO = "video"


class MediaMode(StrEnum):
    """How packets travel between the legs."""

    BYPASS = "bypass"


class Direction(StrEnum):
    """Which way media may flow, seen from the far end (RFC 3264 section 5.1)."""

    SENDRECV = "sendrecv"
    SENDONLY = "sendonly"
    RECVONLY = "recvonly"
    INACTIVE = "inactive"

    @property
    def sends(self) -> bool:
        """The far end may send."""
        return self in (Direction.SENDRECV, Direction.SENDONLY)

    @property
    def receives(self) -> bool:
        """The far end may be sent to."""
        return self in (Direction.SENDRECV, Direction.RECVONLY)


class LatchPolicy(StrEnum):
    """From which sources packets of a far end are accepted."""

    STRICT = "strict"
    NAT_AWARE = "nat-aware"


@dataclass(frozen=True, slots=True)
class PayloadType:
    """A negotiated payload type; `clock_rate` in Hz, 0 where not known."""

    number: int
    encoding_name: str
    clock_rate: int


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One far end's view of one line. Addresses are in the system's spelling: see `numeric`."""

    leg: Leg
    line: int
    branch: str
    kind: MediaKind
    local_address: str
    remote_rtp: Address | None
    remote_rtcp: Address | None
    rtcp_mux: bool
    direction: Direction
    latch_policy: LatchPolicy
    signalling_address: str
    payload_types: tuple[PayloadType, ...]


@dataclass(frozen=True, slots=True)
class SessionSpec:
    """The wanted state of a session, whole; endpoints are sorted by leg, line and branch."""

    session_id: str
    generation: int
    mode: MediaMode
    endpoints: tuple[Endpoint, ...]
    selected_branch: str


@dataclass(frozen=True, slots=True)
class PortPlan:
    """What to do with one pair of ports: where to bind it, whom to expect there, where to send what is meant for it.

    `clock_rates` maps accepted payload types to clock rates (0: no jitter); empty accepts any. `branch` tells far ends
    apart that share the ports one after the other.
    """

    leg: Leg
    line: int
    local_address: str
    rtp_port: int
    rtcp_port: int
    branch: str = ""
    remote_rtp: Address | None = None
    remote_rtcp: Address | None = None
    rtcp_mux: bool = False
    direction: Direction = Direction.SENDRECV
    latch_policy: LatchPolicy = LatchPolicy.NAT_AWARE
    signalling_address: str = ""
    clock_rates: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class RelayPlan:
    """What an engine does for a session: both ports of each line, the caller's first."""

    session_id: str
    generation: int
    ports: tuple[PortPlan, ...]


class InvalidSpecError(ValueError):
    """A field is missing or out of range; the message begins with its name."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")


def numeric(field: str, text: str) -> str:
    """Return a numeric IP address as the system spells it. Raises InvalidSpecError."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise InvalidSpecError(field, f"{text!r} is not a numeric IP address") from None
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            raise InvalidSpecError(field, f"{text!r} has a zone")
        if address.ipv4_mapped is not None:
            raise InvalidSpecError(field, f"{text!r} is IPv4 in disguise; give it as IPv4")
    return str(address)


def validate(spec: SessionSpec, lines: int) -> None:
    """Check what the types leave open, for blocks with ports for `lines` lines. Raises InvalidSpecError."""
    if not 1 <= len(spec.session_id) <= 64 or not all("!" <= character <= "~" for character in spec.session_id):
        raise InvalidSpecError("session_id", "must be 1 to 64 printable ASCII characters")
    if not spec.endpoints:
        raise InvalidSpecError("endpoints", "at least one is required")
    seen: dict[tuple[Leg, int, str], Endpoint] = {}
    addresses: dict[tuple[Leg, int], str] = {}
    for endpoint in spec.endpoints:
        branch = f", branch {endpoint.branch}" if endpoint.branch else ""
        where = f"endpoints[{endpoint.leg}, line {endpoint.line}{branch}]"
        if endpoint.line >= lines:
            raise InvalidSpecError(f"{where}.line", f"must be below {lines}: a block has ports for {lines} lines")
        if endpoint.branch and endpoint.leg is Leg.CALLER:
            raise InvalidSpecError(f"{where}.branch", "must be empty for the caller")
        if (endpoint.leg, endpoint.line, endpoint.branch) in seen:
            raise InvalidSpecError(where, "occurs twice")
        seen[endpoint.leg, endpoint.line, endpoint.branch] = endpoint
        if addresses.setdefault((endpoint.leg, endpoint.line), endpoint.local_address) != endpoint.local_address:
            raise InvalidSpecError(f"{where}.local_address", "must be the same for all branches of a line")
        for name, remote in (("remote_rtp", endpoint.remote_rtp), ("remote_rtcp", endpoint.remote_rtcp)):
            if remote is not None and not 1 <= remote[1] <= 65535:
                raise InvalidSpecError(f"{where}.{name}.port", f"{remote[1]} is not between 1 and 65535")
            if remote is not None and (":" in remote[0]) != (":" in endpoint.local_address):
                problem = f"{remote[0]} is not of the family of {endpoint.local_address}"
                raise InvalidSpecError(f"{where}.{name}", problem)
    _selected_branch(spec)


def plan(spec: SessionSpec, block: PortBlock) -> RelayPlan:
    """Make the relay plan of a valid spec on the ports of `block`, by the strategy of its media mode."""
    return _STRATEGIES[spec.mode](spec, block)


def _bypass(spec: SessionSpec, block: PortBlock) -> RelayPlan:
    """Packets go from one leg to the other as they are: each line has a pair of ports on either leg."""
    branch = _selected_branch(spec)
    lines = sorted({endpoint.line for endpoint in spec.endpoints})
    ports = [_port_plan(spec, block, leg, line, branch) for line in lines for leg in (Leg.CALLER, Leg.CALLEE)]
    return RelayPlan(spec.session_id, spec.generation, tuple(ports))


_STRATEGIES: Final[Mapping[MediaMode, Callable[[SessionSpec, PortBlock], RelayPlan]]] = {MediaMode.BYPASS: _bypass}


def _port_plan(spec: SessionSpec, block: PortBlock, leg: Leg, line: int, branch: str) -> PortPlan:
    rtp_port = block.caller_port(line) if leg is Leg.CALLER else block.callee_port(line)
    here = [endpoint for endpoint in spec.endpoints if endpoint.leg is leg and endpoint.line == line]
    wanted = "" if leg is Leg.CALLER else branch
    endpoint = next((endpoint for endpoint in here if endpoint.branch == wanted), None)
    if endpoint is None:
        return PortPlan(leg, line, _local_address(spec, leg, line), rtp_port, rtp_port + 1, branch=wanted)
    remote_rtcp = endpoint.remote_rtcp
    if endpoint.remote_rtp is not None and endpoint.rtcp_mux:
        remote_rtcp = endpoint.remote_rtp
    elif endpoint.remote_rtp is not None and remote_rtcp is None and endpoint.remote_rtp[1] < 65535:
        remote_rtcp = (endpoint.remote_rtp[0], endpoint.remote_rtp[1] + 1)
    return PortPlan(
        leg=leg,
        line=line,
        local_address=endpoint.local_address,
        rtp_port=rtp_port,
        rtcp_port=rtp_port + 1,
        branch=wanted,
        remote_rtp=endpoint.remote_rtp,
        remote_rtcp=remote_rtcp,
        rtcp_mux=endpoint.rtcp_mux,
        direction=endpoint.direction,
        latch_policy=endpoint.latch_policy,
        signalling_address=endpoint.signalling_address,
        clock_rates=tuple(_clock_rates(endpoint.payload_types)),
    )


def _clock_rates(payload_types: Iterable[PayloadType]) -> Iterable[tuple[int, int]]:
    for payload_type in payload_types:
        # Packets of an event repeat its start as their timestamp (RFC 4733 section 2.2.1): no jitter comes of them.
        is_event = payload_type.encoding_name.lower() == "telephone-event"
        yield payload_type.number, 0 if is_event else payload_type.clock_rate


def _local_address(spec: SessionSpec, leg: Leg, line: int) -> str:
    """Where to bind a line of a leg whose far end is not known yet: as its other lines, else as the other leg."""
    by_nearness = sorted(spec.endpoints, key=lambda endpoint: (endpoint.leg is not leg, endpoint.line != line))
    return by_nearness[0].local_address


def _selected_branch(spec: SessionSpec) -> str:
    branches = {endpoint.branch for endpoint in spec.endpoints if endpoint.leg is Leg.CALLEE}
    if spec.selected_branch:
        if spec.selected_branch not in branches:
            raise InvalidSpecError("selected_branch", f"no endpoint has branch {spec.selected_branch!r}")
        return spec.selected_branch
    if "" in branches or not branches:
        return ""
    if len(branches) > 1:
        raise InvalidSpecError("selected_branch", "required, because several branches have endpoints")
    return next(iter(branches))
