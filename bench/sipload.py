"""SIP callers and callees for load: one UDP socket each, hundreds of calls a second, every call's outcome known.

`Caller` places calls, answers digest challenges (RFC 7616), retransmits as RFC 3261 section 17.1 asks, cancels, hangs
up. `Callee` registers, and does with each call what its Request-URI's user part was assigned: answer, refuse, ring. The
PBX hides each side's identifiers from the other, so the two ends of a call recognise it by the name of the SDP session
(`s=`), which passes.

Left out, for it is load and not a phone: everything on TCP, PRACK, re-INVITE, checks of what the PBX writes.
"""

import asyncio
import itertools
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Self

from bench.sipmessage import Account, HostPort, Message, audio_sdp, authorization, branch_of, host_of

T1_S = 0.5
T2_S = 4.0
DEADLINE_S = 32.0
RECEIVE_BUFFER_BYTES = 1 << 22


class Behaviour(Enum):
    """What a callee does with a call."""

    ANSWER = 200
    BUSY = 486
    DECLINE = 603
    RING = 180


class Endpoint(asyncio.DatagramProtocol):
    """A UDP socket with transactions: what callers and callees share."""

    def __init__(self, local: HostPort, pbx: HostPort) -> None:
        self.local, self.pbx = local, pbx
        self.retransmissions = 0
        self._transport: asyncio.DatagramTransport | None = None
        self._waiting: dict[tuple[str, str], asyncio.Queue[tuple[Message, float]]] = {}
        self._branches = itertools.count(1)
        self._salt = secrets.token_hex(4)

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(lambda: self, local_addr=self.local)
        self._transport = transport
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._transport is not None
        self._transport.close()
        await asyncio.sleep(0)

    def send(self, data: bytes) -> None:
        """Send to the PBX."""
        assert self._transport is not None
        self._transport.sendto(data, self.pbx)

    def datagram_received(self, data: bytes, addr: HostPort) -> None:  # noqa: ARG002 - asyncio's signature
        """Hand a response to who waits for it, a request to `request_received`."""
        received_at = time.monotonic()
        if len(data) < 20:
            return
        message = Message(data)
        if not message.status:
            self.request_received(message, received_at)
        elif waiting := self._waiting.get((branch_of(message["via"]), message.method)):
            waiting.put_nowait((message, received_at))
        else:
            self.response_received(message)

    def request_received(self, message: Message, received_at: float) -> None:
        """A request from the PBX, which came at this monotonic time; this one expects none and leaves it unanswered."""

    def response_received(self, message: Message) -> None:
        """A response that no transaction waits for, such as a 200 once more."""

    async def register(self, account: Account, *, expires_s: int = 3600) -> None:
        """Register this socket as the account's contact.

        Raises:
            RuntimeError: the PBX refused.
        """
        call_id, credentials, status = secrets.token_hex(8), "", 0
        uri = f"sip:{host_of(self.pbx)}"
        aor = f"<sip:{account.user}@{host_of(self.pbx)}>"
        for number in (1, 2):
            text = (
                f"From: {aor};tag={call_id}\r\nTo: {aor}\r\n"
                f"Call-ID: {call_id}\r\nCSeq: {number} REGISTER\r\nContact: {self.contact(account.user)}\r\n"
                f"Expires: {expires_s}\r\n{credentials}"
            )
            answer, _ = await self.exchange("REGISTER", uri, text)
            status = answer.status
            if status not in {401, 407}:
                break
            credentials = authorization(answer, "REGISTER", uri, account)
        if status != 200:
            raise RuntimeError(f"{account.user} could not register: {status}")

    def contact(self, user: str) -> str:
        """This endpoint's Contact."""
        return f"<sip:{user}@{host_of(self.local)}:{self.local[1]}>"

    def request(self, method: str, uri: str, branch: str, headers: str, body: str = "") -> bytes:
        """A request with our Via; `headers` are whole lines."""
        via = f"SIP/2.0/UDP {host_of(self.local)}:{self.local[1]};rport;branch={branch}"
        return (
            f"{method} {uri} SIP/2.0\r\nVia: {via}\r\n"
            f"Max-Forwards: 70\r\n{headers}Content-Length: {len(body)}\r\n\r\n{body}"
        ).encode()

    def branch(self) -> str:
        """A new branch (RFC 3261 section 8.1.1.7)."""
        return f"z9hG4bK{self._salt}{next(self._branches)}"

    async def exchange(
        self, method: str, uri: str, headers: str, *, branch: str = "", deadline_s: float = DEADLINE_S
    ) -> tuple[Message, float]:
        """A non-INVITE client transaction: the final response and when it came.

        Raises:
            TimeoutError: none came.
        """
        branch = branch or self.branch()
        data, waiting = self.request(method, uri, branch, headers), self._wait(branch, method)
        interval_s, until = T1_S, time.monotonic() + deadline_s
        self.send(data)
        try:
            while True:
                try:
                    async with asyncio.timeout(min(interval_s, until - time.monotonic())):
                        message, received_at = await waiting.get()
                except TimeoutError:
                    if time.monotonic() >= until:
                        raise
                    self.retransmissions += 1
                    self.send(data)
                    interval_s = min(2 * interval_s, T2_S)
                else:
                    if message.status >= 200:
                        return message, received_at
        finally:
            del self._waiting[branch, method]

    def _wait(self, branch: str, method: str) -> asyncio.Queue[tuple[Message, float]]:
        return self._waiting.setdefault((branch, method), asyncio.Queue())


@dataclass(slots=True)
class PlacedCall:
    """A call as its caller sees it.

    Times are monotonic seconds; `invited_at` is that of the INVITE that was not challenged. What follows
    `ended_by_peer` is the state of the dialog.
    """

    name: str
    call_id: str
    status: int = 0
    invited_at: float = 0.0
    ringing_at: float | None = None
    final_at: float | None = None
    remote_rtp: HostPort | None = None
    ended_by_peer: bool = False
    uri: str = ""
    dialog: str = ""
    cseq: int = 0
    ack: bytes = b""


class Caller(Endpoint):
    """Places calls, many at a time. Without an account it is a trunk, trusted by its address."""

    def __init__(self, local: HostPort, pbx: HostPort, account: Account | None = None) -> None:
        super().__init__(local, pbx)
        self._account = account
        self._calls: dict[str, PlacedCall] = {}

    async def call(
        self,
        number: str,
        name: str,
        rtp: HostPort,
        *,
        cancel_when_ringing: bool = False,
        deadline_s: float = DEADLINE_S,
    ) -> PlacedCall:
        """Call `number` and wait for the final response; the call is then up when its `status` is 200.

        `status` is 0 when none came within `deadline_s`; `name` is what the callee recognises the call by.
        """
        call = PlacedCall(name, f"{self._salt}-{name}")
        user = self._account.user if self._account else "trunk"
        uri = f"sip:{number}@{host_of(self.pbx)}"
        dialog = f"From: <sip:{user}@{host_of(self.pbx)}>;tag={call.call_id}\r\nCall-ID: {call.call_id}\r\n"
        self._calls[call.call_id] = call
        credentials = ""
        for number_in_sequence in (1, 2):
            call.cseq = number_in_sequence
            headers = f"{dialog}To: <{uri}>\r\nCSeq: {call.cseq} INVITE\r\n"
            extra = f"Contact: {self.contact(user)}\r\n{credentials}Content-Type: application/sdp\r\n"
            branch = self.branch()
            invite = self.request("INVITE", uri, branch, headers + extra, audio_sdp(name, rtp))
            cancel = (uri, headers.replace(" INVITE\r\n", " CANCEL\r\n")) if cancel_when_ringing else None
            final = await self._invite(call, branch, invite, deadline_s=deadline_s, cancel=cancel)
            if final is None:
                break
            if final.status >= 300:
                to = f"To: {final['to']}\r\n"
                self.send(self.request("ACK", uri, branch, f"{dialog}{to}CSeq: {call.cseq} ACK\r\n"))
            if final.status not in {401, 407} or self._account is None:
                self._settle(call, final, dialog)
                break
            credentials = authorization(final, "INVITE", uri, self._account)
        if call.status != 200:
            del self._calls[call.call_id]
        return call

    async def hang_up(self, call: PlacedCall) -> int:
        """End a call that is up; returns the status of the answer to BYE, 0 when none came."""
        call.cseq += 1
        self._calls.pop(call.call_id, None)
        try:
            answer, _ = await self.exchange("BYE", call.uri, f"{call.dialog}CSeq: {call.cseq} BYE\r\n")
        except TimeoutError:
            return 0
        return answer.status

    def request_received(self, message: Message, received_at: float) -> None:  # noqa: ARG002 - Endpoint's signature
        """Answer 200; a BYE is noted as the peer's wish."""
        if message.method != "ACK":
            self.send(message.response(200, "OK", tag=self._salt))
        call = self._calls.get(message["call-id"])
        if call is not None and message.method == "BYE":
            call.ended_by_peer = True

    def response_received(self, message: Message) -> None:
        """Acknowledge a 200 that came again."""
        call = self._calls.get(message["call-id"])
        if call is not None and message.method == "INVITE" and 200 <= message.status < 300 and call.ack:
            self.send(call.ack)

    async def _invite(
        self, call: PlacedCall, branch: str, invite: bytes, *, deadline_s: float, cancel: tuple[str, str] | None
    ) -> Message | None:
        """An INVITE client transaction; `cancel` is the URI and headers of the CANCEL that follows the first 18x."""
        waiting = self._wait(branch, "INVITE")
        interval_s, until = T1_S, time.monotonic() + deadline_s
        call.invited_at = time.monotonic()
        self.send(invite)
        try:
            while True:
                try:
                    async with asyncio.timeout(min(interval_s, until - time.monotonic())):
                        message, received_at = await waiting.get()
                except TimeoutError:
                    if time.monotonic() >= until:
                        return None
                    self.retransmissions += 1
                    self.send(invite)
                    interval_s *= 2
                    continue
                interval_s = deadline_s
                if message.status >= 200:
                    call.final_at = received_at
                    return message
                if message.status > 100 and call.ringing_at is None:
                    call.ringing_at = received_at
                    if cancel is not None:
                        await self.exchange("CANCEL", *cancel, branch=branch)
        finally:
            del self._waiting[branch, "INVITE"]

    def _settle(self, call: PlacedCall, final: Message, dialog: str) -> None:
        call.status = final.status
        if final.status != 200:
            return
        call.remote_rtp = final.rtp
        call.uri = final["contact"].partition("<")[2].partition(">")[0] or final["contact"]
        call.dialog = f"{dialog}To: {final['to']}\r\n"
        call.ack = self.request("ACK", call.uri, self.branch(), f"{call.dialog}CSeq: {call.cseq} ACK\r\n")
        self.send(call.ack)


@dataclass(slots=True)
class ReceivedCall:
    """A call as its callee sees it."""

    name: str
    user: str
    invited_at: float
    rtp: HostPort
    remote_rtp: HostPort
    invite: Message
    acknowledged: bool = False
    ended: bool = False
    final: bytes = b""


class Callee(Endpoint):
    """Takes calls: `behaviours` says by the Request-URI's user part what to do, `rtp_of` gives a call its address."""

    def __init__(
        self,
        local: HostPort,
        pbx: HostPort,
        behaviours: Mapping[str, Behaviour],
        rtp_of: Callable[[str], HostPort],
    ) -> None:
        super().__init__(local, pbx)
        self._behaviours, self._rtp_of = behaviours, rtp_of
        self._by_call_id: dict[str, ReceivedCall] = {}
        self.calls: dict[str, ReceivedCall] = {}

    def request_received(self, message: Message, received_at: float) -> None:
        """Play the callee's part."""
        call = self._by_call_id.get(message["call-id"])
        match message.method:
            case "INVITE" if call is None:
                self._ring(message, received_at)
            case "INVITE" if call is not None and call.final:
                self.send(call.final)
            case "ACK" if call is not None:
                call.acknowledged = True
            case "CANCEL" if call is not None:
                self.send(message.response(200, "OK", tag=self._salt))
                self._finish(call, call.invite.response(487, "Request Terminated", tag=self._salt))
            case "BYE" if call is not None:
                call.ended = True
                self.send(message.response(200, "OK"))
            case "ACK" | "INVITE":
                pass
            case "OPTIONS":
                self.send(message.response(200, "OK", tag=self._salt))
            case _:
                self.send(message.response(481, "Call/Transaction Does Not Exist", tag=self._salt))

    def _ring(self, invite: Message, received_at: float) -> None:
        user = invite.start.split(" ")[1].removeprefix("sip:").partition("@")[0]
        name = invite.name
        call = ReceivedCall(name, user, received_at, self._rtp_of(name), invite.rtp, invite)
        self._by_call_id[invite["call-id"]] = self.calls[name] = call
        behaviour = self._behaviours[user]
        contact = f"Contact: {self.contact(user)}\r\n"
        self.send(invite.response(180, "Ringing", tag=self._salt, extra=contact))
        if behaviour is Behaviour.ANSWER:
            extra, body = f"{contact}Content-Type: application/sdp\r\n", audio_sdp(name, call.rtp)
            self._finish(call, invite.response(200, "OK", tag=self._salt, extra=extra, body=body))
        elif behaviour is not Behaviour.RING:
            self._finish(call, invite.response(behaviour.value, behaviour.name.title(), tag=self._salt))

    def _finish(self, call: ReceivedCall, final: bytes) -> None:
        """Send the final response, again and again until it is acknowledged (RFC 3261 sections 13.3.1.4, 17.2.1)."""
        call.final = final
        self.send(final)
        asyncio.get_running_loop().call_later(T1_S, self._repeat, call, T1_S, time.monotonic() + DEADLINE_S)

    def _repeat(self, call: ReceivedCall, interval_s: float, until: float) -> None:
        if call.acknowledged or call.ended or time.monotonic() > until or self._transport is None:
            return
        if self._transport.is_closing():
            return
        self.retransmissions += 1
        self.send(call.final)
        interval_s = min(2 * interval_s, T2_S)
        asyncio.get_running_loop().call_later(interval_s, self._repeat, call, interval_s, until)
