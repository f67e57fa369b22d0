"""Listeners of the control plane in this process: what they are bound to, and how large requests reach a trunk."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from control import app
from control.settings.settings import Settings
from sippbx.runtime.lifecycle import Stop
from sippbx.runtime.sockets import SocketError
from tests.harness.media_server import ScriptedMediaServer
from tests.harness.messages import request_bytes, request_of, response_of, sdp

pytestmark = pytest.mark.integration

HOST, PEER, CARRIER = "127.0.0.94", "127.0.0.95", "127.0.0.93"
PORT, PEER_PORT, CARRIER_PORT, METRICS_PORT, API_PORT, TLS_PORT = 27_400, 27_401, 27_402, 27_403, 27_404, 27_406
PATIENCE_S = 5.0
LAST_LINE = b"a=fmtp:101 1099-1099\r\n"


def settings(folder: Path, *listeners: dict[str, Any]) -> Settings:
    both = (
        {"name": "udp", "bind": HOST, "port": PORT},
        {"name": "tcp", "transport": "tcp", "bind": HOST, "port": PORT},
        {"name": "tcp6", "transport": "tcp", "bind": "::1", "port": PORT},
    )
    values = Settings.model_validate(
        {
            "node_name": "test",
            "sip": {"listeners": listeners or both},
            "media": {"target": f"unix://{folder}/media.sock", "addresses": [{"bind": HOST}, {"bind": "::1"}]},
            "store": {"path": str(folder / "sippbx.sqlite")},
            "cdr": {"jsonl_path": None},
            "metrics": {"bind": HOST, "port": METRICS_PORT},
            "api": {"http": {"bind": HOST, "port": API_PORT}, "grpc": {"bind": HOST, "port": API_PORT + 1}},
            "trunks": [
                {"name": "peer", "destination": f"{PEER}:{PEER_PORT}"},
                {"name": "carrier", "destination": f"{CARRIER}:{CARRIER_PORT}"},
            ],
            "routes": [{"prefix": "9", "trunk": "carrier", "from": ["peer"]}],
        }
    )
    return app.with_advertised_addresses(values)


@pytest.fixture
async def data_plane(tmp_path: Path) -> AsyncIterator[ScriptedMediaServer]:
    scripted = ScriptedMediaServer(tmp_path / "media.sock")
    await scripted.start()
    yield scripted
    await scripted.stop()


def datagrams(host: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((host, port))
    sock.setblocking(False)
    return sock


async def heard(sock: socket.socket) -> bytes:
    return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 65_535), PATIENCE_S)


@contextlib.asynccontextmanager
async def connection_at(host: str, port: int) -> AsyncIterator[Awaitable[bytes]]:
    """What comes first over a connection to this address, up to the last line of the offer."""
    first: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first.set_result(await asyncio.wait_for(reader.readuntil(LAST_LINE), PATIENCE_S))
        await reader.read()
        writer.close()

    server = await asyncio.start_server(take, host, port)
    async with server:
        yield asyncio.wait_for(first, PATIENCE_S)


@pytest.mark.parametrize("host", [HOST, "::1"])
async def test_options_are_answered_over_tcp_in_either_family(tmp_path: Path, host: str) -> None:
    async with app.ControlPlane.started(settings(tmp_path), {}, Stop()):
        reader, writer = await asyncio.open_connection(host, PORT)
        writer.write(request_bytes("OPTIONS", via="SIP/2.0/TCP phone.invalid;rport;branch=z9hG4bK-1"))
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE_S)
        response = response_of(head)
        assert response.status == 200
        assert response.via.received == writer.get_extra_info("sockname")[0]
        writer.close()
        await writer.wait_closed()


@pytest.mark.rfc("3261", "18.1.1")
@pytest.mark.parametrize("takes_connections", [True, False])
async def test_a_large_invite_reaches_a_trunk_by_tcp_or_else_by_udp(
    tmp_path: Path, data_plane: ScriptedMediaServer, takes_connections: bool
) -> None:
    lines = "".join(f"a=fmtp:101 {number}-{number}\r\n" for number in range(1000, 1100)).encode()
    assert lines.endswith(LAST_LINE)
    invite = request_bytes(
        uri=f"sip:91@{HOST}:{PORT}",
        via=f"SIP/2.0/UDP {PEER}:{PEER_PORT};branch=z9hG4bKx",
        contact=f"<sip:me@{PEER}:{PEER_PORT}>",
        body=sdp(PEER) + lines,
    )
    async with contextlib.AsyncExitStack() as running:
        peer = running.enter_context(closing(datagrams(PEER, PEER_PORT)))
        carrier = running.enter_context(closing(datagrams(CARRIER, CARRIER_PORT)))
        if takes_connections:
            heard_first = await running.enter_async_context(connection_at(CARRIER, CARRIER_PORT))
        else:
            heard_first = heard(carrier)
        plane = await running.enter_async_context(app.ControlPlane.started(settings(tmp_path), {}, Stop()))
        async with asyncio.timeout(PATIENCE_S):
            while plane.unready():
                await asyncio.sleep(0.01)
        peer.sendto(invite, (HOST, PORT))
        data = await heard_first
    transport = "TCP" if takes_connections else "UDP"
    assert data.startswith(b"INVITE sip:91@")
    assert f"Via: SIP/2.0/{transport} {HOST}:{PORT};".encode() in data
    assert b"transport=tcp" not in data, "the dialog is UDP's"
    assert len(request_of(data).body) > 1300


async def test_a_certificate_that_cannot_be_used_has_an_exit_code(tmp_path: Path) -> None:
    files = {"certificate_path": str(tmp_path / "none.crt"), "private_key_path": str(tmp_path / "none.key")}
    values = settings(tmp_path, {"name": "udp", "bind": HOST, "port": PORT},
                      {"name": "tls", "transport": "tls", "bind": HOST, "port": TLS_PORT, "tls": files})  # fmt: skip
    assert await app.run(values, {}) == app.EXIT_ADDRESS


async def test_a_socket_for_datagrams_is_refused_where_one_for_connections_is_meant(tmp_path: Path) -> None:
    with closing(datagrams(HOST, PORT)) as handed, pytest.raises(SocketError, match=r"'tcp' is udp://.*say tcp://"):
        app._listening_sockets(settings(tmp_path).sip.listeners[1:2], {"tcp": handed})
