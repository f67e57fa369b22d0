"""Trust by source address."""

from ipaddress import ip_network

import pytest

from control.pbx.trunks import Trunk, Trunks
from control.sip.address import Address, Flow, Transport


def trunk(name: str, *trusted: str) -> Trunk:
    flow = Flow(Transport.UDP, "udp", Address("192.0.2.1", 5060))
    return Trunk(name, flow, tuple(ip_network(network) for network in trusted))


def name_of(trunks: Trunks, host: str, port: int = 5060) -> str | None:
    found = trunks.of_source(Address(host, port))
    return found.name if found else None


def test_a_trusted_address_is_the_trunk_s_from_any_port() -> None:
    trunks = Trunks([trunk("carrier", "192.0.2.1")])
    assert name_of(trunks, "192.0.2.1") == "carrier"
    assert name_of(trunks, "192.0.2.1", 40_000) == "carrier"


def test_an_address_outside_all_networks_is_nobody_s() -> None:
    trunks = Trunks([trunk("carrier", "192.0.2.0/28", "2001:db8::/64")])
    assert name_of(trunks, "192.0.2.16") is None
    assert name_of(trunks, "2001:db8:0:1::1") is None


def test_the_most_specific_network_decides_in_whatever_order_trunks_come() -> None:
    wide, narrow, one = trunk("wide", "192.0.0.0/16"), trunk("narrow", "192.0.2.0/24"), trunk("one", "192.0.2.1")
    for trunks in (Trunks([wide, narrow, one]), Trunks([one, narrow, wide])):
        assert name_of(trunks, "192.0.2.1") == "one"
        assert name_of(trunks, "192.0.2.2") == "narrow"
        assert name_of(trunks, "192.0.3.1") == "wide"


def test_ipv6_is_compared_by_value() -> None:
    trunks = Trunks([trunk("carrier", "2001:db8::1")])
    assert name_of(trunks, "2001:0db8:0:0::0001") == "carrier"


def test_an_ipv4_peer_of_a_dual_stack_socket_is_known_by_its_ipv4_address() -> None:
    assert name_of(Trunks([trunk("carrier", "192.0.2.1")]), "::ffff:192.0.2.1") == "carrier"


def test_what_is_no_address_is_nobody_s() -> None:
    assert name_of(Trunks([trunk("carrier", "0.0.0.0/1")]), "carrier.example.org") is None


def test_trunks_are_found_by_name() -> None:
    carrier = trunk("carrier", "192.0.2.1")
    trunks = Trunks([carrier])
    assert trunks.get("carrier") is carrier
    assert trunks.get("Carrier") is None
    assert len(trunks) == 1


def test_two_trunks_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="carrier"):
        Trunks([trunk("carrier", "192.0.2.1"), trunk("carrier", "192.0.2.2")])
