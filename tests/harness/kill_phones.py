"""Far ends for calls that must outlive the PBX's processes: patient, and exact about what they were asked.

A `Phone` places and takes calls on one UDP socket, as a trunk does. It repeats itself as RFC 3261 section 17 asks, so
that it bears with a PBX that is away for seconds, and notes every INVITE, UPDATE and BYE that it gets inside a dialog,
each once whatever its retransmissions. What it is to delay waits for a gate, which a test opens.
"""

import asyncio
import itertools
import secrets
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from enum import Enum

from bench.sipload import T1_S, T2_S, Endpoint
from bench.sipmessage import HostPort, Message, audio_sdp, host_of

PATIENCE_S = 60.0
"""How long a request may go without its final response; far more than a PBX's absence."""
RING_S = 0.05
MAX_TRIES, TRY_AGAIN_S = 5, 1.0
_SDP = "Content-Type: application/sdp\r\n"


class Delay(Enum):
    """What of a call waits for the gate."""

    NOTHING = "nothing"
    ANSWER = "answer"
    ACK = "ack"
    CHANGE = "change"
    BYE = "bye"


@dataclass(slots=True)
class Side:
    """A call as one far end sees it.

    `status` is the final response to its INVITE, 0 before one came or went; `asked` counts the re-INVITEs of this end
    that were accepted, `changes` and `byes` are the CSeq numbers of the INVITEs or UPDATEs, and the BYEs, that came in
    the dialog.
    """

    name: str
    sip_call_id: str
    delay: Delay
    rtp: HostPort
    remote_rtp: HostPort | None = None
    status: int = 0
    rang: bool = False
    cancelled: bool = False
    hung_up: bool = False
    asked: int = 0
    version: int = 1
    changes: set[int] = field(default_factory=set)
    byes: set[int] = field(default_factory=set)
    invite: Message | None = None
    uri: str = ""
    dialog: str = ""
    cseq: int = 0
    acks: dict[int, bytes] = field(default_factory=dict)
    responses: dict[tuple[str, int], bytes] = field(default_factory=dict)
    acknowledged: set[int] = field(default_factory=set)


class Phone(Endpoint):
    """Calls and is called. `gate` lets go what was delayed; `delay_of` and `rtp_of` are asked by the call's name."""

    def __init__(
        self,
        local: HostPort,
        pbx: HostPort,
        gate: asyncio.Event,
        *,
        delay_of: Callable[[str], Delay],
        rtp_of: Callable[[str], HostPort],
    ) -> None:
        super().__init__(local, pbx)
        self._gate, self._delay_of, self._rtp_of = gate, delay_of, rtp_of
        self._by_call_id: dict[str, Side] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._tags = itertools.count(1)
        self._token = secrets.token_hex(4)
        self.sides: dict[str, Side] = {}
        self.failures: list[BaseException] = []

    async def __aexit__(self, *error: object) -> None:
        """Stop what still waits, and close the socket."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await super().__aexit__(*error)

    # ---- asking ----------------------------------------------------------------------------------------------------

    async def call(self, number: str, name: str) -> Side:
        """Place a call and wait for its final response; its `status` stays 0 when none comes."""
        tag = f"{self._token}{next(self._tags)}"
        side = Side(name, f"{tag}@{self.local[0]}", self._delay_of(name), self._rtp_of(name))
        self.sides[name] = self._by_call_id[side.sip_call_id] = side
        uri = f"sip:{number}@{host_of(self.pbx)}"
        dialog = f"From: <sip:{self._token}@{host_of(self.local)}>;tag={tag}\r\nCall-ID: {side.sip_call_id}\r\n"
        side.cseq = 1
        final = await self._invite(side, uri, f"{dialog}To: <{uri}>\r\n")
        if final is None:
            return side
        side.status = final.status
        if final.status == 200:
            side.uri = final["contact"].partition("<")[2].partition(">")[0]
            side.dialog = f"{dialog}To: {final['to']}\r\n"
            side.remote_rtp = final.rtp
            if side.delay is Delay.ACK:
                await self._gate.wait()
            self._acknowledge(side, side.cseq)
        return side

    async def change(self, side: Side) -> int:
        """Offer the session again in a re-INVITE; returns the final status, 0 when none comes.

        Who is told that something else is under way, as may be after a kill before an ACK has come again, tries again
        (RFC 3261 sections 14.1 and 14.2).
        """
        final: Message | None = None
        for _ in range(MAX_TRIES):
            side.cseq += 1
            side.version += 1
            final = await self._invite(side, side.uri, side.dialog)
            if final is None or final.status not in {491, 500}:
                break
            await asyncio.sleep(TRY_AGAIN_S)
        if final is None:
            return 0
        if final.status == 200:
            side.asked += 1
            self._acknowledge(side, side.cseq)
        return final.status

    async def hang_up(self, side: Side) -> int:
        """Send BYE; returns the final status, 0 when none comes."""
        side.hung_up = True
        return await self.ask(side, "BYE")

    async def ask(self, side: Side, method: str) -> int:
        """Send a request without a body in the dialog; returns the final status, 0 when none comes."""
        side.cseq += 1
        headers = f"{side.dialog}CSeq: {side.cseq} {method}\r\nContact: {self.contact(self._token)}\r\n"
        try:
            answer, _ = await self.exchange(method, side.uri, headers, deadline_s=PATIENCE_S)
        except TimeoutError:
            return 0
        return answer.status

    async def _invite(self, side: Side, uri: str, dialog: str) -> Message | None:
        """An INVITE client transaction; refusals are acknowledged within it (RFC 3261 section 17.1.1.3)."""
        number, branch = side.cseq, self.branch()
        headers = f"{dialog}CSeq: {number} INVITE\r\nContact: {self.contact(self._token)}\r\n{_SDP}"
        invite = self.request("INVITE", uri, branch, headers, _description(side))
        waiting = self._wait(branch, "INVITE")
        interval_s, until = T1_S, time.monotonic() + PATIENCE_S
        self.send(invite)
        try:
            while (left_s := until - time.monotonic()) > 0:
                try:
                    async with asyncio.timeout(min(interval_s, left_s)):
                        message, _ = await waiting.get()
                except TimeoutError:
                    if interval_s < PATIENCE_S:
                        self.send(invite)
                        interval_s = min(2 * interval_s, T2_S)
                    continue
                interval_s = PATIENCE_S
                side.rang = side.rang or message.status == 180
                if message.status >= 300:
                    ack = f"{dialog.partition('To:')[0]}To: {message['to']}\r\nCSeq: {number} ACK\r\n"
                    side.acks[number] = self.request("ACK", uri, branch, ack)
                    self.send(side.acks[number])
                if message.status >= 200:
                    return message
        finally:
            del self._waiting[branch, "INVITE"]
        return None

    def _acknowledge(self, side: Side, number: int) -> None:
        side.acks[number] = self.request("ACK", side.uri, self.branch(), f"{side.dialog}CSeq: {number} ACK\r\n")
        self.send(side.acks[number])

    # ---- being asked -----------------------------------------------------------------------------------------------

    def request_received(self, message: Message, received_at: float) -> None:
        """Do what was asked, or repeat what was said to it before."""
        side, number = self._by_call_id.get(message["call-id"]), int(message["cseq"].split()[0])
        if side is None:
            if message.method == "INVITE":
                self._rung(message, number)
            elif message.method != "ACK":
                self.send(message.response(481, "Call/Transaction Does Not Exist", tag=self._token))
            return
        if (said := side.responses.get((message.method, number))) is not None:
            if said:
                self.send(said)
            return
        match message.method:
            case "INVITE" | "UPDATE":
                side.changes.add(number)
                self._say(side, message, number, b"")
                self._spawn(self._answer_change(side, message, number))
            case "ACK":
                side.acknowledged.add(number)
            case "CANCEL":
                side.cancelled = True
                self._say(side, message, number, message.response(200, "OK", tag=self._token))
                self._cancelled(side, number)
            case "BYE":
                side.byes.add(number)
                self._say(side, message, number, b"")
                self._spawn(self._answer_bye(side, message, number))
            case _:
                self._say(side, message, number, message.response(200, "OK"))

    def response_received(self, message: Message) -> None:
        """Acknowledge a final response that came again."""
        side = self._by_call_id.get(message["call-id"])
        if side is not None and message.method == "INVITE" and message.status >= 200:
            ack = side.acks.get(int(message["cseq"].split()[0]))
            if ack is not None:
                self.send(ack)

    def _rung(self, invite: Message, number: int) -> None:
        name = invite.name
        side = Side(name, invite["call-id"], self._delay_of(name), self._rtp_of(name), invite.rtp, invite=invite)
        self.sides[name] = self._by_call_id[side.sip_call_id] = side
        side.uri = invite["contact"].partition("<")[2].partition(">")[0]
        parties = f"From: {invite['to']};tag={self._token}\r\nTo: {invite['from']}\r\n"
        side.dialog = f"{parties}Call-ID: {invite['call-id']}\r\n"
        side.rang = True
        contact = f"Contact: {self.contact(self._token)}\r\n"
        self._say(side, invite, number, invite.response(180, "Ringing", tag=self._token, extra=contact))
        self._spawn(self._accept(side, invite, number))

    def _cancelled(self, side: Side, number: int) -> None:
        """Refuse the INVITE that is cancelled, until that is acknowledged."""
        if not side.status and side.invite is not None:
            side.status = 487
            self._spawn(self._insist(side, number, side.invite.response(487, "Request Terminated", tag=self._token)))

    async def _accept(self, side: Side, invite: Message, number: int) -> None:
        await asyncio.sleep(RING_S)
        if side.delay is Delay.ANSWER:
            await self._gate.wait()
        if not side.status:
            side.status = 200
            await self._insist(side, number, self._accepted(side, invite))

    async def _answer_change(self, side: Side, message: Message, number: int) -> None:
        if message.method == "INVITE" and side.delay is Delay.CHANGE and not self._gate.is_set():
            self._say(side, message, number, message.response(100, "Trying"))
            await self._gate.wait()
        side.version += 1
        if message.method == "INVITE":
            await self._insist(side, number, self._accepted(side, message))
        else:
            self._say(side, message, number, self._accepted(side, message))

    async def _answer_bye(self, side: Side, message: Message, number: int) -> None:
        if side.delay is Delay.BYE:
            await self._gate.wait()
        self._say(side, message, number, message.response(200, "OK"))

    def _accepted(self, side: Side, message: Message) -> bytes:
        extra = f"Contact: {self.contact(self._token)}\r\n{_SDP}"
        return message.response(200, "OK", tag=self._token, extra=extra, body=_description(side))

    async def _insist(self, side: Side, number: int, final: bytes) -> None:
        """Send a final response to an INVITE until its ACK comes (RFC 3261 sections 13.3.1.4 and 17.2.1)."""
        side.responses["INVITE", number] = final
        interval_s, until = T1_S, time.monotonic() + PATIENCE_S
        while number not in side.acknowledged and time.monotonic() < until:
            self.send(final)
            await asyncio.sleep(interval_s)
            interval_s = min(2 * interval_s, T2_S)

    def _say(self, side: Side, message: Message, number: int, response: bytes) -> None:
        """Send a response, and remember it for retransmissions of its request; b"" stands for silence."""
        side.responses[message.method, number] = response
        if response:
            self.send(response)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failures.append(error)


def _description(side: Side) -> str:
    """What this end offers or answers: always the same audio, its version growing (RFC 3264 section 8)."""
    return audio_sdp(side.name, side.rtp).replace("o=- 1 1 ", f"o=- 1 {side.version} ")
