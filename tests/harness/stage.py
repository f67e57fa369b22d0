"""A stage for calls: the pair, SIPp actors at the parties' addresses, their RTP, and what the PBX wrote down of it."""

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sippbx.softphone.media import FORMATS, RtpEndpoint
from sippbx.softphone.message import SipMessage, host_port_of, parameter, uri_of
from tests.harness.pair import HOST, NETWORK, TRUNK_HOST, TRUNK_PORT, USERS, Pair
from tests.harness.sipp import Actor


@dataclass(frozen=True, slots=True)
class Party:
    """Somebody who calls or is called: a user with a phone, or the trunk."""

    user: str
    host: str
    port: int
    audio_port: int
    password: str = ""

    @property
    def video_port(self) -> int:
        """The RTP port of its video."""
        return self.audio_port + 2

    @property
    def streams(self) -> tuple[int, int]:
        """The numbers of the RTP streams that it sends, audio and video."""
        return self.audio_port, self.video_port


ALICE = Party("1001", f"{NETWORK}.21", 25210, 14210, USERS["1001"])
BOB = Party("1002", f"{NETWORK}.22", 25220, 14220, USERS["1002"])
CAROL = Party("1003", f"{NETWORK}.23", 25230, 14230, USERS["1003"])
TRUNK = Party("+15550001111", TRUNK_HOST, TRUNK_PORT, 14950)
KINDS = ("audio", "video")


class Stage:
    """What one test needs; as a context manager it stops every actor that is still there at the end."""

    def __init__(self, pair: Pair, folder: Path) -> None:
        self.pair = pair
        self.folder = folder
        self.actors: list[Actor] = []
        self._endpoints: list[RtpEndpoint] = []
        self._old_cdrs = len(pair.cdrs())

    async def __aenter__(self) -> Self:
        """Nothing is started yet."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop actors, close RTP and print the whole story, which pytest shows where a test failed."""
        for endpoint in self._endpoints:
            await endpoint.close()
        for actor in self.actors:
            await actor.stop()
        print("\n".join([*(actor.story() for actor in self.actors), self.pair.logs()]))

    async def actor(
        self, scenario: str, party: Party, *, dials: str = "", password: str = "", expires: int = 60, tcp: bool = False
    ) -> Actor:
        """Start a scenario at a party's address, over UDP or TCP."""
        actor = await Actor.start(
            scenario,
            self.folder,
            local=(party.host, party.port),
            remote=self.pair.sip,
            user=party.user,
            password=password or party.password,
            service=dials,
            keys={"audio_port": party.audio_port, "video_port": party.video_port, "expires": expires},
            tcp=tcp,
        )
        self.actors.append(actor)
        return actor

    async def register(self, *parties: Party) -> None:
        """Register users from the addresses where they will be called."""
        for party in parties:
            await (await self.actor("register", party)).finish()

    async def call(
        self, caller_scenario: str, caller: Party, callee_scenario: str, callee: Party, dials: str
    ) -> "Scene":
        """Let `callee` wait for a call and `caller` place it."""
        called = await self.actor(callee_scenario, callee)
        calling = await self.actor(caller_scenario, caller, dials=dials)
        return Scene(self, calling, called, caller, callee)

    def endpoints(self, party: Party, kinds: Sequence[str]) -> list[RtpEndpoint]:
        """The party's RTP, on the ports that its descriptions name."""
        ports = (party.audio_port, party.video_port)
        made = [
            RtpEndpoint(party.host, port, media=FORMATS[kind], stream=stream)
            for kind, port, stream in zip(KINDS, ports, party.streams, strict=True)
            if kind in kinds
        ]
        self._endpoints += made
        return made

    async def cdr(self, deadline_s: float = 10) -> dict[str, Any]:
        """The one call detail record that this test's call left, once it is there.

        Raises:
            AssertionError: there is none in time, or more than one.
        """
        await self.until(lambda: len(self.pair.cdrs()) > self._old_cdrs, deadline_s, "a CDR is written")
        records = self.pair.cdrs()[self._old_cdrs :]
        self._old_cdrs += len(records)
        assert len(records) == 1, f"more than one CDR: {records}"
        return records[0]

    async def until(self, condition: Callable[[], bool], deadline_s: float, what: str) -> None:
        """Wait for something that no actor shows.

        Raises:
            AssertionError: it did not happen in time.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + deadline_s
        while not condition():
            assert loop.time() < end, f"not within {deadline_s} s: {what}"
            await asyncio.sleep(0.02)


@dataclass(frozen=True, slots=True)
class Scene:
    """One call: the two actors and who they are."""

    stage: Stage
    caller: Actor
    callee: Actor
    caller_party: Party
    callee_party: Party

    async def talk(self, *kinds: str, frames: int = 25, answer_status: int = 200) -> None:
        """Send frames both ways at once and check that exactly these arrive, octet by octet, from where SDP said.

        Raises:
            AssertionError: something was lost, damaged, foreign, or came from elsewhere.
        """
        kinds = kinds or ("audio",)
        caller_lines = self.stage.endpoints(self.caller_party, kinds)
        callee_lines = self.stage.endpoints(self.callee_party, kinds)
        answered = await self.caller.media("INVITE", answer_status)
        offered = await self.callee.media("INVITE")
        for lines, remotes in ((caller_lines, answered), (callee_lines, offered)):
            assert [remote.kind for remote in remotes] == list(kinds)
            for line, remote in zip(lines, remotes, strict=True):
                assert remote.host == HOST
                line.connect(remote.host, remote.port, remote.rtcp_port)
        lines = [*caller_lines, *callee_lines]
        async with asyncio.timeout(20):
            await asyncio.gather(*(line.send_frames(frames) for line in lines))
        for line in lines:
            line.send_sender_report()
        for line, opposite in zip(lines, [*callee_lines, *caller_lines], strict=True):
            await line.wait_for(frames, 5, rtcp_packets=1)
            report = line.report
            assert (report.received, report.duplicates, report.damaged) == (frames, 0, 0)
            assert report.missing_of(frames) == []
            assert report.streams == {opposite.stream}
            assert line.remote is not None
            assert report.sources == {line.remote, line.remote_rtcp}
            await line.close()

    async def hang_up(self) -> None:
        """Let the caller hang up and both actors finish."""
        await self.caller.until_received("INVITE", 200)
        self.caller.cue()
        await self.finish()

    async def finish(self) -> None:
        """Let both actors finish."""
        await self.caller.finish()
        await self.callee.finish()

    def check_legs_are_separate(self) -> None:
        """Check that nothing which identifies or locates one leg was seen on the other.

        Raises:
            AssertionError: naming what leaked.
        """
        for actor, other in ((self.caller, self.callee), (self.callee, self.caller)):
            marks = _marks(actor)
            assert len(marks) > 5
            for entry in other.trace():
                if not entry.sent:
                    leaked = [mark for mark in marks if re.search(rf"(?<![\w.]){re.escape(mark)}(?![\w.])", entry.text)]
                    assert not leaked, f"{leaked} of {actor.scenario} reached {other.scenario}:\n{entry.text}"


def termination(cdr: dict[str, Any]) -> tuple[str, str, int]:
    """Result, reason and SIP status of a call detail record."""
    end = cdr["termination"]
    return end["result"], end["reason"], end["sip_status"]


def packets(cdr: dict[str, Any]) -> dict[tuple[str, str], tuple[int, int, int]]:
    """RTP packets received, RTP and RTCP packets relayed, RTP packets lost, by leg and kind."""
    return {
        (stream["leg"], stream["kind"]): (stream["packets"], stream["relayed_packets"], stream["lost"])
        for stream in cdr["streams"]
    }


def _marks(actor: Actor) -> set[str]:
    """Identifiers and locations of a leg: Call-ID, tags, branches; hosts, ports and SDP of the far end."""
    marks: set[str] = set()
    for entry in actor.trace():
        message = entry.message
        marks |= {message.require("Call-ID"), message.tag("From"), message.tag("To")}
        marks |= {parameter(via, "branch") or "" for via in message.get_all("Via")}
        if entry.sent:
            marks |= _far_end_marks(message)
    return marks - {"", HOST}


def _far_end_marks(message: SipMessage) -> set[str]:
    marks = set()
    for contact in message.get_all("Contact"):
        host, port = host_port_of(uri_of(contact))
        marks |= {host, str(port)}
    for line in message.body.splitlines():
        if line.startswith("o="):
            marks |= {line, line.split()[1]}
        elif line.startswith("m="):
            marks.add(line.split()[1])
    return marks
