"""The sections of the settings, each free of contradictions in itself; deploy/config/control.yaml explains each key."""

import re
from base64 import b64decode
from collections.abc import Iterator
from enum import StrEnum
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SecretStr

from control.pbx.media import LatchPolicy, MediaMode
from control.pbx.routing import USERS, NatHandling
from control.pbx.trunks import Network
from control.settings.values import (
    AUTO,
    SIP_PORT,
    SIPS_PORT,
    Advertised,
    EventType,
    GrpcTarget,
    HostPort,
    HttpUrl,
    IpAddress,
    Name,
    Port,
    Prefix,
    Prepended,
    ProductName,
    ServerName,
    TransportName,
    TrustedNetwork,
    UserName,
    matching,
    network_of,
)
from control.sip.address import Transport
from sippbx.runtime.settings_models import Section
from sippbx.runtime.settings_reader import Fault

MIN_API_KEY_CHARACTERS = 16
MIN_WEBHOOK_SECRET_BYTES = 24
MAX_WEBHOOK_SECRET_BYTES = 64


def duplicates(key: str, values: list[str], attribute: str) -> Iterator[Fault]:
    """A fault for each entry of the list `key` whose `attribute` has a value that an earlier one has, too."""
    for index, value in enumerate(values):
        if (first := values.index(value)) < index:
            yield Fault((key, index, attribute), f"{value} is {key}[{first}], too; there can be only one")


class DigestAlgorithm(StrEnum):
    """How passwords are proved (RFC 8760)."""

    SHA_256 = "SHA-256"
    MD5 = "MD5"


class Advertising(Section):
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


class TlsSettings(Section):
    """The certificate chain and the private key, in PEM."""

    certificate_path: Path
    private_key_path: Path


class ListenerTlsSettings(TlsSettings):
    """What a listener for TLS shows; with `client_ca_path` who connects must show a certificate, too."""

    client_ca_path: Path | None = None


def _port_of(transport: Any) -> int:
    return SIPS_PORT if transport is Transport.TLS else SIP_PORT


class ListenerSettings(Advertising):
    """A socket for SIP. An IPv6 listener takes IPv6 alone."""

    name: Name
    transport: TransportName = Transport.UDP
    port: Port = Field(default_factory=lambda data: _port_of(data.get("transport")))
    advertise_port: Port | None = None
    tls: ListenerTlsSettings | None = None

    def contradictions(self) -> Iterator[Fault]:
        """There is a certificate where one is shown, and only there."""
        yield from super().contradictions()
        if self.transport is Transport.TLS and self.tls is None:
            yield Fault(("tls",), f"listener {self.name} needs a certificate; give certificate_path, private_key_path")
        if self.transport is not Transport.TLS and self.tls is not None:
            yield Fault(("tls",), f"is for transport tls alone, listener {self.name} has {self.transport.lower()}")

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


class ConnectionSettings(Section):
    """TCP and TLS connections of each listener."""

    max_open: Annotated[int, Field(ge=1, le=100_000)] = 2048
    max_per_source: Annotated[int, Field(ge=1, le=100_000)] = 256
    idle_timeout_s: Annotated[float, Field(ge=1, le=604_800)] = 3900.0
    message_timeout_s: Annotated[float, Field(ge=0.1, le=300)] = 10.0
    connect_timeout_s: Annotated[float, Field(ge=0.1, le=60)] = 5.0
    max_unsent_bytes: Annotated[int, Field(ge=65_536, le=16_777_216)] = 262_144


class SipSettings(Section):
    """Signalling."""

    listeners: Annotated[tuple[ListenerSettings, ...], Field(min_length=1)] = (ListenerSettings(name="udp"),)
    server_name: ProductName = "sippbx"
    ring_timeout_s: Annotated[float, Field(ge=1, le=600)] = 60.0
    max_call_duration_s: Annotated[float, Field(ge=1, le=604_800)] = 14_400.0
    timers: TimerSettings = TimerSettings()
    connections: ConnectionSettings = ConnectionSettings()

    def contradictions(self) -> Iterator[Fault]:
        """Names are unique."""
        yield from duplicates("listeners", [listener.name for listener in self.listeners], "name")


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
    display_name: Annotated[str, matching(r"[^\x00-\x1f\x7f]{0,128}", "at most 128 characters without controls")] = ""
    nat: NatHandling = NatHandling.AUTO

    def contradictions(self) -> Iterator[Fault]:
        """Exactly one credential, and not an empty one."""
        if self.password is None and self.ha1 is None:
            yield Fault((), f"user {self.name} has no credential; give password or ha1")
        elif self.password is not None and self.ha1 is not None:
            yield Fault((), f"user {self.name} has both password and ha1; remove one of them")
        elif self.password is not None and not self.password.get_secret_value():
            yield Fault(("password",), "is empty; anybody could register")


class TrunkTlsSettings(Section):
    """What a peer's certificate must show: by default its numeric address, signed by who this host trusts."""

    server_name: ServerName | None = None
    ca_path: Path | None = None


class TrunkSettings(Section):
    """A peer with a static address."""

    name: Name
    destination: HostPort
    transport: TransportName = Transport.UDP
    listener: Name | None = None
    trusted: tuple[TrustedNetwork, ...] = ()
    tls: TrunkTlsSettings | None = None

    @property
    def trusted_networks(self) -> tuple[Network, ...]:
        """Where its requests may come from: its destination unless said otherwise."""
        return self.trusted or (network_of(self.destination.host),)

    def contradictions(self) -> Iterator[Fault]:
        """A peer must be told apart from the rest of the world, and a trunk called like all users from them."""
        if self.name == USERS:
            yield Fault(("name",), f"{USERS!r} stands for all users in routes; choose another name")
        if self.tls is not None and self.transport is not Transport.TLS:
            yield Fault(("tls",), f"is for transport tls alone, trunk {self.name} has {self.transport.lower()}")
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


class MediaAddressSettings(Advertising):
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
        yield from duplicates("addresses", [f"IPv{address.version}" for address in self.addresses], "bind")


class StoreSettings(Section):
    """Where this node keeps what must outlive its processes: call records, events, undelivered webhooks."""

    path: Path = Path("/var/lib/sippbx/sippbx.sqlite")
    journal: bool = True
    reserve_bytes: Annotated[int, Field(ge=0, le=1_099_511_627_776)] | None = None
    slow_after_s: Annotated[float, Field(ge=0.05, le=60)] = 1.0


class RotationPeriod(StrEnum):
    """Files of records for each hour or day, UTC."""

    HOUR = "hour"
    DAY = "day"


class CdrSettings(Section):
    """Call detail records for other programs; those of account are in the store."""

    jsonl_path: Path | None = Path("/var/lib/sippbx/cdr.jsonl")
    csv_path: Path | None = None
    rotate_bytes: Annotated[int, Field(ge=4096, le=1_099_511_627_776)] | None = None
    rotate_every: RotationPeriod | None = None
    keep_files: Annotated[int, Field(ge=0, le=100_000)] = 0

    def contradictions(self) -> Iterator[Fault]:
        """Each file has one format, and old ones come of rotation."""
        if self.csv_path is not None and self.csv_path == self.jsonl_path:
            yield Fault(("csv_path",), f"{self.csv_path} is jsonl_path, too; give each a file of its own")
        if self.keep_files and self.rotate_bytes is None and self.rotate_every is None:
            yield Fault(("keep_files",), "deletes files that were rotated; set rotate_bytes or rotate_every, too")


class EventSettings(Section):
    """How long events are kept for those who were away; the older bound of the two holds."""

    keep_s: Annotated[int, Field(ge=60, le=31_536_000)] = 86_400
    keep_events: Annotated[int, Field(ge=1000, le=100_000_000)] = 1_000_000


class WebhookSettings(Section):
    """Somebody who is told of events by HTTP POST (Standard Webhooks)."""

    name: Name
    url: HttpUrl
    secret: SecretStr
    events: Annotated[tuple[EventType, ...] | None, Field(min_length=1)] = None
    timeout_s: Annotated[float, Field(ge=0.1, le=60)] = 15.0
    concurrency: Annotated[int, Field(ge=1, le=100)] = 4
    give_up_after_s: Annotated[int, Field(ge=1, le=2_592_000)] = 259_200

    def contradictions(self) -> Iterator[Fault]:
        """The secret can sign."""
        text = self.secret.get_secret_value().removeprefix("whsec_")
        try:
            size = len(b64decode(text, validate=True))
        except ValueError:
            size = 0
        if not MIN_WEBHOOK_SECRET_BYTES <= size <= MAX_WEBHOOK_SECRET_BYTES:
            yield Fault(
                ("secret",),
                "must be whsec_ and the base64 of 24 to 64 random bytes; "
                "`echo whsec_$(head -c 32 /dev/urandom | base64)` makes one",
            )


class ApiKeySettings(Section):
    """A key for the APIs: itself, or the SHA-256 of it."""

    name: Name
    key: SecretStr | None = None
    sha256: SecretStr | None = None

    def contradictions(self) -> Iterator[Fault]:
        """Exactly one form, and not one that can be guessed."""
        if (self.key is None) == (self.sha256 is None):
            yield Fault((), f"API key {self.name} needs exactly one of key and sha256")
        if self.key is not None and len(self.key.get_secret_value()) < MIN_API_KEY_CHARACTERS:
            message = f"has fewer than {MIN_API_KEY_CHARACTERS} characters; `openssl rand -hex 24` makes a good one"
            yield Fault(("key",), message)
        if self.sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", self.sha256.get_secret_value()):
            yield Fault(("sha256",), "must be 64 hexadecimal digits: the SHA-256 of the key")


class HttpSettings(Section):
    """The HTTP API."""

    bind: IpAddress = "127.0.0.1"
    port: Port = 8080
    max_body_bytes: Annotated[int, Field(ge=1024, le=1_048_576)] = 65_536
    request_timeout_s: Annotated[float, Field(ge=0.1, le=300)] = 10.0


class GrpcSettings(Section):
    """The gRPC API (sippbx.control.v1)."""

    bind: IpAddress = "127.0.0.1"
    port: Port = 50051
    max_watchers: Annotated[int, Field(ge=1, le=100_000)] = 1000


class ApiSettings(Section):
    """How other programs drive this node. Without keys, nobody can."""

    keys: tuple[ApiKeySettings, ...] = ()
    tls: TlsSettings | None = None
    http: HttpSettings = HttpSettings()
    grpc: GrpcSettings = GrpcSettings()

    def contradictions(self) -> Iterator[Fault]:
        """Names are unique."""
        yield from duplicates("keys", [key.name for key in self.keys], "name")


class DrainSettings(Section):
    """How the node stops: running calls have so long to end by themselves."""

    timeout_s: Annotated[float, Field(ge=0, le=86_400)] = 600.0


class MetricsSettings(Section):
    """Where Prometheus finds /metrics, over TCP."""

    bind: IpAddress = "0.0.0.0"
    port: Port = 9090
