"""The data plane's settings: YAML, overridden by SIPPBX_DATAPLANE_SECTION__KEY; see deploy/config/dataplane.yaml.

Besides the values themselves, what they ask of this host is checked here: the ephemeral port range and the number of
descriptors.
"""

import re
import resource
from collections.abc import Iterator, Mapping
from enum import StrEnum
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from sippbx.runtime.settings_models import LogSettings, Section
from sippbx.runtime.settings_reader import Fault, SettingsError, read

__all__ = ["Settings", "SettingsError", "load", "prepare_host"]

ENVIRONMENT_PREFIX = "SIPPBX_DATAPLANE_"
RESERVED_DESCRIPTORS = 256
EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
RESERVED_PORTS = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")


def _numeric(text: str) -> str:
    try:
        return str(ip_address(text.strip("[]")))
    except ValueError:
        raise ValueError(f"{text!r} is not a numeric IPv4 or IPv6 address") from None


def _listen_target(text: str) -> str:
    if not re.fullmatch(r"unix:///\S+|(\[[0-9A-Fa-f:.]+\]|[0-9.]+):[0-9]{1,5}", text):
        raise ValueError(f"{text!r} is neither unix:///absolute/path nor numeric-address:port")
    return text


IpAddress = Annotated[str, AfterValidator(_numeric)]
Port = Annotated[int, Field(ge=1, le=65535)]


class GrpcSettings(Section):
    """Where the control plane programs the data plane."""

    listen: Annotated[str, AfterValidator(_listen_target)] = "unix:///run/sippbx/media.sock"
    insecure: bool = False

    @property
    def socket_path(self) -> Path | None:
        """The Unix socket's path; None for TCP."""
        return Path(self.listen.removeprefix("unix://")) if self.listen.startswith("unix:") else None

    def contradictions(self) -> Iterator[Fault]:
        """A TCP port that others can reach has no protection of its own."""
        if self.listen.startswith("unix:") or self.insecure:
            return
        host = self.listen.rpartition(":")[0].strip("[]")
        if not ip_address(host).is_loopback:
            message = f"{self.listen} is open to the network without authentication; use a unix socket, or set insecure"
            yield Fault(("listen",), message)


class Engine(StrEnum):
    """A way of relaying."""

    USERSPACE = "userspace"


class MediaSettings(Section):
    """Ports and how they are used."""

    engine: Engine = Engine.USERSPACE
    port_range: tuple[Port, Port] = (10_000, 20_000)
    block_size: Annotated[int, Field(ge=4, le=64)] = 8
    rest_s: Annotated[float, Field(ge=0, le=3600)] = 10.0
    silence_s: Annotated[float, Field(ge=1, le=86_400)] = 30.0
    receive_buffer_bytes: Annotated[int, Field(ge=4096, le=16_777_216)] = 262_144

    def contradictions(self) -> Iterator[Fault]:
        """The range holds whole blocks that begin with an even port."""
        first, last = self.port_range
        if self.block_size % 4:
            yield Fault(("block_size",), f"{self.block_size} is not a multiple of 4: two legs need a port pair a line")
        if first % 2:
            yield Fault(("port_range",), f"{first} is odd; RTP ports are even (RFC 3550 section 11)")
        if last - first + 1 < self.block_size:
            yield Fault(("port_range",), f"{first} to {last} holds no block of {self.block_size} ports; widen it")


class LeaseSettings(Section):
    """How long things outlive their owner, in seconds."""

    owner_grace_s: Annotated[float, Field(ge=1, le=86_400)] = 120.0
    tombstone_s: Annotated[float, Field(ge=1, le=86_400)] = 600.0
    statistics_path: Path | None = Path("media-statistics.jsonl")
    drain_timeout_s: Annotated[float, Field(ge=0, le=86_400)] = 3600.0


class MetricsSettings(Section):
    """Where Prometheus finds /metrics."""

    bind: IpAddress = "0.0.0.0"
    port: Port = 9091


class Settings(Section):
    """Everything that can be set."""

    log: LogSettings = LogSettings()
    grpc: GrpcSettings = GrpcSettings()
    media: MediaSettings = MediaSettings()
    lease: LeaseSettings = LeaseSettings()
    metrics: MetricsSettings = MetricsSettings()

    @property
    def statistics_path(self) -> Path | None:
        """Where statistics are kept for the next process; None where they are not."""
        path, socket_path = self.lease.statistics_path, self.grpc.socket_path
        if path is None or path.is_absolute():
            return path
        return None if socket_path is None else socket_path.parent / path


def load(path: Path | None, environ: Mapping[str, str]) -> Settings:
    """Reads the file, if any, and the environment over it.

    Raises:
        SettingsError: with everything that is wrong.
    """
    return read(Settings, path, ENVIRONMENT_PREFIX, environ)


def prepare_host(
    media: MediaSettings, *, ephemeral_range: Path = EPHEMERAL_RANGE, reserved_ports: Path = RESERVED_PORTS
) -> None:
    """Checks that this host can give what the range asks for, and raises the limit of descriptors to it.

    Raises:
        SettingsError: the range overlaps the kernel's ephemeral ports, or needs more descriptors than may be had.
    """
    first, last = media.port_range
    low, high = (int(text) for text in ephemeral_range.read_text().split())
    reserved = _parse_ranges(reserved_ports.read_text() if reserved_ports.exists() else "")
    clash = next((p for p in range(max(first, low), min(last, high) + 1) if not _within(p, reserved)), None)
    if clash is not None:
        raise SettingsError(
            [
                (
                    f"media.port_range: {first} to {last} overlaps the kernel's ephemeral ports {low} to {high}, which"
                    f" any program may be given (port {clash} first); choose another range, or reserve these ports with"
                    f" net.ipv4.ip_local_reserved_ports={first}-{last}"
                )
            ]
        )
    needed = (last - first + 1) // media.block_size * media.block_size + RESERVED_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise SettingsError(
            [
                (
                    f"media.port_range: {first} to {last} needs {needed} descriptors, this process may have {hard};"
                    " narrow the range, or raise the limit (ulimit -Hn, LimitNOFILE)"
                )
            ]
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _parse_ranges(text: str) -> list[tuple[int, int]]:
    ranges = []
    for part in text.strip().split(","):
        if part:
            start, _, end = part.partition("-")
            ranges.append((int(start), int(end or start)))
    return ranges


def _within(port: int, ranges: list[tuple[int, int]]) -> bool:
    return any(start <= port <= end for start, end in ranges)
