"""control.transport.udp on real sockets."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from control.sip.address import Address, Flow, Transport
from control.transport.udp import UdpTransport

pytestmark = pytest.mark.integration

Datagrams = asyncio.Queue[tuple[bytes, Flow]]


def bound(host: str, port: int = 0) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((host, port))
    return sock


@pytest.fixture(params=["127.0.0.1", "::1"])
def host(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def peer(host: str) -> Iterator[socket.socket]:
    with closing(bound(host)) as sock:
        sock.settimeout(5)
        yield sock


def flow_to(sock: socket.socket) -> Flow:
    name = sock.getsockname()
    return Flow(Transport.UDP, "udp", Address(name[0], name[1]))


def address_of(transport: UdpTransport) -> tuple[str, int]:
    return transport.local.host, transport.local.port


async def test_a_datagram_is_handed_on_with_the_flow_it_came_along(host: str, peer: socket.socket) -> None:
    received: Datagrams = asyncio.Queue()
    transport = UdpTransport(
        bound(host), listener="outside", receive=lambda data, flow: received.put_nowait((data, flow))
    )
    transport.start()
    with closing(transport):
        peer.sendto(b"OPTIONS", address_of(transport))
        data, flow = await asyncio.wait_for(received.get(), 5)
    assert data == b"OPTIONS"
    name = peer.getsockname()
    assert flow == Flow(Transport.UDP, "outside", Address(name[0], name[1]))


async def test_an_answer_sent_along_the_flow_reaches_the_peer(host: str, peer: socket.socket) -> None:
    transport = UdpTransport(bound(host), listener="udp", receive=lambda data, flow: None)
    with closing(transport):
        assert transport.send(b"200 OK", flow_to(peer))
        data, source = peer.recvfrom(100)
        assert (data, source[:2]) == (b"200 OK", address_of(transport))
        assert transport.counters.sent == 1


async def test_a_burst_larger_than_one_wakeup_arrives_whole_and_in_order(peer: socket.socket, host: str) -> None:
    received: Datagrams = asyncio.Queue()
    transport = UdpTransport(
        bound(host), listener="udp", receive=lambda data, flow: received.put_nowait((data, flow)), burst=3
    )
    for number in range(10):
        peer.sendto(str(number).encode(), address_of(transport))
    transport.start()
    with closing(transport):
        numbers = [int((await asyncio.wait_for(received.get(), 5))[0]) for _ in range(10)]
    assert numbers == list(range(10))
    assert transport.counters.received == 10


async def test_one_wakeup_takes_no_more_than_a_burst(peer: socket.socket, host: str) -> None:
    loop = asyncio.get_running_loop()
    events: list[str] = []
    all_received = asyncio.Event()

    def receive(data: bytes, flow: Flow) -> None:
        if not events:
            loop.call_soon(events.append, "other work")
        events.append("datagram")
        if events.count("datagram") == 4:
            all_received.set()

    transport = UdpTransport(bound(host), listener="udp", receive=receive, burst=2)
    for _ in range(4):
        peer.sendto(b"x", address_of(transport))
    transport.start()
    with closing(transport):
        await asyncio.wait_for(all_received.wait(), 5)
    assert events.index("other work") == 2


async def test_a_handler_that_raises_costs_its_own_datagram_only(peer: socket.socket, host: str) -> None:
    received: Datagrams = asyncio.Queue()

    def receive(data: bytes, flow: Flow) -> None:
        if data == b"bad":
            raise ValueError("a bug")
        received.put_nowait((data, flow))

    transport = UdpTransport(bound(host), listener="udp", receive=receive)
    transport.start()
    with closing(transport):
        peer.sendto(b"bad", address_of(transport))
        peer.sendto(b"good", address_of(transport))
        data, _ = await asyncio.wait_for(received.get(), 5)
    assert data == b"good"
    assert transport.counters.handler_errors == 1


async def test_what_is_larger_than_a_datagram_is_refused(peer: socket.socket, host: str) -> None:
    transport = UdpTransport(bound(host), listener="udp", receive=lambda data, flow: None)
    with closing(transport):
        assert not transport.send(bytes(65_508), flow_to(peer))
        assert transport.counters.dropped_oversized == 1
        assert transport.send(bytes(60_000), flow_to(peer))
        assert len(peer.recv(65_535)) == 60_000


async def test_a_peer_that_is_not_there_harms_neither_reading_nor_sending(host: str, peer: socket.socket) -> None:
    received: Datagrams = asyncio.Queue()
    transport = UdpTransport(bound(host), listener="udp", receive=lambda data, flow: received.put_nowait((data, flow)))
    transport.start()
    with closing(transport), closing(bound(host)) as gone:
        nobody = flow_to(gone)
        gone.close()
        for _ in range(3):
            transport.send(b"hello", nobody)
        assert transport.send(b"hello", flow_to(peer))
        assert peer.recv(100) == b"hello"
        peer.sendto(b"still there", address_of(transport))
        assert (await asyncio.wait_for(received.get(), 5))[0] == b"still there"


async def test_an_address_that_cannot_be_sent_to_is_counted(host: str) -> None:
    transport = UdpTransport(bound(host), listener="udp", receive=lambda data, flow: None)
    with closing(transport):
        assert not transport.send(b"x", Flow(Transport.UDP, "udp", Address(host, 70_000)))
        assert transport.counters.send_errors == 1


class _FullSocket(socket.socket):
    """A socket whose send buffer can be declared full."""

    full = True

    def sendto(self, *arguments: object) -> int:
        if self.full:
            raise BlockingIOError
        return super().sendto(*arguments)  # type: ignore[call-overload, no-any-return]


async def test_what_the_kernel_does_not_take_at_once_waits_in_order_and_within_bounds() -> None:
    with closing(bound("127.0.0.1")) as peer:
        peer.settimeout(5)
        sock = _FullSocket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("127.0.0.1", 0))
        transport = UdpTransport(sock, listener="udp", receive=lambda data, flow: None, max_queued=2)
        transport.start()
        with closing(transport):
            assert [transport.send(data, flow_to(peer)) for data in (b"1", b"2", b"3")] == [True, True, False]
            assert transport.counters.dropped_queue_full == 1
            sock.full = False
            assert [await asyncio.to_thread(peer.recv, 10) for _ in range(2)] == [b"1", b"2"]
            assert transport.send(b"4", flow_to(peer))
            assert peer.recv(10) == b"4"


async def test_datagrams_wait_in_a_paused_socket_and_overflow_is_told_by_the_kernel() -> None:
    sock = bound("127.0.0.1")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    received: Datagrams = asyncio.Queue()
    transport = UdpTransport(sock, listener="udp", receive=lambda data, flow: received.put_nowait((data, flow)))
    transport.start()
    transport.pause()
    with closing(transport), closing(bound("127.0.0.1")) as peer:
        for _ in range(100):
            peer.sendto(bytes(1_000), address_of(transport))
        await asyncio.sleep(0)
        assert received.empty()
        assert transport.kernel_drops() > 0
        transport.start()
        await asyncio.wait_for(received.get(), 5)


async def test_a_link_local_peer_is_answered_through_the_interface_it_was_heard_on() -> None:
    sent: list[object] = []

    class _Scoped(socket.socket):
        def sendto(self, *arguments: object) -> int:
            sent.append(arguments[-1])
            return 1

        def recvfrom(self, *arguments: object) -> tuple[bytes, tuple[str, int, int, int]]:
            super().recv(100)
            return b"x", ("fe80::1", 5060, 0, 7)

    received: Datagrams = asyncio.Queue()
    sock = _Scoped(socket.AF_INET6, socket.SOCK_DGRAM)
    sock.bind(("::1", 0))
    transport = UdpTransport(sock, listener="udp", receive=lambda data, flow: received.put_nowait((data, flow)))
    transport.start()
    with closing(transport), closing(bound("::1")) as peer:
        peer.sendto(b"x", address_of(transport))
        _, flow = await asyncio.wait_for(received.get(), 5)
        assert flow.remote == Address("fe80::1", 5060)
        transport.send(b"y", flow)
    assert sent == [("fe80::1", 5060, 0, 7)]
