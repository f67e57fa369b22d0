"""Settings of the control plane: a YAML file, overridden by SIPPBX_CONTROL_SECTION__KEY in the environment.

deploy/config/control.yaml explains each key. Nothing here resolves names or looks at the machine, its host name aside.
"""

import re
import socket
from collections.abc import Iterator, Mapping
from enum import StrEnum
from ipaddress import ip_address, ip_network
from itertools import combinations
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    SecretStr,
)

from control.pbx.media import LatchPolicy, MediaMode
from control.pbx.routing import USERS, NatHandling, RouteRule
from control.pbx.trunks import Network, Trunk
from control.sip.address import Address, Flow, Transport
from sippbx.runtime.settings_models import LogSettings, Section
from sippbx.runtime.settings_reader import Fault, Location, SettingsError, nearest_of, path_of, read

__all__ = ["Settings", "SettingsError", "load"]

ENVIRONMENT_PREFIX = "SIPPBX_CONTROL_"
AUTO = "auto"
SIP_PORT = 5060

# Types of single values ---------------------------------------------------------------------------------------------


def _matching(pattern: str, what: str) -> AfterValidator:
    compiled = re.compile(pattern)

    def check(text: str) -> str:
        if not compiled.fullmatch(text):
            raise ValueError(f"{text!r} is not {what}")
        return text

    return AfterValidator(check)


def _numeric_address(text: str) -> str:
    try:
        return str(ip_address(text.strip("[]")))
    except ValueError:
        raise ValueError(f"{text!r} is not a numeric IPv4 or IPv6 address; host names are not looked up") from None


def _advertisable(text: str) -> str:
    if text == AUTO:
        return text
    address = ip_address(_numeric_address(text))
    if address.is_unspecified or address.is_multicast:
        raise ValueError(f"peers cannot reach {text}; give the address that they see, or {AUTO!r}")
    return str(address)


def _host_and_port(value: object) -> Address:
    if isinstance(value, Address):
        return value
    text = str(value)
    match = re.fullmatch(r"\[([^\]]*)\](?::(\d+))?|([^:]*)(?::(\d+))?", text)
    if match is None:
        raise ValueError(f"{text!r} is not host:port; IPv6 addresses go in brackets: [2001:db8::1]:{SIP_PORT}")
    host, port = match[1] or match[3] or "", int(match[2] or match[4] or SIP_PORT)
    if not 1 <= port <= 65535:
        raise ValueError(f"port {port} is not within 1 to 65535")
    if ip_address(_numeric_address(host)).is_unspecified:
        raise ValueError(f"nothing can be sent to {host}; give the address of the peer")
    return Address(_numeric_address(host), port)


def _network(value: object) -> Network:
    try:
        return ip_network(str(value))
    except ValueError as error:
        raise ValueError(f"{error}; write an address or a network such as 198.51.100.0/24") from None


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


IpAddress = Annotated[str, AfterValidator(_numeric_address)]
Advertised = Annotated[str, AfterValidator(_advertisable)]
HostPort = Annotated[Address, PlainValidator(_host_and_port), PlainSerializer(str)]
TrustedNetwork = Annotated[Network, PlainValidator(_network), PlainSerializer(str)]
TransportName = Annotated[Transport, BeforeValidator(_upper)]
Port = Annotated[int, Field(ge=1, le=65535)]
Name = Annotated[str, _matching(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", "a name: 1 to 63 letters, digits, '_', '.', '-'")]
# RFC 3261 section 25.1, unreserved: nothing that a URI would have to escape or that could be taken for a parameter.
UserName = Annotated[str, _matching(r"[A-Za-z0-9_.!~*'()+-]{1,64}", "a user: 1 to 64 letters, digits or _.!~*'()+-")]
Prefix = Annotated[str, _matching(r"\+?[0-9*#]+|\+", "a prefix: digits, '*' and '#', with an optional '+' in front")]
Prepended = Annotated[str, _matching(r"\+?[0-9*#]*", "digits, '*' and '#', with an optional '+' in front")]
Realm = Annotated[
    str, _matching(r'[^"\\\x00-\x1f\x7f]{1,128}', "a realm: 1 to 128 characters without quotes and controls")
]
ProductName = Annotated[str, _matching(r"[!-~]([ -~]{0,126}[!-~])?", "1 to 128 printable ASCII characters")]
NodeName = Annotated[str, _matching(r"[!-~]{1,64}", "1 to 64 printable ASCII characters without spaces")]
GrpcTarget = Annotated[
    str,
    _matching(r"unix:///\S+|(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+):[0-9]{1,5}", "unix:///absolute/path or host:port"),
]


def _duplicates(key: str, values: list[str], attribute: str) -> Iterator[Fault]:
    for index, value in enumerate(values):
        if (first := values.index(value)) < index:
            yield Fault((key, index, attribute), f"{value} is {key}[{first}], too; there can be only one")


# The models ---------------------------------------------------------------------------------------------------------


class DigestAlgorithm(StrEnum):
    """How passwords are proved (RFC 8760)."""

    SHA_256 = "SHA-256"
    MD5 = "MD5"


class _Advertising(Section):
    """An address of ours and the one under which peers reach it."""

    bind: IpAddress = "0.0.0.0"
    advertise: Advertised = AUTO

    @property
    def version(self) -> int:
        """4 or 6."""
        return ip_address(self.bind).version

    @property
    def advertised_host(self) -> str | None:
        """The address to tell peers; None where it must be detected, because every address of the host is bound."""
        if self.advertise != AUTO:
            return self.advertise
        return None if ip_address(self.bind).is_unspecified else self.bind

    def contradictions(self) -> Iterator[Fault]:
        """Both addresses are of one family."""
        if self.advertise != AUTO and ip_address(self.advertise).version != self.version:
            message = (
                f"{self.advertise} is not of the family of bind, IPv{self.version}; add an entry for the other family"
            )
            yield Fault(("advertise",), message)


class ListenerSettings(_Advertising):
    """A socket for SIP. An IPv6 listener takes IPv6 alone."""

    name: Name
    transport: TransportName = Transport.UDP
    port: Port = SIP_PORT
    advertise_port: Port | None = None

    @property
    def advertised_port(self) -> int:
        """The port to tell peers."""
        return self.advertise_port or self.port


class TimerSettings(Section):
    """RFC 3261 section 17.1.1.1, in seconds."""

    t1_s: Annotated[float, Field(gt=0, le=5)] = 0.5
    t2_s: Annotated[float, Field(gt=0, le=60)] = 4.0
    t4_s: Annotated[float, Field(gt=0, le=60)] = 5.0

    def contradictions(self) -> Iterator[Fault]:
        """T1 doubles up to T2."""
        if self.t2_s < self.t1_s:
            yield Fault(
                ("t2_s",), f"{self.t2_s} is less than t1_s, {self.t1_s}; retransmissions double from t1_s up to t2_s"
            )


class SipSettings(Section):
    """Signalling."""

    listeners: Annotated[tuple[ListenerSettings, ...], Field(min_length=1)] = (ListenerSettings(name="udp"),)
    server_name: ProductName = "sippbx"
    ring_timeout_s: Annotated[float, Field(ge=1, le=600)] = 60.0
    max_call_duration_s: Annotated[float, Field(ge=1, le=604_800)] = 14_400.0
    timers: TimerSettings = TimerSettings()

    def contradictions(self) -> Iterator[Fault]:
        """Names are unique."""
        yield from _duplicates("listeners", [listener.name for listener in self.listeners], "name")


class RegistrarSettings(Section):
    """How long and how often users may register (RFC 3261 section 10.3)."""

    # Step 7 lets a registrar refuse no interval of an hour or more.
    min_expires_s: Annotated[int, Field(ge=1, le=3600)] = 60
    default_expires_s: Annotated[int, Field(ge=1, le=604_800)] = 600
    max_expires_s: Annotated[int, Field(ge=1, le=604_800)] = 3600
    max_bindings: Annotated[int, Field(ge=1, le=100)] = 10

    def contradictions(self) -> Iterator[Fault]:
        """The default lies within the bounds."""
        low, default, high = self.min_expires_s, self.default_expires_s, self.max_expires_s
        if low > high:
            yield Fault(
                ("max_expires_s",), f"{high} is less than min_expires_s, {low}; no registration would be accepted"
            )
        elif not low <= default <= high:
            yield Fault(
                ("default_expires_s",), f"{default} is not within min_expires_s, {low}, and max_expires_s, {high}"
            )


class Ha1Settings(Section):
    """Hashes of user:realm:password in hexadecimal (RFC 7616 section 3.4.2)."""

    md5: SecretStr | None = None
    sha256: SecretStr | None = None

    def contradictions(self) -> Iterator[Fault]:
        """There is one, and each has its algorithm's length."""
        if self.md5 is None and self.sha256 is None:
            yield Fault((), "give md5, sha256 or both")
        for key, secret, digits in (("md5", self.md5, 32), ("sha256", self.sha256, 64)):
            if secret is not None and not re.fullmatch(rf"[0-9a-fA-F]{{{digits}}}", secret.get_secret_value()):
                yield Fault((key,), f"must be {digits} hexadecimal digits: the hash of user:realm:password")


class UserSettings(Section):
    """Somebody who registers and calls, with one of a password and its hashes."""

    name: UserName
    password: SecretStr | None = None
    ha1: Ha1Settings | None = None
    display_name: Annotated[str, _matching(r"[^\x00-\x1f\x7f]{0,128}", "at most 128 characters without controls")] = ""
    nat: NatHandling = NatHandling.AUTO

    def contradictions(self) -> Iterator[Fault]:
        """Exactly one credential, and not an empty one."""
        if self.password is None and self.ha1 is None:
            yield Fault((), f"user {self.name} has no credential; give password or ha1")
        elif self.password is not None and self.ha1 is not None:
            yield Fault((), f"user {self.name} has both password and ha1; remove one of them")
        elif self.password is not None and not self.password.get_secret_value():
            yield Fault(("password",), "is empty; anybody could register")


class TrunkSettings(Section):
    """A peer with a static address."""

    name: Name
    destination: HostPort
    transport: TransportName = Transport.UDP
    listener: Name | None = None
    trusted: tuple[TrustedNetwork, ...] = ()

    @property
    def trusted_networks(self) -> tuple[Network, ...]:
        """Where its requests may come from: its destination unless said otherwise."""
        return self.trusted or (_network(self.destination.host),)

    def contradictions(self) -> Iterator[Fault]:
        """A peer must be told apart from the rest of the world, and a trunk called like all users from them."""
        if self.name == USERS:
            yield Fault(("name",), f"{USERS!r} stands for all users in routes; choose another name")
        for index, network in enumerate(self.trusted):
            if network.prefixlen == 0:
                yield Fault(("trusted", index), f"{network} trusts everybody; name the peer's own networks")


class RouteSettings(Section):
    """Where numbers with a prefix go, for callers that may use it."""

    prefix: Prefix
    trunk: Name | None = None
    user: UserName | None = None
    strip: Annotated[int, Field(ge=0)] = 0
    prepend: Prepended = ""
    callers: Annotated[tuple[str, ...] | None, Field(alias="from", min_length=1)] = None

    def contradictions(self) -> Iterator[Fault]:
        """One target, and a change of the number only where the number travels on."""
        if (self.trunk is None) == (self.user is None):
            yield Fault((), f"route {self.prefix} needs exactly one of trunk and user")
        if self.strip > len(self.prefix):
            yield Fault(
                ("strip",), f"{self.strip} is more than the prefix {self.prefix} has characters, {len(self.prefix)}"
            )
        if self.user is not None and (self.strip or self.prepend):
            yield Fault(
                (), f"route {self.prefix} goes to a user, whose contact replaces the number; remove strip and prepend"
            )


class LimitSettings(Section):
    """What is refused to protect the calls that run."""

    max_calls: Annotated[int, Field(ge=1, le=100_000)] = 1000
    calls_per_second: Annotated[float, Field(gt=0, le=100_000)] = 50.0
    retry_after_s: Annotated[int, Field(ge=1, le=3600)] = 10
    max_message_bytes: Annotated[int, Field(ge=1300, le=65_535)] = 65_535


class MediaAddressSettings(_Advertising):
    """What the data plane binds for one IP family, and what SDP says of it."""


class MediaSettings(Section):
    """The data plane, as the control plane uses it."""

    target: GrpcTarget = "unix:///run/sippbx/media.sock"
    mode: MediaMode = MediaMode.BYPASS
    addresses: Annotated[tuple[MediaAddressSettings, ...], Field(min_length=1, max_length=2)] = (
        MediaAddressSettings(),
    )
    latch_policy: LatchPolicy = LatchPolicy.NAT_AWARE
    lost_timeout_s: Annotated[float, Field(ge=1, le=3600)] = 10.0
    command_timeout_s: Annotated[float, Field(ge=0.1, le=60)] = 2.0

    def contradictions(self) -> Iterator[Fault]:
        """One address for each family."""
        yield from _duplicates("addresses", [f"IPv{address.version}" for address in self.addresses], "bind")


class CdrSettings(Section):
    """Where call detail records are kept."""

    sqlite_path: Path = Path("/var/lib/sippbx/cdr.sqlite")
    jsonl_path: Path | None = Path("/var/lib/sippbx/cdr.jsonl")

    def contradictions(self) -> Iterator[Fault]:
        """Two files."""
        if self.sqlite_path == self.jsonl_path:
            yield Fault(("jsonl_path",), f"{self.jsonl_path} is sqlite_path, too; give each a file of its own")


class MetricsSettings(Section):
    """Where Prometheus finds /metrics, over TCP."""

    bind: IpAddress = "0.0.0.0"
    port: Port = 9090


class Settings(Section):
    """Everything that can be set, checked as a whole: an instance has no contradictions."""

    node_name: Annotated[NodeName, Field(validate_default=True)] = Field(default_factory=socket.gethostname)
    realm: Realm = "sippbx"
    # In the order in which they are offered; some phones look at the first challenge alone.
    digest_algorithms: Annotated[tuple[DigestAlgorithm, ...], Field(min_length=1, max_length=2)] = (
        DigestAlgorithm.SHA_256,
        DigestAlgorithm.MD5,
    )
    log: LogSettings = LogSettings()
    sip: SipSettings = SipSettings()
    registrar: RegistrarSettings = RegistrarSettings()
    users: tuple[UserSettings, ...] = ()
    trunks: tuple[TrunkSettings, ...] = ()
    routes: tuple[RouteSettings, ...] = ()
    limits: LimitSettings = LimitSettings()
    media: MediaSettings = MediaSettings()
    cdr: CdrSettings = CdrSettings()
    metrics: MetricsSettings = MetricsSettings()

    def listener_of(self, trunk: TrunkSettings) -> ListenerSettings | None:
        """The listener that a trunk is reached through: the one it names, or else the first that can."""
        needed = (trunk.transport, ip_address(trunk.destination.host).version)
        return next(
            (
                listener
                for listener in self.sip.listeners
                if (listener.transport, listener.version) == needed and trunk.listener in (None, listener.name)
            ),
            None,
        )

    def trunk_values(self) -> tuple[Trunk, ...]:
        """The trunks as call logic knows them."""
        listeners = [(trunk, self.listener_of(trunk)) for trunk in self.trunks]
        return tuple(
            Trunk(trunk.name, Flow(trunk.transport, listener.name, trunk.destination), trunk.trusted_networks)
            for trunk, listener in listeners
            if listener is not None
        )

    def route_rules(self) -> tuple[RouteRule, ...]:
        """The routes as call logic knows them."""
        return tuple(
            RouteRule(
                prefix=route.prefix,
                callers=self._callers(route),
                trunk=route.trunk,
                user=route.user,
                strip=route.strip,
                prepend=route.prepend,
            )
            for route in self.routes
        )

    def _callers(self, route: RouteSettings) -> frozenset[str]:
        if route.callers is not None:
            return frozenset(route.callers)
        # Relaying from trunk to trunk is how toll fraud is done: only a route that names the trunk allows it.
        return frozenset({USERS}) if route.trunk else frozenset({USERS, *(trunk.name for trunk in self.trunks)})

    def contradictions(self) -> Iterator[Fault]:
        """What is wrong between the sections."""
        yield from _duplicates("users", [user.name for user in self.users], "name")
        yield from _duplicates("trunks", [trunk.name for trunk in self.trunks], "name")
        yield from self._clashing_sockets()
        yield from self._unusable_trunks()
        yield from self._unusable_routes()
        media_versions = {address.version for address in self.media.addresses}
        for listener in self.sip.listeners:
            if listener.version not in media_versions:
                message = f"has no IPv{listener.version} address for listener {listener.name!r}; add one"
                yield Fault(("media", "addresses"), message)

    def _clashing_sockets(self) -> Iterator[Fault]:
        sockets = [
            _Socket(("sip", "listeners", index, "port"), _PROTOCOLS[listener.transport], listener.bind, listener.port)
            for index, listener in enumerate(self.sip.listeners)
        ]
        sockets.append(_Socket(("metrics", "port"), "TCP", self.metrics.bind, self.metrics.port))
        for first, second in combinations(sockets, 2):
            if first.clashes_with(second):
                taken = f"{second.protocol} port {second.port} on {second.bind} is taken by {path_of(first.location)}"
                yield Fault(second.location, f"{taken} on {first.bind}; choose another port or address")

    def _unusable_trunks(self) -> Iterator[Fault]:
        owners: dict[Network, str] = {}
        names = [listener.name for listener in self.sip.listeners]
        for index, trunk in enumerate(self.trunks):
            if trunk.listener is not None and trunk.listener not in names:
                message = f"there is no listener {trunk.listener!r} under sip.listeners; there are: {', '.join(names)}"
                yield Fault(("trunks", index, "listener"), message)
            elif self.listener_of(trunk) is None:
                yield Fault(("trunks", index, "destination"), self._unreachable(trunk))
            for network in trunk.trusted_networks:
                owner = owners.setdefault(network, trunk.name)
                if owner != trunk.name:
                    message = f"{network} is trusted as trunk {owner}, too; nobody could tell the two apart"
                    yield Fault(("trunks", index, "trusted"), message)

    @staticmethod
    def _unreachable(trunk: TrunkSettings) -> str:
        kind = f"{trunk.transport} over IPv{ip_address(trunk.destination.host).version}"
        if trunk.listener is not None:
            return f"{trunk.destination} needs {kind}, which listener {trunk.listener!r} is not for; name another"
        return f"{trunk.destination} needs {kind}, but no listener is for that; add one to sip.listeners"

    def _unusable_routes(self) -> Iterator[Fault]:
        users, trunks = {user.name for user in self.users}, {trunk.name for trunk in self.trunks}
        rules = self.route_rules()
        for index, route in enumerate(self.routes):
            if route.trunk is not None and route.trunk not in trunks:
                yield Fault(("routes", index, "trunk"), _unknown("trunk", route.trunk, trunks))
            if route.user is not None and route.user not in users:
                yield Fault(("routes", index, "user"), _unknown("user", route.user, users))
            for position, caller in enumerate(route.callers or ()):
                if caller not in trunks | {USERS}:
                    yield Fault(("routes", index, "from", position), _unknown("trunk", caller, trunks | {USERS}))
            for earlier in range(index):
                if rules[earlier].prefix == route.prefix and (both := rules[earlier].callers & rules[index].callers):
                    message = f"{route.prefix} is the prefix of routes[{earlier}], too, for {', '.join(sorted(both))}"
                    yield Fault(("routes", index, "prefix"), f"{message}; remove one, or part them by 'from'")


class _Socket(NamedTuple):
    location: Location
    protocol: str
    bind: str
    port: int

    def clashes_with(self, other: "_Socket") -> bool:
        one, two = ip_address(self.bind), ip_address(other.bind)
        overlap = one.version == two.version and (one == two or one.is_unspecified or two.is_unspecified)
        return overlap and (self.protocol, self.port) == (other.protocol, other.port)


_PROTOCOLS = {Transport.UDP: "UDP"}


def _unknown(what: str, name: str, known: set[str]) -> str:
    return f"there is no {what} {name!r}; {nearest_of(name, known)}"


def load(path: Path | None, environ: Mapping[str, str]) -> Settings:
    """Reads the file, if any, and the environment over it.

    Raises:
        SettingsError: with everything that is wrong, as far as it can be told in one go.
    """
    return read(Settings, path, ENVIRONMENT_PREFIX, environ)
