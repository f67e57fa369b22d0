"""A baresip phone without sound card or screen: a generated configuration, a WAV file for a microphone, a recording.

Driven over its ctrl_tcp module: JSON in netstrings, commands to it and events from it.
"""

import asyncio
import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

MODULE_FOLDERS = (Path("/usr/lib/baresip/modules"), Path("/usr/local/lib/baresip/modules"))
HOST = "127.0.0.1"
START_TIMEOUT_S = 10.0
COMMAND_TIMEOUT_S = 5.0
STOP_TIMEOUT_S = 5.0
MAX_EVENTS = 1000


class BaresipError(Exception):
    """The phone did not do what was asked in time, or said that it could not."""


def baresip_available() -> bool:
    """Whether the program and its modules are installed."""
    return shutil.which("baresip") is not None and any(folder.is_dir() for folder in MODULE_FOLDERS)


class BaresipPhone:
    """One phone: an async context manager that runs the program and ends it.

    `folder` takes its configuration, its log (`baresip.log`) and its recordings. `account` is a SIP URI with parameters
    of the account, such as `<sip:1001@127.0.0.1:5060>;auth_pass=secret;regint=60`. The phone lives on 127.0.0.1 and
    takes `sip_port` and the one above it (which it opens for TLS). `microphone` is a WAV file, 8000 Hz, mono, 16 bits.
    """

    def __init__(
        self,
        folder: Path,
        *,
        account: str,
        sip_port: int,
        control_port: int,
        rtp_ports: tuple[int, int],
        microphone: Path,
    ) -> None:
        self.folder = folder
        self._control = (HOST, control_port)
        self._settings = _configuration(folder, sip_port, control_port, rtp_ports, microphone)
        self._account = account
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._messages: asyncio.Queue[Mapping[str, Any]] = asyncio.Queue(MAX_EVENTS)
        self._answers: asyncio.Queue[Mapping[str, Any]] = asyncio.Queue(MAX_EVENTS)

    async def __aenter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config").write_text(self._settings)
        (self.folder / "accounts").write_text(self._account + "\n")
        (self.folder / "contacts").write_text("")
        with (self.folder / "baresip.log").open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                "baresip", "-4", "-v", "-f", str(self.folder), stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                reader = await self._connect()
        except BaseException:
            await self._stop()
            raise
        self._reading = asyncio.create_task(self._read(reader))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    async def command(self, name: str, parameters: str = "") -> str:
        """Give a command of baresip's menu (`dial`, `hangup`, `reginfo`, ...); returns the text it answers.

        Raises:
            BaresipError: it refused, or did not answer in time.
        """
        assert self._writer is not None
        body = json.dumps({"command": name, "params": parameters, "token": name}).encode()
        self._writer.write(b"%d:%s," % (len(body), body))
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_S):
                await self._writer.drain()
                while (answer := await self._answers.get()).get("token") != name:
                    pass
        except TimeoutError:
            raise BaresipError(f"no answer to {name}\n{self.log()}") from None
        if not answer.get("ok"):
            raise BaresipError(f"{name} refused: {answer.get('data')}\n{self.log()}")
        return str(answer.get("data", ""))

    async def wait_until_registered(self, *, timeout_s: float = 10.0) -> None:
        """Wait until the registrar has accepted the account, which may be before anybody could hear of it by event.

        Raises:
            BaresipError: it did not in time.
        """
        answer = ""
        try:
            async with asyncio.timeout(timeout_s):
                while "OK" not in (answer := await self.command("reginfo")):
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise BaresipError(f"not registered within {timeout_s:g} s\n{answer}\n{self.log()}") from None

    async def wait_for(self, event: str, *, timeout_s: float = 10.0) -> Mapping[str, Any]:
        """Wait for an event (`CALL_RINGING`, `CALL_ESTABLISHED`, `CALL_CLOSED`, ...), forgetting those before it.

        Raises:
            BaresipError: it did not come in time.
        """
        seen: list[str] = []
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    message = await self._messages.get()
                    if message.get("type") == event:
                        return message
                    seen.append(str(message.get("type")))
        except TimeoutError:
            raise BaresipError(f"no {event} within {timeout_s:g} s, but {seen}\n{self.log()}") from None

    def recording(self) -> Path:
        """The WAV file with what the phone heard in its last call.

        Raises:
            BaresipError: there is none.
        """
        recordings = sorted(self.folder.glob("dump-*-dec.wav"))
        if not recordings:
            raise BaresipError(f"nothing was recorded\n{self.log()}")
        return recordings[-1]

    def log(self) -> str:
        """The end of what the program printed."""
        return (self.folder / "baresip.log").read_text(errors="replace")[-4000:]

    async def _connect(self) -> asyncio.StreamReader:
        assert self._process is not None
        while self._process.returncode is None:
            try:
                reader, self._writer = await asyncio.open_connection(*self._control)
            except ConnectionRefusedError:
                await asyncio.sleep(0.05)
            else:
                return reader
        raise BaresipError(f"baresip ended with {self._process.returncode}\n{self.log()}")

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Sort netstrings into answers and events until the phone closes the connection."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionResetError):
            while True:
                length = int((await reader.readuntil(b":"))[:-1])
                message = json.loads((await reader.readexactly(length + 1))[:-1])
                (self._answers if message.get("response") else self._messages).put_nowait(message)

    async def _stop(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(ConnectionError):
                await self._writer.wait_closed()
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()


def _configuration(folder: Path, sip_port: int, control_port: int, rtp_ports: tuple[int, int], microphone: Path) -> str:
    """baresip's `config` file: every setting that touches network or sound is pinned."""
    modules = next(folder for folder in MODULE_FOLDERS if folder.is_dir())
    return f"""\
poll_method epoll
net_interface {HOST}
sip_listen {HOST}:{sip_port}
call_local_timeout 30
call_max_calls 4
audio_path /nonexistent
audio_player aubridge,heard
audio_source aufile,{microphone}
audio_alert aubridge,alert
ausrc_srate 8000
auplay_srate 8000
ausrc_channels 1
auplay_channels 1
audio_channels 1
audio_txmode poll
audio_level no
ausrc_format s16
auplay_format s16
auenc_format s16
audec_format s16
rtp_tos 184
rtp_ports {rtp_ports[0]}-{rtp_ports[1]}
rtcp_mux no
jitter_buffer_delay 2-8
rtp_stats no
statmode_default off
ctrl_tcp_listen {HOST}:{control_port}
snd_path {folder}
module_path {modules}
module g711.so
module aufile.so
module aubridge.so
module sndfile.so
module_tmp account.so
module_app ctrl_tcp.so
module_app menu.so
"""
