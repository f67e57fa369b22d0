"""control.transport.stream on real sockets, over TCP and TLS."""

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trustme

from control.settings.sections import ConnectionSettings, ListenerTlsSettings, TrunkTlsSettings
from control.sip.address import Address, Flow, Transport
from control.transport.stream import StreamTransport, _source_of
from control.transport.tls import TlsContexts
from sippbx.runtime.sockets import TcpListener, bind_tcp
from tests.harness.messages import request_bytes, sdp

pytestmark = pytest.mark.integration

INVITE, BYE = request_bytes("INVITE", body=sdp()), request_bytes("BYE")
US, PEER = "127.0.0.91", "127.0.0.92"
PATIENCE_S = 5.0
Peer = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Node:
    """A transport and what it tells."""

    transport: StreamTransport
    received: asyncio.Queue[tuple[bytes, Flow]] = field(default_factory=asyncio.Queue)
    failed: asyncio.Queue[Flow] = field(default_factory=asyncio.Queue)

    @property
    def address(self) -> tuple[str, int]:
        return self.transport.local.host, self.transport.local.port

    async def message(self) -> tuple[bytes, Flow]:
        return await asyncio.wait_for(self.received.get(), PATIENCE_S)

    async def failure(self) -> Flow:
        return await asyncio.wait_for(self.failed.get(), PATIENCE_S)


def limits(**changes: float) -> ConnectionSettings:
    return ConnectionSettings.model_validate({"connect_timeout_s": 2, **changes})


@contextlib.asynccontextmanager
async def listening(
    host: str = US,
    *,
    tls: TlsContexts | None = None,
    receive: Callable[[bytes, Flow], None] | None = None,
    bounds: ConnectionSettings | None = None,
) -> AsyncIterator[Node]:
    received: asyncio.Queue[tuple[bytes, Flow]] = asyncio.Queue()
    failed: asyncio.Queue[Flow] = asyncio.Queue()
    transport = StreamTransport(
        bind_tcp(TcpListener(host, 0)),
        listener="stream",
        receive=receive or (lambda data, flow: received.put_nowait((data, flow))),
        failed=failed.put_nowait,
        limits=bounds or limits(),
        tls=tls,
    )
    node = Node(transport, received, failed)
    transport.start()
    try:
        yield node
    finally:
        await transport.close()
        assert len(transport) == 0
        assert not transport._current
        assert not transport._of_source
        assert not transport._tasks


@contextlib.asynccontextmanager
async def connected(
    node: Node, *, context: ssl.SSLContext | None = None, name: str | None = None, host: str = PEER
) -> AsyncIterator[Peer]:
    local = None if ":" in node.address[0] else (host, 0)
    reader, writer = await asyncio.open_connection(
        *node.address, local_addr=local, ssl=context, server_hostname=name if context else None
    )
    try:
        yield reader, writer
    finally:
        await closed(writer)


async def closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError, TimeoutError):
        await asyncio.wait_for(writer.wait_closed(), PATIENCE_S)


@dataclass
class Far:
    """A peer that takes connections."""

    address: Address
    peers: asyncio.Queue[Peer]

    @property
    def flow(self) -> Flow:
        return flow_to(self.address)

    async def peer(self) -> Peer:
        return await asyncio.wait_for(self.peers.get(), PATIENCE_S)


@contextlib.asynccontextmanager
async def far_end(context: ssl.SSLContext | None = None) -> AsyncIterator[Far]:
    peers: asyncio.Queue[Peer] = asyncio.Queue()
    taken: list[asyncio.StreamWriter] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taken.append(writer)
        peers.put_nowait((reader, writer))

    server = await asyncio.start_server(take, PEER, 0, ssl=context)
    try:
        yield Far(Address(*server.sockets[0].getsockname()), peers)
    finally:
        server.close()
        for writer in taken:
            await closed(writer)
        await server.wait_closed()


def flow_to(address: Address, transport: Transport = Transport.TCP) -> Flow:
    return Flow(transport, "stream", address)


async def read(reader: asyncio.StreamReader, count: int) -> bytes:
    return await asyncio.wait_for(reader.readexactly(count), PATIENCE_S)


async def until_end(reader: asyncio.StreamReader) -> bytes:
    """What comes until the other end closes or resets."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while chunk := await asyncio.wait_for(reader.read(65_536), PATIENCE_S):
            data += chunk
    return data


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)


# ------------------------------------------------------------------------------------------ connections that peers open


@pytest.mark.parametrize("host", [US, "::1"])
async def test_messages_come_with_the_flow_of_their_connection_and_answers_go_back_over_it(host: str) -> None:
    async with listening(host) as node, connected(node) as (reader, writer):
        writer.write(INVITE + BYE[:20])
        data, flow = await node.message()
        name = writer.get_extra_info("sockname")
        assert (data, flow) == (INVITE, flow_to(Address(name[0], name[1])))
        writer.write(BYE[20:])
        assert await node.message() == (BYE, flow)
        assert node.transport.is_connected(flow)
        assert node.transport.send(b"SIP/2.0 200 OK\r\n\r\n", flow)
        assert await read(reader, 18) == b"SIP/2.0 200 OK\r\n\r\n"
        assert (node.transport.counters.received, node.transport.counters.sent) == (2, 1)


@pytest.mark.rfc("5626", "4.4.1")
async def test_a_ping_is_answered_by_a_pong() -> None:
    async with listening() as node, connected(node) as (reader, writer):
        writer.write(BYE + b"\r\n\r\n")
        assert await read(reader, 2) == b"\r\n"
        assert node.received.qsize() == 1


async def test_a_message_whose_length_nobody_knows_is_handed_on_and_then_the_connection_is_closed() -> None:
    head = BYE.replace(b"Content-Length: 0\r\n", b"")

    def refuse(data: bytes, flow: Flow) -> None:
        assert data == head
        node.transport.send(b"SIP/2.0 400 Bad Request\r\n\r\n", flow)

    async with listening(receive=refuse) as node, connected(node) as (reader, writer):
        writer.write(head + BYE)
        assert await until_end(reader) == b"SIP/2.0 400 Bad Request\r\n\r\n"
        await node.failure()
        assert node.transport.counters.connections_cut == 1


async def test_what_is_not_sip_is_cut_off_at_once() -> None:
    async with listening() as node, connected(node) as (reader, writer):
        writer.write(b"\x16\x03\x01\x02\x00\x01\x00")
        assert await until_end(reader) == b""
        assert node.received.empty()


async def test_a_flood_of_messages_lets_others_have_their_turn() -> None:
    loop = asyncio.get_running_loop()
    events: list[str] = []
    all_there = asyncio.Event()

    def receive(data: bytes, flow: Flow) -> None:
        if not events:
            loop.call_soon(events.append, "other work")
        events.append("message")
        if events.count("message") == 300:
            all_there.set()

    async with listening(receive=receive) as node, connected(node) as (_, writer):
        writer.write(BYE * 300)
        await asyncio.wait_for(all_there.wait(), PATIENCE_S)
    assert events.index("other work") <= 64


async def test_a_handler_that_raises_costs_its_own_message_only() -> None:
    got: asyncio.Queue[bytes] = asyncio.Queue()

    def receive(data: bytes, flow: Flow) -> None:
        if data == INVITE:
            raise ValueError("a bug")
        got.put_nowait(data)

    async with listening(receive=receive) as node, connected(node) as (_, writer):
        writer.write(INVITE + BYE)
        assert await asyncio.wait_for(got.get(), PATIENCE_S) == BYE
        assert node.transport.counters.handler_errors == 1


async def test_a_connection_that_the_peer_closes_is_told_of_by_its_flow() -> None:
    async with listening() as node:
        async with connected(node) as (_, writer):
            writer.write(BYE)
            _, flow = await node.message()
        assert await node.failure() == flow
        assert not node.transport.is_connected(flow)


async def test_a_connection_that_the_peer_resets_is_told_of_by_its_flow() -> None:
    async with listening() as node, connected(node) as (_, writer):
        writer.write(BYE)
        _, flow = await node.message()
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        assert await node.failure() == flow


# --------------------------------------------------------------------------------------------------------------- limits


async def test_connections_beyond_the_limit_of_their_source_are_closed_and_others_are_not() -> None:
    async with (
        listening(bounds=limits(max_per_source=2)) as node,
        connected(node) as (_, first),
        connected(node),
        connected(node) as (third, _),
        connected(node, host="127.0.0.93") as (_, other),
    ):
        assert await until_end(third) == b""
        for writer in (first, other):
            writer.write(BYE)
            await node.message()
        assert node.transport.counters.connections_refused == 1


def test_a_source_is_an_ipv4_address_or_an_ipv6_network() -> None:
    hosts = ["192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::ffff:2", "2001:db8:0:1::1"]
    one, two, three, four, five = (_source_of(Address(host, 5060)) for host in hosts)
    assert one != two
    assert three == four
    assert three != five


async def test_connections_beyond_the_limit_of_all_are_closed_and_ours_are_not_made() -> None:
    async with listening(bounds=limits(max_open=1)) as node, connected(node) as (_, writer), far_end() as far:
        writer.write(BYE)
        await node.message()
        async with connected(node, host="127.0.0.93") as (reader, _):
            assert await until_end(reader) == b""
        assert not node.transport.send(BYE, far.flow)
        assert await node.failure() == far.flow
        assert node.transport.counters.connections_refused == 2


async def test_the_place_of_a_connection_that_ended_can_be_taken() -> None:
    async with listening(bounds=limits(max_open=1)) as node:
        for _ in range(3):
            async with connected(node) as (_, writer):
                writer.write(BYE)
                await node.message()
            await node.failure()
            await until(lambda: len(node.transport) == 0)


@pytest.mark.parametrize("sent", [b"", b"\r\n\r\n", BYE[:30], BYE + BYE[:30], b"\r\n"])
async def test_a_peer_that_lets_us_wait_for_the_rest_of_a_message_is_cut_off(sent: bytes) -> None:
    async with listening(bounds=limits(message_timeout_s=0.1)) as node, connected(node) as (reader, writer):
        writer.write(sent)
        await until_end(reader)
        assert node.transport.counters.connections_cut == 1


async def test_a_message_that_trickles_in_is_cut_off_however_busy_the_connection_is() -> None:
    async with listening(bounds=limits(message_timeout_s=0.2)) as node, connected(node) as (reader, writer):

        async def trickle() -> None:
            with contextlib.suppress(ConnectionError):
                for octet in BYE:
                    writer.write(bytes([octet]))
                    await writer.drain()
                    await asyncio.sleep(0.02)

        trickling = asyncio.create_task(trickle())
        assert await until_end(reader) == b""
        trickling.cancel()
        assert node.received.empty()


async def test_a_connection_that_has_spoken_may_be_silent_until_it_counts_as_idle() -> None:
    bounds = limits(message_timeout_s=0.1, idle_timeout_s=1)
    async with listening(bounds=bounds) as node, connected(node) as (reader, writer):
        writer.write(BYE)
        _, flow = await node.message()
        await asyncio.sleep(0.3)
        assert node.transport.is_connected(flow)
        assert await until_end(reader) == b""
        assert await node.failure() == flow


async def test_a_peer_that_does_not_read_is_cut_off_when_too_much_waits_for_it() -> None:
    async with listening(bounds=limits(max_unsent_bytes=65_536)) as node, connected(node) as (_, writer):
        writer.write(BYE)
        _, flow = await node.message()
        sent = 0  # nobody reads: all buffers fill up
        while node.transport.send(bytes(50_000), flow):
            sent += 1
            assert sent < 1000
        assert node.failed.empty(), "whoever sends is not told from within"
        assert await node.failure() == flow


async def test_accepting_goes_on_after_the_descriptors_ran_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("control.transport.stream._REST_S", 0.05)
    sock = _Exhausted(socket.AF_INET, socket.SOCK_STREAM)
    sock.bind((US, 0))
    sock.listen()
    received: asyncio.Queue[bytes] = asyncio.Queue()
    transport = StreamTransport(
        sock, listener="stream", receive=lambda data, _: received.put_nowait(data), failed=lambda _: None,
        limits=limits(),
    )  # fmt: skip
    transport.start()
    try:
        async with connected(Node(transport)) as (_, writer):
            writer.write(BYE)
            assert await asyncio.wait_for(received.get(), PATIENCE_S) == BYE
            assert transport.counters.accept_errors == 1
    finally:
        await transport.close()


class _Exhausted(socket.socket):
    """A listening socket whose first connection finds no descriptor."""

    exhausted = True

    def accept(self) -> tuple[socket.socket, object]:
        if self.exhausted:
            self.exhausted = False
            raise OSError(24, "Too many open files")
        return super().accept()


# ------------------------------------------------------------------------------------------------- connections of ours


async def test_a_connection_is_opened_when_there_is_none_and_what_was_sent_meanwhile_follows_in_order() -> None:
    async with listening() as node, far_end() as far:
        assert [node.transport.send(data, far.flow) for data in (b"1", b"2", b"3")] == [True, True, True]
        assert not node.transport.is_connected(far.flow)
        reader, writer = await far.peer()
        assert await read(reader, 3) == b"123"
        assert writer.get_extra_info("peername")[0] == US, "peers trust our address"
        writer.write(BYE)
        assert await node.message() == (BYE, far.flow)
        assert node.transport.send(b"4", far.flow)
        assert await read(reader, 1) == b"4"
        assert far.peers.empty(), "one connection"


async def test_a_connection_that_is_refused_is_told_of_by_its_flow() -> None:
    async with listening() as node:
        with socket.socket() as nobody:
            nobody.bind((PEER, 0))
            flow = flow_to(Address(*nobody.getsockname()))
            assert node.transport.send(BYE, flow)
            assert await node.failure() == flow
        assert node.transport.counters.connections_failed == 1


async def test_a_connection_that_nobody_answers_is_given_up_in_time() -> None:
    with socket.socket() as deaf:
        deaf.bind((PEER, 0))
        deaf.listen(0)
        flow = flow_to(Address(*deaf.getsockname()))
        async with listening(bounds=limits(connect_timeout_s=0.2)) as node, contextlib.AsyncExitStack() as filling:
            # The queue of the listener: one that waits in it, and the next ones get no answer at all.
            for _ in range(2):
                filler = filling.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(deaf.getsockname())
            await asyncio.sleep(0.05)
            node.transport.send(BYE, flow)
            assert await node.failure() == flow
            assert len(node.transport) == 0


async def test_what_waits_for_a_connection_is_bounded() -> None:
    async with listening(bounds=limits(max_unsent_bytes=65_536)) as node, far_end() as far:
        assert node.transport.send(bytes(60_000), far.flow)
        assert not node.transport.send(bytes(60_000), far.flow)
        assert not node.transport.send(b"", far.flow)
        assert await node.failure() == far.flow
        reader, _ = await far.peer()
        assert await until_end(reader) == b""


async def test_after_a_connection_was_lost_the_next_message_opens_another() -> None:
    async with listening() as node, far_end() as far:
        node.transport.send(b"1", far.flow)
        reader, writer = await far.peer()
        await read(reader, 1)
        writer.close()
        assert await node.failure() == far.flow
        node.transport.send(b"2", far.flow)
        reader, _ = await far.peer()
        assert await read(reader, 1) == b"2"


async def test_failures_may_be_answered_by_sending_again() -> None:
    async with listening() as node, far_end() as far:
        node.transport.send(b"1", far.flow)
        reader, writer = await far.peer()
        await read(reader, 1)

        def send_again(flow: Flow) -> None:
            node.transport.send(b"2", flow)

        node.transport._failed = send_again
        writer.close()
        reader, _ = await far.peer()
        assert await read(reader, 1) == b"2"


async def test_of_two_connections_with_one_address_the_later_is_used_and_both_are_read() -> None:
    async with listening() as node:
        with socket.socket() as far, socket.socket() as other:
            for sock in (far, other):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                sock.setblocking(False)
            far.bind((PEER, 0))
            far.listen()
            other.bind(far.getsockname())
            flow = flow_to(Address(*far.getsockname()))
            loop = asyncio.get_running_loop()
            node.transport.send(b"1", flow)
            first, _ = await asyncio.wait_for(loop.sock_accept(far), PATIENCE_S)
            with first:
                first.setblocking(False)
                await asyncio.wait_for(loop.sock_connect(other, node.address), PATIENCE_S)
                for sock in (other, first):
                    await loop.sock_sendall(sock, BYE)
                    assert await node.message() == (BYE, flow)
                node.transport.send(b"2", flow)
                assert await asyncio.wait_for(loop.sock_recv(other, 10), PATIENCE_S) == b"2"
            await until(lambda: len(node.transport) == 1)
            assert node.failed.empty(), "the flow still has a connection"


async def test_closing_lets_what_was_sent_leave_and_tells_of_nothing() -> None:
    async with listening() as node, far_end() as far:
        node.transport.send(b"1", far.flow)
        reader, _ = await far.peer()
        node.transport.send(bytes(200_000), far.flow)
        reading = asyncio.create_task(until_end(reader))
        await node.transport.close()
        assert len(await reading) == 200_001
        assert not node.transport.send(b"2", far.flow)
        assert node.failed.empty()


# ------------------------------------------------------------------------------------------------------------------ TLS


class Authority:
    """A CA and what it signs, as files."""

    def __init__(self, folder: Path) -> None:
        self.ca = trustme.CA()
        self.folder = folder
        self.ca_path = folder / "ca.pem"
        self.ca.cert_pem.write_to_path(self.ca_path)

    def files(self, *names: str, stem: str = "node") -> tuple[Path, Path]:
        issued = self.ca.issue_cert(*names)
        chain, key = self.folder / f"{stem}.crt", self.folder / f"{stem}.key"
        chain.write_bytes(b"".join(each.bytes() for each in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(key)
        return chain, key

    def contexts(self, *, client_ca: Path | None = None, **peers: TrunkTlsSettings) -> TlsContexts:
        chain, key = self.files(US)
        settings = ListenerTlsSettings(certificate_path=chain, private_key_path=key, client_ca_path=client_ca)
        return TlsContexts("stream", settings, {Address(PEER, 1): tls for tls in peers.values()})

    def server(self, name: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.files(name, stem="far"))
        return context

    def client(self, *, certificate: str | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.ca_path))
        if certificate is not None:
            context.load_cert_chain(*self.files(certificate, stem="client"))
        return context


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


async def test_messages_go_both_ways_over_tls(authority: Authority) -> None:
    async with (
        listening(tls=authority.contexts()) as node,
        connected(node, context=authority.client(), name=US) as (reader, writer),
    ):
        writer.write(INVITE)
        data, flow = await node.message()
        assert (data, flow.transport) == (INVITE, Transport.TLS)
        assert writer.get_extra_info("ssl_object").version() == "TLSv1.3"
        assert node.transport.send(b"answer", flow)
        assert await read(reader, 6) == b"answer"


async def test_tls_older_than_1_2_is_refused(authority: Authority) -> None:
    old = authority.client()
    old.set_ciphers("DEFAULT@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="deprecated"):
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    async with listening(tls=authority.contexts()) as node:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection(*node.address, ssl=old, server_hostname=US)
        await until(lambda: node.transport.counters.connections_failed == 1)


async def test_a_handshake_that_does_not_begin_is_cut_off_and_counts_as_a_connection_until_then(
    authority: Authority,
) -> None:
    bounds = limits(message_timeout_s=0.3, max_open=1)
    async with listening(tls=authority.contexts(), bounds=bounds) as node, connected(node) as (silent, _):
        await until(lambda: len(node.transport) == 1)
        async with connected(node) as (refused, _):
            assert await until_end(refused) == b""
        assert await until_end(silent) == b""
        await until(lambda: len(node.transport) == 0)


async def test_with_a_client_ca_nobody_is_let_in_without_a_certificate_of_it(authority: Authority) -> None:
    async with listening(tls=authority.contexts(client_ca=authority.ca_path)) as node:
        async with connected(node, context=authority.client(certificate="phone"), name=US) as (_, writer):
            writer.write(BYE)
            await node.message()
        await node.failure()
        with contextlib.suppress(OSError):
            # TLS 1.3 clients learn of the refusal when they read.
            async with connected(node, context=authority.client(), name=US) as (reader, writer):
                writer.write(BYE)
                assert await until_end(reader) == b""
        await until(lambda: node.transport.counters.connections_failed == 1)
        assert node.received.empty()


@pytest.mark.parametrize(
    ("certificate", "expected", "trusted", "connects"),
    [
        ("sip.carrier.example", "sip.carrier.example", True, True),
        (PEER, None, True, True),
        ("sip.other.example", "sip.carrier.example", True, False),
        ("127.0.0.99", None, True, False),
        ("sip.carrier.example", "sip.carrier.example", False, False),
    ],
)
async def test_a_trunk_is_spoken_to_only_if_its_certificate_has_its_name_and_is_signed_by_its_ca(
    authority: Authority, certificate: str, expected: str | None, trusted: bool, connects: bool
) -> None:
    # The port differs from the trunk's own: what is demanded of a host holds for all its ports.
    demanded = TrunkTlsSettings(server_name=expected, ca_path=authority.ca_path if trusted else None)
    async with (
        listening(tls=authority.contexts(trunk=demanded)) as node,
        far_end(authority.server(certificate)) as far,
    ):
        flow = flow_to(far.address, Transport.TLS)
        assert node.transport.send(b"hello", flow)
        if connects:
            reader, _ = await far.peer()
            assert await read(reader, 5) == b"hello"
        else:
            assert await node.failure() == flow
            assert node.transport.counters.connections_failed == 1


async def test_a_new_certificate_is_shown_to_new_connections_while_old_ones_go_on(authority: Authority) -> None:
    def serial(writer: asyncio.StreamWriter) -> str:
        return str(writer.get_extra_info("ssl_object").getpeercert()["serialNumber"])

    contexts = authority.contexts()
    async with (
        listening(tls=contexts) as node,
        connected(node, context=authority.client(), name=US) as (reader, writer),
    ):
        writer.write(BYE)
        _, flow = await node.message()
        authority.files(US)
        assert contexts.changed()
        contexts.load()
        assert not contexts.changed()
        async with connected(node, context=authority.client(), name=US) as (_, newer):
            assert serial(newer) != serial(writer)
        assert node.transport.send(b"still there", flow)
        assert await read(reader, 11) == b"still there"
