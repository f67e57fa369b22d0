"""Settings of the control plane: a YAML file, overridden by SIPPBX_CONTROL_SECTION__KEY in the environment.

deploy/config/control.yaml explains each key. Nothing here resolves names or looks at the machine, its host name aside.
"""

import socket
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from itertools import combinations
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field

from control.pbx.routing import USERS, RouteRule
from control.pbx.trunks import Network, Trunk
from control.settings.sections import (
    ApiSettings,
    CdrSettings,
    DigestAlgorithm,
    DrainSettings,
    EventSettings,
    LimitSettings,
    ListenerSettings,
    MediaSettings,
    MetricsSettings,
    RegistrarSettings,
    RouteSettings,
    SipSettings,
    StoreSettings,
    TrunkSettings,
    TrunkTlsSettings,
    UserSettings,
    WebhookSettings,
    duplicates,
)
from control.settings.values import NodeName, Realm
from control.sip.address import Address, Flow, Transport
from sippbx.runtime.settings_models import LogSettings, Section
from sippbx.runtime.settings_reader import Fault, Location, SettingsError, nearest_of, path_of, read

__all__ = ["Settings", "SettingsError", "load"]

ENVIRONMENT_PREFIX = "SIPPBX_CONTROL_"


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
    store: StoreSettings = StoreSettings()
    cdr: CdrSettings = CdrSettings()
    events: EventSettings = EventSettings()
    webhooks: tuple[WebhookSettings, ...] = ()
    api: ApiSettings = ApiSettings()
    metrics: MetricsSettings = MetricsSettings()
    drain: DrainSettings = DrainSettings()

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

    def stream_flows(self) -> dict[Flow, Flow]:
        """The connection that may be tried instead of each flow to a trunk over UDP, where a listener is for that."""
        found: dict[Flow, Flow] = {}
        for trunk in self.trunk_values():
            version = ip_address(trunk.flow.remote.host).version
            for listener in self.sip.listeners:
                if (listener.transport, listener.version) == (Transport.TCP, version):
                    found.setdefault(trunk.flow, Flow(Transport.TCP, listener.name, trunk.flow.remote))
        return {flow: stream for flow, stream in found.items() if flow.transport is Transport.UDP}

    def tls_peers(self) -> dict[Address, TrunkTlsSettings]:
        """What the trunks that are reached by TLS must show, by their addresses."""
        reached = [trunk for trunk in self.trunks if trunk.transport is Transport.TLS]
        return {trunk.destination: trunk.tls or TrunkTlsSettings() for trunk in reached}

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
        yield from duplicates("users", [user.name for user in self.users], "name")
        yield from duplicates("trunks", [trunk.name for trunk in self.trunks], "name")
        yield from duplicates("webhooks", [webhook.name for webhook in self.webhooks], "name")
        for key, path in (("jsonl_path", self.cdr.jsonl_path), ("csv_path", self.cdr.csv_path)):
            if path == self.store.path:
                yield Fault(("cdr", key), f"{path} is store.path, too; give each a file of its own")
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
        servers = (
            (("metrics", "port"), self.metrics),
            (("api", "http", "port"), self.api.http),
            (("api", "grpc", "port"), self.api.grpc),
        )
        sockets += [_Socket(location, "TCP", server.bind, server.port) for location, server in servers]
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


_PROTOCOLS = {Transport.UDP: "UDP", Transport.TCP: "TCP", Transport.TLS: "TCP"}


def _unknown(what: str, name: str, known: set[str]) -> str:
    return f"there is no {what} {name!r}; {nearest_of(name, known)}"


def load(path: Path | None, environ: Mapping[str, str]) -> Settings:
    """Reads the file, if any, and the environment over it.

    Raises:
        SettingsError: with everything that is wrong, as far as it can be told in one go.
    """
    return read(Settings, path, ENVIRONMENT_PREFIX, environ)
