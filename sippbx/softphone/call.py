"""A call of the phone: dialog, offer and answer, media (RFC 3261 sections 12 to 15, RFC 3262, RFC 3264).

Left out: late offers, session timers, transfer, more than one early dialog.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Self

from sippbx.softphone import sdp
from sippbx.softphone.errors import DeadlineError, MalformedError, RefusedError, SoftphoneError
from sippbx.softphone.media import FORMATS, RtpEndpoint
from sippbx.softphone.message import SipMessage, host_port_of, parameter, request, response, uri_of
from sippbx.softphone.phone import ALLOW, Phone, new_token

_LOG = logging.getLogger(__name__)
_SDP_TYPE = ("Content-Type", "application/sdp")


class CallState(Enum):
    """How far a call has come; the order is the order of the members."""

    CALLING = auto()
    RINGING = auto()
    ANSWERED = auto()
    ENDED = auto()


class Call:
    """One call, on either side. `place` and `take` make it.

    `status` and `reason` are the last of the INVITE, sent or received; `ended_by` is "local" or "remote" after its end;
    `early_media` tells whether a description came with a provisional response.
    """

    def __init__(self, phone: Phone, call_id: str, lines: Sequence[RtpEndpoint], media_host: str) -> None:
        self.phone = phone
        self.call_id = call_id
        self.lines = tuple(lines)
        self.state = CallState.CALLING
        self.status = 0
        self.reason = ""
        self.ended_by = ""
        self.early_media = False
        self.remote_lines: list[sdp.RemoteLine] = []
        self._media_host = media_host
        self._local = self._remote = self._target = ""
        self._cseq = 0
        self._session = secrets.randbits(31)
        self._version = 1
        self._invite: SipMessage | None = None
        self._tag = new_token()
        self._acknowledged = False
        self._ack: SipMessage | None = None
        self._error: SoftphoneError | None = None
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        phone.serve(call_id, self)

    @classmethod
    def place(
        cls,
        phone: Phone,
        number: str,
        *,
        kinds: Sequence[str] = ("audio",),
        media_host: str = "",
        streams: Sequence[int] = (1, 2),
        extra: Sequence[tuple[str, str]] = (),
    ) -> Self:
        """Call a number at the PBX: sends the INVITE in the background and answers one challenge.

        `streams` number the RTP of the lines; `extra` are header lines of the INVITE.

        Raises:
            OSError: no RTP port can be had.
        """
        host = media_host or phone.address[0]
        call = cls(phone, new_token(), _open_lines(host, kinds, streams), host)
        call._local = f"<{phone.account.address_of_record}>;tag={call._tag}"
        call._target = f"sip:{number}@{phone.account.host}"
        call._remote = f"<{call._target}>"
        call._task = asyncio.get_running_loop().create_task(call._run_invite(list(extra)))
        return call

    @classmethod
    async def take(
        cls, phone: Phone, *, deadline_s: float, media_host: str = "", streams: Sequence[int] = (11, 12)
    ) -> Self:
        """Wait for a call; the caller rings, answers or rejects it next.

        Raises:
            DeadlineError: nobody called in time.
            MalformedError: the INVITE has no usable offer.
            OSError: no RTP port can be had.
        """
        invite = await phone.next_invite(deadline_s)
        host = media_host or phone.address[0]
        offered = sdp.read(invite.body)
        call = cls(phone, invite.require("Call-ID"), _open_lines(host, [line.kind for line in offered], streams), host)
        call._invite = invite
        call._local = f"{invite.require('To')};tag={call._tag}"
        call._remote = invite.require("From")
        call._target = uri_of(invite.require("Contact"))
        call._connect(offered)
        return call

    @property
    def remote_uri(self) -> str:
        """The far end's URI, from To or From."""
        return uri_of(self._remote)

    def ring(self, status: int = 180, reason: str = "Ringing", *, with_media: bool = False) -> None:
        """Answer the INVITE provisionally, with a description where `with_media` (early media, RFC 3960 section 3)."""
        self._answer_invite(status, reason, self._describe() if with_media else "")
        self._move(CallState.RINGING)

    def reject(self, status: int, reason: str) -> None:
        """Refuse the call."""
        self._answer_invite(status, reason)
        self._end("local")

    async def answer(self) -> None:
        """Accept the call and wait for the ACK; the 200 is sent again until it comes (RFC 3261 section 13.3.1.4).

        Raises:
            DeadlineError: no ACK within 64*T1; the call has been ended with BYE.
        """
        loop, timers = asyncio.get_running_loop(), self.phone.timers
        end, interval = loop.time() + timers.give_up, timers.t1
        self._answer_invite(200, "OK", self._describe())
        self._move(CallState.ANSWERED)
        while not self._acknowledged and self.state is CallState.ANSWERED:
            if loop.time() >= end:
                await self.hang_up()
                raise DeadlineError(f"no ACK within {timers.give_up} s")
            if not await self._happens(lambda: self._acknowledged or self.state is CallState.ENDED, interval):
                self._answer_invite(200, "OK", self._describe())
                interval = min(2 * interval, timers.t2)

    async def wait_for(self, state: CallState, deadline_s: float) -> None:
        """Wait until the call has come so far.

        Raises:
            RefusedError: it was refused, unless its end is awaited.
            DeadlineError: it has not come so far in time.
            SoftphoneError: it broke.
        """

        def over() -> bool:
            return self.state.value >= state.value or self._error is not None

        if not await self._happens(over, deadline_s):
            raise DeadlineError(f"call is {self.state}, not {state}, after {deadline_s} s; last status {self.status}")
        if self._error is not None:
            raise self._error
        if self.state is CallState.ENDED is not state:
            raise RefusedError("INVITE", self.status, self.reason)

    async def hang_up(self) -> SipMessage:
        """End an answered call and give the response to the BYE.

        Raises:
            DeadlineError: nobody answered the BYE.
        """
        self._end("local")
        return await self.send_request("BYE")

    async def cancel(self, *, deadline_s: float = 5.0) -> None:
        """Give up a call that rings and wait for its final response (RFC 3261 section 9.1).

        Raises:
            DeadlineError: no provisional or no final response in time.
            SoftphoneError: this phone did not place the call.
        """
        if self._task is None or self._invite is None:
            raise SoftphoneError("only the caller can cancel")
        await self.wait_for(CallState.RINGING, deadline_s)
        invite = self._invite
        headers = [("Via", invite.require("Via")), ("Max-Forwards", "70")]
        headers += [(name, invite.require(name)) for name in ("From", "To", "Call-ID")]
        message = request("CANCEL", invite.uri, [*headers, ("CSeq", f"{invite.cseq} CANCEL")])
        await self.phone.exchange(message, self.phone.account.proxy, deadline_s)
        await self.wait_for(CallState.ENDED, deadline_s)

    async def reinvite(self, direction: str, *, deadline_s: float = 5.0) -> SipMessage:
        """Offer another direction (hold: "sendonly" or "inactive") and give the final response, acknowledged.

        Raises:
            DeadlineError: no final response in time.
        """
        self._version += 1
        self._cseq += 1
        message = self._request("INVITE", self._cseq, body=self._describe(direction))
        answer = await self.phone.exchange(message, self._next_hop(), deadline_s)
        if answer.status < 300:
            self._acknowledge(message)
            self._connect(sdp.read(answer.body))
        else:
            self.phone.transmit(_failure_ack(message, answer), self._next_hop())
        return answer

    async def send_request(self, method: str, *, body: str = "", extra: Sequence[tuple[str, str]] = ()) -> SipMessage:
        """Send a request within the dialog and give its final response.

        Raises:
            DeadlineError: no final response within 64*T1.
        """
        self._cseq += 1
        message = self._request(method, self._cseq, body=body, extra=extra)
        return await self.phone.exchange(message, self._next_hop())

    async def close(self) -> None:
        """Give back what the call holds. It does not hang up."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        for line in self.lines:
            await line.close()
        self.phone.forget(self.call_id)

    def handle(self, message: SipMessage) -> None:
        """Take a message of the dialog from the phone."""
        match message.method if message.is_request else "":
            case "":
                if message.method == "INVITE" and 200 <= message.status < 300 and self._ack is not None:
                    self.phone.transmit(self._ack, self._next_hop())
            case "ACK":
                self._acknowledged = True
                self._changed.set()
            case "BYE":
                self._respond(message, 200, "OK")
                self._end("remote")
            case "CANCEL":
                self._respond(message, 200, "OK")
                if self.state in {CallState.CALLING, CallState.RINGING}:
                    self._answer_invite(487, "Request Terminated")
                    self._end("remote")
            case "INVITE" | "UPDATE":
                self._answer_offer(message)
            case "PRACK" | "INFO" | "OPTIONS":
                self._respond(message, 200, "OK")
            case _:
                self._respond(message, 405, "Method Not Allowed", ("Allow", ALLOW))

    async def _run_invite(self, extra: list[tuple[str, str]]) -> None:
        try:
            answer = await self._send_invite(extra)
            if answer.status in {401, 407} and self._invite is not None:
                answer = await self._send_invite([*extra, self.phone.authorize(answer, self._invite)])
            self.status, self.reason = answer.status, answer.reason
            if answer.status >= 300:
                self._end("remote")
        except SoftphoneError as error:
            self._error = error
            self._changed.set()

    async def _send_invite(self, extra: list[tuple[str, str]]) -> SipMessage:
        self._cseq += 1
        invite = self._request("INVITE", self._cseq, body=self._describe(), extra=[*extra, ("Supported", "100rel")])
        self._invite = invite
        proxy, timers = self.phone.account.proxy, self.phone.timers
        interval, waited, answered = timers.t1, 0.0, False
        with self.phone.transaction(invite) as responses:
            self.phone.transmit(invite, proxy)
            while True:
                try:
                    async with asyncio.timeout(None if answered else interval):
                        answer = await responses.get()
                except TimeoutError:
                    waited, interval = waited + interval, 2 * interval
                    if waited >= timers.give_up:
                        raise DeadlineError(f"no answer to INVITE within {timers.give_up} s") from None
                    self.phone.transmit(invite, proxy)
                    continue
                answered = True
                if answer.status >= 300:
                    self.phone.transmit(_failure_ack(invite, answer), proxy)
                    return answer
                if answer.status >= 200:
                    self._establish(answer)
                    self._acknowledge(invite)
                    self._move(CallState.ANSWERED)
                    return answer
                if answer.status > 100:
                    await self._proceed(answer)

    async def _proceed(self, answer: SipMessage) -> None:
        self.status = answer.status
        self._establish(answer)
        self.early_media = self.early_media or bool(answer.body)
        self._move(CallState.RINGING)
        if "100rel" in (answer.get("Require") or ""):
            await self.send_request("PRACK", extra=[("RAck", f"{answer.require('RSeq')} {answer.require('CSeq')}")])

    def _establish(self, answer: SipMessage) -> None:
        self._remote = answer.require("To")
        contact = answer.get("Contact")
        if contact is not None:
            self._target = uri_of(contact)
        if answer.body:
            self._connect(sdp.read(answer.body))

    def _acknowledge(self, invite: SipMessage) -> None:
        self._ack = self._request("ACK", invite.cseq)
        self.phone.transmit(self._ack, self._next_hop())

    def _answer_offer(self, message: SipMessage) -> None:
        contact = message.get("Contact")
        if contact is not None:
            self._target = uri_of(contact)
        body = ""
        if message.body:
            offered = sdp.read(message.body)
            self._connect(offered)
            self._version += 1
            body = self._describe(sdp.OPPOSITE[offered[0].direction] if offered else "inactive")
        self._respond(message, 200, "OK", body=body)

    def _answer_invite(self, status: int, reason: str, body: str = "") -> None:
        if self._invite is None:
            raise SoftphoneError("there is no INVITE to answer")
        self.status, self.reason = status, reason
        self._respond(self._invite, status, reason, body=body)

    def _respond(self, message: SipMessage, status: int, reason: str, *extra: tuple[str, str], body: str = "") -> None:
        headers = [*extra, ("Contact", f"<{self.phone.contact}>")] + ([_SDP_TYPE] if body else [])
        self.phone.respond(response(message, status, reason, to_tag=self._tag, extra=headers, body=body))

    def _request(self, method: str, cseq: int, *, body: str = "", extra: Sequence[tuple[str, str]] = ()) -> SipMessage:
        headers = [
            self.phone.via(),
            ("Max-Forwards", "70"),
            ("From", self._local),
            ("To", self._remote),
            ("Call-ID", self.call_id),
            ("CSeq", f"{cseq} {method}"),
            ("Contact", f"<{self.phone.contact}>"),
            ("Allow", ALLOW),
            *extra,
        ]
        return request(method, self._target, [*headers, _SDP_TYPE] if body else headers, body)

    def _next_hop(self) -> tuple[str, int]:
        return host_port_of(self._target) if self._remote_tag else self.phone.account.proxy

    @property
    def _remote_tag(self) -> str:
        return parameter(self._remote, "tag") or ""

    def _describe(self, direction: str = "sendrecv") -> str:
        identity = self._session, self._version
        return sdp.describe(self._media_host, self.lines, identity=identity, direction=direction)

    def _connect(self, remote_lines: list[sdp.RemoteLine]) -> None:
        if len(remote_lines) != len(self.lines):
            raise MalformedError(f"{len(remote_lines)} lines described where {len(self.lines)} were offered")
        self.remote_lines = remote_lines
        for line, remote in zip(self.lines, remote_lines, strict=True):
            if remote.port:
                line.connect(remote.host, remote.port, remote.rtcp_port)

    def _move(self, state: CallState) -> None:
        if state.value > self.state.value:
            self.state = state
            self._changed.set()

    def _end(self, ended_by: str) -> None:
        if self.state is not CallState.ENDED:
            self.ended_by = ended_by
            self._move(CallState.ENDED)

    async def _happens(self, condition: Callable[[], bool], deadline_s: float) -> bool:
        try:
            async with asyncio.timeout(deadline_s):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True


def _open_lines(host: str, kinds: Sequence[str], streams: Sequence[int]) -> list[RtpEndpoint]:
    return [
        RtpEndpoint(host, media=FORMATS[kind], stream=stream)
        for kind, stream in zip(kinds, streams, strict=False)
        if kind in FORMATS
    ]


def _failure_ack(invite: SipMessage, answer: SipMessage) -> SipMessage:
    """The ACK to a final response of 300 or above, with the branch of the INVITE (RFC 3261 section 17.1.1.3)."""
    headers = [("Via", invite.require("Via")), ("Max-Forwards", "70"), ("From", invite.require("From"))]
    headers += [("To", answer.require("To")), ("Call-ID", invite.require("Call-ID")), ("CSeq", f"{invite.cseq} ACK")]
    return request("ACK", invite.uri, headers)
