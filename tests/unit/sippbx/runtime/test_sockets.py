"""Listener specifications and the variables of the hand-over."""

import os

import pytest

from sippbx.runtime.sockets import Listener, SocketError, TcpListener, UdpListener, inherited_names, place, receive


@pytest.mark.parametrize(
    ("text", "listener"),
    [
        ("udp://0.0.0.0:5060", UdpListener("0.0.0.0", 5060)),
        ("udp://[::1]:5070", UdpListener("::1", 5070)),
        ("udp://[2001:DB8::0]:65535", UdpListener("2001:db8::", 65535)),
    ],
)
def test_listener_is_read_and_written_back(text: str, listener: UdpListener) -> None:
    assert UdpListener.parse(text) == listener
    assert UdpListener.parse(str(listener)) == listener


def test_listeners_for_connections_are_told_apart_from_those_for_datagrams() -> None:
    listener: Listener = TcpListener.parse("tcp://[::1]:5070")
    assert str(listener) == "tcp://[::1]:5070"
    assert listener != UdpListener("::1", 5070)
    with pytest.raises(SocketError, match="write tcp://ADDRESS:PORT"):
        TcpListener.parse("udp://[::1]:5070")


@pytest.mark.parametrize(
    "text",
    ["", "5060", "tcp://0.0.0.0:5060", "udp://::1:5060", "udp://host:5060", "udp://1.2.3.4:0", "udp://1.2.3.4:65536",
     "udp://1.2.3:5060", "udp://1.2.3.4:5060 ", "udp://[::g]:1"],
)  # fmt: skip
def test_anything_else_is_refused_and_quoted(text: str) -> None:
    with pytest.raises(SocketError) as refused:
        UdpListener.parse(text)
    assert repr(text) in str(refused.value)


def test_sockets_meant_for_another_process_are_not_taken() -> None:
    environment = {"LISTEN_PID": str(os.getpid() + 1), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "sip"}
    assert receive(environment) == {}
    assert environment == {}, "a later child with that number would be misled"


def test_no_variables_mean_no_sockets() -> None:
    assert inherited_names({}) == []


def test_names_come_in_the_order_of_descriptors() -> None:
    mine = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "sip-4:sip-6"}
    assert inherited_names(mine) == ["sip-4", "sip-6"]


@pytest.mark.parametrize(("count", "names"), [("2", "sip"), ("1", "a:b"), ("x", "a"), ("", "a"), ("-1", "a")])
def test_contradicting_variables_are_refused(count: str, names: str) -> None:
    if count == "":
        assert inherited_names({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "0", "LISTEN_FDNAMES": ""}) == []
    with pytest.raises(SocketError):
        inherited_names({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count, "LISTEN_FDNAMES": names})


@pytest.mark.parametrize("name", ["", "a:b", "a b", "ä", "x" * 256])
def test_names_that_the_variables_cannot_carry_are_refused_before_anything_moves(name: str) -> None:
    environment: dict[str, str] = {}
    with pytest.raises(SocketError):
        place([(name, None)], environment)  # type: ignore[list-item]
    assert environment == {}
