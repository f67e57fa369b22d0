"""Trunks: the peers that need no password because of where they speak from.

Trust is by the source address of a datagram and by nothing that stands in it: headers are forged easily (RFC 3261
section 26.1.1).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from control.sip.address import Address, Flow

Network = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class Trunk:
    """A peer with a static address: `flow` is the way to it, requests from `trusted` are its own, from any port."""

    name: str
    flow: Flow
    trusted: tuple[Network, ...]


class Trunks:
    """All trunks, found by name or by source address."""

    def __init__(self, trunks: Iterable[Trunk] = ()) -> None:
        """Raises ValueError when two trunks have one name."""
        self._by_name: dict[str, Trunk] = {}
        for trunk in trunks:
            if trunk.name in self._by_name:
                raise ValueError(f"two trunks are called {trunk.name!r}")
            self._by_name[trunk.name] = trunk
        # Most specific first, so that a trunk with one address may lie within the network of another.
        self._trusted: list[tuple[Network, Trunk]] = sorted(
            ((network, trunk) for trunk in self._by_name.values() for network in trunk.trusted),
            key=lambda entry: entry[0].prefixlen - entry[0].max_prefixlen,
            reverse=True,
        )

    def of_source(self, address: Address) -> Trunk | None:
        """The trunk that trusts this source, the one with the most specific network if several do."""
        source = _ip(address.host)
        if source is None:
            return None
        return next((trunk for network, trunk in self._trusted if source in network), None)

    def get(self, name: str) -> Trunk | None:
        """The trunk of this name."""
        return self._by_name.get(name)

    def __len__(self) -> int:
        return len(self._by_name)


def _ip(host: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(host)
    except ValueError:
        return None
    # A dual-stack socket shows IPv4 peers as ::ffff:192.0.2.1 (RFC 4291 section 2.5.5.2).
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address
