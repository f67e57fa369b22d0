"""Where messages come from and go to."""

from dataclasses import dataclass
from enum import StrEnum


class Transport(StrEnum):
    """A SIP transport, spelt as in Via (RFC 3261 section 20.42)."""

    UDP = "UDP"
    TCP = "TCP"
    TLS = "TLS"

    @property
    def is_reliable(self) -> bool:
        """Whether it delivers in order or tells that it could not (section 17): a connection, not datagrams."""
        return self is not Transport.UDP


@dataclass(frozen=True, slots=True)
class Address:
    """A numeric IP address and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def uri_host(self) -> str:
        """The host as URIs and Via write it: IPv6 in brackets (RFC 3261 section 25.1, IPv6reference)."""
        return f"[{self.host}]" if ":" in self.host else self.host


@dataclass(frozen=True, slots=True)
class Flow:
    """A way to a peer: a listening socket of ours, by name, and the peer's address.

    What is sent back along the flow on which a request came reaches its sender through any NAT (RFC 3581 section 4).
    Over TCP and TLS it names the connection with that address, of which there is one for each listener at a time,
    whoever opened it; where there is none, one can be opened.
    """

    transport: Transport
    listener: str
    remote: Address
