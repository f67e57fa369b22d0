"""Runs SIPp scenarios as actors of a test: started, cued, watched by their message trace, and finished with a deadline.

A scenario that waits with `<recv request="CUE"/>` goes on when `Actor.cue` sends it a datagram of that name with its
Call-ID: so a test decides when somebody hangs up, and nothing depends on pauses. Cues are no part of the trace.
"""

import asyncio
import re
import socket
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from sippbx.softphone.message import SipMessage, request
from sippbx.softphone.sdp import RemoteLine, read

SCENARIOS = Path(__file__).parents[1] / "integration" / "sipp"
_TRACE_ENTRY = re.compile(r"-{30,}[^\n]*\n[^\n]* message (sent|received)[^\n]*\n\n(.*?)(?=\n-{30,}|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class TracedMessage:
    """A message as it was on the wire at an actor."""

    sent: bool
    message: SipMessage

    @property
    def text(self) -> str:
        """The whole message."""
        return self.message.encode().decode("utf-8", "surrogateescape")


class Actor:
    """A SIPp process that plays one scenario at one address."""

    def __init__(
        self, scenario: str, local: tuple[str, int], folder: Path, process: asyncio.subprocess.Process
    ) -> None:
        self.scenario = scenario
        self.local = local
        self._folder = folder
        self._process = process
        self._cues = 0

    @classmethod
    async def start(
        cls,
        scenario: str,
        folder: Path,
        *,
        local: tuple[str, int],
        remote: tuple[str, int],
        user: str,
        password: str = "",
        service: str = "",
        calls: int = 1,
        calls_per_second: int = 10,
        keys: Mapping[str, str | int] | None = None,
        tcp: bool = False,
    ) -> Self:
        """Start a scenario and wait until its SIP port is bound, or over TCP until it listens or is connected.

        Over TCP a caller cannot be cued, as it takes no connections.

        Raises:
            AssertionError: SIPp ended at once or did not bind within five seconds.
        """
        own = Path(tempfile.mkdtemp(prefix=f"{scenario}-", dir=folder))
        values = {"user": user, "expires": 60, "audio_port": 9, "video_port": 9} | dict(keys or {})
        with (own / "stderr").open("wb") as errors:
            process = await asyncio.create_subprocess_exec(
                "sipp",
                *(
                    f"{remote[0]}:{remote[1]}",
                    "-sf",
                    str(SCENARIOS / f"{scenario}.xml"),
                    "-i",
                    local[0],
                    "-p",
                    str(local[1]),
                ),
                *("-t", "t1" if tcp else "u1"),
                *("-s", service or user, "-au", user, "-ap", password, "-m", str(calls), "-r", str(calls_per_second)),
                *("-nostdin", "-timeout", "60s", "-timeout_error", "-recv_timeout", "20000"),
                *(
                    "-trace_err",
                    "-error_file",
                    str(own / "errors"),
                    "-trace_msg",
                    "-message_file",
                    str(own / "messages"),
                ),
                *(word for key, value in values.items() for word in ("-key", key, str(value))),
                cwd=own,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=errors,
            )
        actor = cls(scenario, local, own, process)
        await actor._until(
            lambda: _is_bound(local, "tcp" if tcp else "udp") or process.returncode is not None, 5, "its port is bound"
        )
        return actor

    async def finish(self, deadline_s: float = 20) -> None:
        """Wait until the scenario is over, and over well.

        Raises:
            AssertionError: with what SIPp complained about and the messages it saw.
        """
        try:
            async with asyncio.timeout(deadline_s):
                code = await self._process.wait()
        except TimeoutError:
            await self.stop()
            raise AssertionError(f"{self.scenario} was not over after {deadline_s} s\n{self.story()}") from None
        assert code == 0, f"{self.scenario} ended with exit code {code}\n{self.story()}"

    async def stop(self) -> None:
        """Kill the process, if it still runs."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    def trace(self) -> list[TracedMessage]:
        """What this actor sent and received so far."""
        path = self._folder / "messages"
        text = path.read_bytes().decode("utf-8", "surrogateescape").replace("\r\n", "\n") if path.exists() else ""
        text = text.replace("UDP message lost (recv).", "\n")
        entries = []
        for direction, body in _TRACE_ENTRY.findall(text):
            if "\n\n" in body and not body.startswith("CUE "):
                data = body.replace("\n", "\r\n").encode("utf-8", "surrogateescape")
                entries.append(TracedMessage(direction == "sent", SipMessage.parse(data)))
        return entries

    def sent(self, method: str, status: int = 0) -> list[SipMessage]:
        """The requests, or the responses of a status, that this actor sent."""
        return self._select(True, method, status)

    def received(self, method: str, status: int = 0) -> list[SipMessage]:
        """The requests, or the responses of a status, that this actor received."""
        return self._select(False, method, status)

    @property
    def final_status(self) -> int:
        """The last final status that this actor received to an INVITE; 0 if there is none."""
        finals = [entry.message.status for entry in self.trace() if not entry.sent and entry.message.method == "INVITE"]
        return next((status for status in reversed(finals) if status >= 200), 0)

    async def until_received(
        self, method: str, status: int = 0, *, count: int = 1, deadline_s: float = 10
    ) -> SipMessage:
        """Wait for such a message and give the last of them.

        Raises:
            AssertionError: it did not come in time.
        """
        what = f"{count} x {method} {status or ''} received"
        await self._until(lambda: len(self.received(method, status)) >= count, deadline_s, what)
        return self.received(method, status)[-1]

    async def until_sent(self, method: str, status: int = 0, *, deadline_s: float = 10) -> SipMessage:
        """Wait until this actor has sent such a message.

        Raises:
            AssertionError: it has not, in time.
        """
        await self._until(lambda: bool(self.sent(method, status)), deadline_s, f"{method} {status or ''} sent")
        return self.sent(method, status)[-1]

    async def media(self, method: str, status: int = 0, *, count: int = 1) -> list[RemoteLine]:
        """Where the description in the awaited message wants RTP.

        Raises:
            AssertionError: it did not come in time.
        """
        return read((await self.until_received(method, status, count=count)).body)

    def cue(self) -> None:
        """Let the scenario go on, in each of its calls.

        The cue carries From and To of what the call received last, because scenarios copy them from there. No two cues
        are alike, because SIPp takes the second for a retransmission.
        """
        last = {entry.message.require("Call-ID"): entry.message for entry in self.trace() if not entry.sent}
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for message in last.values():
                kept = [(name, message.require(name)) for name in ("From", "To", "Call-ID")]
                self._cues += 1
                via = ("Via", f"SIP/2.0/UDP 127.0.0.1:9;branch=z9hG4bKcue{self._cues}")
                sock.sendto(
                    request("CUE", "sip:actor", [via, *kept, ("CSeq", f"{self._cues} CUE")]).encode(), self.local
                )

    def story(self) -> str:
        """What SIPp complained about and the messages it saw, for a failing test."""
        complaints = [
            path.read_text(errors="replace") for name in ("stderr", "errors") if (path := self._folder / name).exists()
        ]
        arrows = [f"{'->' if entry.sent else '<-'} {entry.text}" for entry in self.trace()]
        return "\n".join([f"--- {self.scenario} at {self.local[0]}:{self.local[1]}", *complaints, *arrows])

    def _select(self, sent: bool, method: str, status: int) -> list[SipMessage]:
        wanted = (sent, method, status)
        return [
            entry.message
            for entry in self.trace()
            if (entry.sent, entry.message.method, entry.message.status) == wanted
        ]

    async def _until(self, condition: Callable[[], bool], deadline_s: float, what: str) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + deadline_s
        while not condition():
            ended = self._process.returncode is not None
            if loop.time() > end or (ended and not condition()):
                why = f"ended with {self._process.returncode}" if ended else f"not within {deadline_s} s"
                raise AssertionError(f"{self.scenario}: {what}: {why}\n{self.story()}")
            await asyncio.sleep(0.02)


def _is_bound(local: tuple[str, int], protocol: str) -> bool:
    address = socket.inet_aton(local[0])[::-1].hex().upper()
    return f"{address}:{local[1]:04X}" in Path(f"/proc/net/{protocol}").read_text()
