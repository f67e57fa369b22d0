"""control.app and control.__main__: one control plane in this process, its data plane scripted."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from structlog.testing import capture_logs

from control import __main__, app
from control.settings.settings import Settings
from sippbx.runtime.lifecycle import Stop
from sippbx.runtime.sockets import SocketError
from tests.harness.media_server import ScriptedMediaServer

pytestmark = pytest.mark.integration

HOST = "127.0.0.1"
SIP_PORT = 22_100
METRICS_PORT = 22_101


def settings(folder: Path, **changes: Any) -> Settings:
    return Settings.model_validate(
        {
            "node_name": "test",
            "sip": {"listeners": [{"name": "udp", "bind": HOST, "port": SIP_PORT}]},
            "users": [{"name": "1001", "password": "secret"}],
            "media": {"target": f"unix://{folder}/media.sock", "addresses": [{"bind": HOST}]},
            "store": {"path": str(folder / "sippbx.sqlite")},
            "cdr": {"jsonl_path": str(folder / "cdr.jsonl")},
            "metrics": {"bind": HOST, "port": METRICS_PORT},
            **changes,
        }
    )


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ScriptedMediaServer]:
    scripted = ScriptedMediaServer(tmp_path / "media.sock")
    yield scripted
    await scripted.stop()


@asynccontextmanager
async def running(folder: Path, stop: Stop) -> AsyncIterator[app.ControlPlane]:
    async with app.ControlPlane.started(settings(folder), {}, stop) as plane:
        yield plane


async def get(path: str) -> tuple[int, str]:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://{HOST}:{METRICS_PORT}{path}", timeout=aiohttp.ClientTimeout(5)) as response,
    ):
        return response.status, await response.text()


async def until_ready() -> None:
    async with asyncio.timeout(10):
        while (await get("/readyz"))[0] != 200:
            await asyncio.sleep(0.02)


async def test_it_is_unready_with_the_reason_until_the_data_plane_is_there(
    tmp_path: Path, server: ScriptedMediaServer
) -> None:
    async with running(tmp_path, Stop()):
        status, text = await get("/readyz")
        assert status == 503
        assert "media:" in text
        await server.start()
        await until_ready()
        assert (await get("/livez"))[0] == 200


async def test_it_shows_the_promised_names_and_answers_on_its_sip_port(
    tmp_path: Path, server: ScriptedMediaServer
) -> None:
    await server.start()
    async with running(tmp_path, Stop()):
        await until_ready()
        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as phone:
            phone.bind((HOST, 0))
            phone.setblocking(False)
            phone.connect((HOST, SIP_PORT))
            phone.send(
                f"OPTIONS sip:{HOST}:{SIP_PORT} SIP/2.0\r\nVia: SIP/2.0/UDP {HOST};branch=z9hG4bKx;rport\r\n"
                f"From: <sip:me@{HOST}>;tag=1\r\nTo: <sip:{HOST}>\r\nCall-ID: x\r\nCSeq: 1 OPTIONS\r\n"
                "Max-Forwards: 70\r\nContent-Length: 0\r\n\r\n".encode()
            )
            answer = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(phone, 65_535), 5)
        assert answer.startswith(b"SIP/2.0 200 ")
        _, text = await get("/metrics")
        for name in (
            "sip_pbx_active_calls 0.0",
            "sip_pbx_total_calls 0.0",
            "sip_pbx_call_duration_seconds_count",
            "sip_pbx_errors_total{",
            'sip_pbx_sip_socket_events_total{event="received"} 1.0',
            "sip_pbx_ready 1.0",
        ):
            assert name in text


async def test_stopping_refuses_new_calls_first_and_frees_every_port(
    tmp_path: Path, server: ScriptedMediaServer
) -> None:
    await server.start()
    for _ in range(2):
        stop = Stop()
        async with running(tmp_path, stop) as plane:
            await until_ready()
            stop.request()
            assert "draining\n" in (await get("/readyz"))[1]
            assert await plane.finish() == app.EXIT_CLEAN


async def test_a_fenced_process_ends_with_its_own_exit_code(tmp_path: Path, server: ScriptedMediaServer) -> None:
    await server.start()
    stop = Stop()
    async with running(tmp_path, stop) as plane:
        await until_ready()
        plane._lose_ownership()
        await asyncio.wait_for(stop.draining.wait(), 5)
        assert await plane.finish() == app.EXIT_FENCED


@pytest.mark.parametrize(("kind", "port"), [(socket.SOCK_DGRAM, SIP_PORT), (socket.SOCK_STREAM, METRICS_PORT)])
async def test_a_port_that_is_taken_is_an_exit_code_of_its_own(
    tmp_path: Path, kind: socket.SocketKind, port: int
) -> None:
    with closing(socket.socket(socket.AF_INET, kind)) as other:
        other.bind((HOST, port))
        if kind is socket.SOCK_STREAM:
            other.listen()
        with capture_logs() as lines:
            assert await app.run(settings(tmp_path), {}) == app.EXIT_ADDRESS
    assert str(port) in lines[-1]["error"]


async def test_a_store_that_cannot_be_opened_is_an_exit_code_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = {"path": str(tmp_path / "file" / "sippbx.sqlite")}
    assert await app.run(settings(tmp_path, store=store), {}) == app.EXIT_STORE


async def test_sockets_that_were_handed_over_are_used(tmp_path: Path) -> None:
    handed = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    handed.bind((HOST, SIP_PORT))
    listeners = settings(tmp_path).sip.listeners
    with closing(handed):
        assert app._listening_sockets(listeners, {"udp": handed}) == {"udp": handed}


async def test_a_call_that_waited_in_a_socket_is_not_refused_for_want_of_a_data_plane_that_is_there(
    tmp_path: Path, server: ScriptedMediaServer
) -> None:
    await server.start()
    trunks = [{"name": "peer", "destination": f"{HOST}:22104"}]
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as peer:
        peer.bind((HOST, 22_104))
        peer.setblocking(False)
        handed = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        handed.bind((HOST, SIP_PORT))
        sdp = f"v=0\r\no=- 1 1 IN IP4 {HOST}\r\ns=-\r\nc=IN IP4 {HOST}\r\nt=0 0\r\nm=audio 9 RTP/AVP 0\r\n"
        invite = (
            f"INVITE sip:91@{HOST}:{SIP_PORT} SIP/2.0\r\nVia: SIP/2.0/UDP {HOST}:22104;branch=z9hG4bKx;rport\r\n"
            f"From: <sip:me@{HOST}>;tag=1\r\nTo: <sip:91@{HOST}>\r\nCall-ID: x\r\nCSeq: 1 INVITE\r\n"
            f"Contact: <sip:me@{HOST}:22104>\r\nMax-Forwards: 70\r\nContent-Type: application/sdp\r\n"
            f"Content-Length: {len(sdp)}\r\n\r\n{sdp}"
        )
        peer.sendto(invite.encode(), (HOST, SIP_PORT))
        routes = [{"prefix": "9", "trunk": "peer", "from": ["peer"]}]
        values = settings(tmp_path, trunks=trunks, routes=routes)
        async with app.ControlPlane.started(values, {"udp": handed}, Stop()):
            loop = asyncio.get_running_loop()
            heard = [await asyncio.wait_for(loop.sock_recv(peer, 65_535), 5) for _ in range(2)]
    assert [message.split(b" ")[:2] for message in heard] == [
        [b"SIP/2.0", b"100"],
        [b"INVITE", b"sip:91@127.0.0.1:22104"],
    ]


async def test_a_socket_that_is_not_what_the_settings_say_is_refused(tmp_path: Path) -> None:
    handed = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    handed.bind((HOST, 22_102))
    with closing(handed), pytest.raises(SocketError, match=r"22102.*22100"):
        app._listening_sockets(settings(tmp_path).sip.listeners, {"udp": handed})


async def test_a_socket_without_listener_is_closed(tmp_path: Path) -> None:
    stray = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    stray.bind((HOST, 22_103))
    for sock in app._listening_sockets(settings(tmp_path).sip.listeners, {"stray": stray}).values():
        sock.close()
    assert stray.fileno() == -1


def test_an_explicit_or_bound_address_is_told_as_it_is(tmp_path: Path) -> None:
    resolved = app.with_advertised_addresses(
        settings(tmp_path, sip={"listeners": [{"name": "udp", "bind": "0.0.0.0", "advertise": "192.0.2.7"}]})
    )
    assert resolved.sip.listeners[0].advertised_host == "192.0.2.7"
    assert resolved.media.addresses[0].advertised_host == HOST


@pytest.mark.parametrize(
    ("outgoing", "told"), [("198.51.100.4", "198.51.100.4"), (None, "127.0.0.1"), ("127.0.0.9", "127.0.0.1")]
)
def test_an_address_to_be_detected_is_the_one_that_the_host_sends_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outgoing: str | None, told: str
) -> None:
    monkeypatch.setattr(app, "_outgoing_address", lambda version: outgoing)
    resolved = app.with_advertised_addresses(
        settings(tmp_path, sip={"listeners": [{"name": "udp"}]}, media={"addresses": [{}]})
    )
    assert resolved.sip.listeners[0].advertised_host == told
    assert resolved.media.addresses[0].advertised_host == told


@pytest.mark.parametrize("version", [4, 6])
def test_detecting_gives_a_usable_address_or_none(version: int) -> None:
    address = app._outgoing_address(version)
    if address is not None:
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        with closing(socket.socket(family, socket.SOCK_DGRAM)) as sock:
            sock.bind((address, 0))


def test_refused_settings_name_their_keys_and_have_an_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "control.yaml"
    config.write_text(yaml.safe_dump({"relm": "x"}))
    assert __main__.main(["--config", str(config)]) == app.EXIT_CONFIGURATION
    assert "relm" in capsys.readouterr().err


def test_a_taken_port_is_told_before_the_supervisor_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "control.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "sip": {"listeners": [{"name": "udp", "bind": HOST, "port": SIP_PORT}]},
                "media": {"addresses": [{"bind": HOST}]},
            }
        )
    )
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as other:
        other.bind((HOST, SIP_PORT))
        assert __main__.main(["--config", str(config), "--supervise"]) == app.EXIT_ADDRESS
    assert str(SIP_PORT) in capsys.readouterr().err


def test_supervising_hands_over_the_named_sockets_and_the_same_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "control.yaml"
    config.write_text(yaml.safe_dump({"sip": {"listeners": [{"name": "udp", "bind": HOST, "port": SIP_PORT}]}}))
    handed: list[tuple[str, list[tuple[str, int]], list[str], list[str]]] = []

    class _ExecError(Exception):
        pass

    def exec_supervised(
        name: str, sockets: list[tuple[str, socket.socket]], command: list[str], *, options: list[str]
    ) -> None:
        handed.append((name, [(each, sock.getsockname()[1]) for each, sock in sockets], command[1:], options))
        for _, sock in sockets:
            sock.close()
        raise _ExecError

    monkeypatch.setattr(__main__, "exec_supervised", exec_supervised)
    with pytest.raises(_ExecError):
        __main__.main(["--config", str(config), "--supervise"])
    command = ["-m", "control", "--config", str(config)]
    assert handed == [("control", [("udp", SIP_PORT)], command, ["--final", str(app.EXIT_FENCED)])]
    assert "LISTEN_FDS" not in os.environ
