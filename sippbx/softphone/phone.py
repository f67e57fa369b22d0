"""The phone: one UDP socket, an account, registration, and the transactions of its calls.

RFC 3261 sections 8, 10, 17 and 22.

Left out: TCP, more than one account, requests to hosts that are names, forking.
"""

import asyncio
import contextlib
import logging
import secrets
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from sippbx.softphone.digest import authorization
from sippbx.softphone.errors import DeadlineError, MalformedError, RefusedError, SoftphoneError
from sippbx.softphone.message import SipMessage, host_port_of, parameter, request, response, uri_host

_LOG = logging.getLogger(__name__)
_MAX_REMEMBERED = 512
_MAX_QUEUED = 64
ALLOW = "INVITE, ACK, CANCEL, BYE, OPTIONS, PRACK, UPDATE"


@dataclass(frozen=True, slots=True)
class Account:
    """Who the phone is and where it registers: `proxy` is host and port of the PBX, `domain` the host of its URI."""

    user: str
    password: str
    proxy: tuple[str, int]
    domain: str = ""
    algorithms: tuple[str, ...] = ("SHA-256", "MD5")

    @property
    def host(self) -> str:
        """The host part of the address-of-record."""
        return self.domain or uri_host(self.proxy[0])

    @property
    def address_of_record(self) -> str:
        """The URI under which others call this phone."""
        return f"sip:{self.user}@{self.host}"


@dataclass(frozen=True, slots=True)
class Timers:
    """SIP's base timers in seconds (RFC 3261 table 4)."""

    t1: float = 0.5
    t2: float = 4.0

    @property
    def give_up(self) -> float:
        """Timers B, F and H: how long a transaction waits for the far end."""
        return 64 * self.t1


class MessageHandler(Protocol):
    """What serves one dialog."""

    def handle(self, message: SipMessage) -> None:
        """Take a request of the dialog, or a response that no transaction awaits."""


class Phone(asyncio.DatagramProtocol):
    """A SIP phone on one UDP socket; use it as an asynchronous context manager."""

    def __init__(
        self, account: Account, *, bind: tuple[str, int] = ("127.0.0.1", 0), timers: Timers | None = None
    ) -> None:
        self.account = account
        self.timers = timers or Timers()
        self.received: deque[SipMessage] = deque(maxlen=_MAX_REMEMBERED)
        self._bind = bind
        self._transport: asyncio.DatagramTransport | None = None
        self._transactions: dict[tuple[str, str], asyncio.Queue[SipMessage]] = {}
        self._answered: OrderedDict[tuple[str, str], tuple[SipMessage, tuple[str, int]] | None] = OrderedDict()
        self._dialogs: dict[str, MessageHandler] = {}
        self._incoming: asyncio.Queue[SipMessage] = asyncio.Queue(_MAX_QUEUED)
        self._register_call_id = new_token()
        self._register_cseq = 0

    async def __aenter__(self) -> Self:
        """Open the socket.

        Raises:
            OSError: the address or port cannot be bound.
        """
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_datagram_endpoint(lambda: self, local_addr=self._bind)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the socket. Calls are not ended: hang up first."""
        if self._transport is not None:
            self._transport.close()
        await asyncio.sleep(0)

    @property
    def address(self) -> tuple[str, int]:
        """The local SIP address.

        Raises:
            SoftphoneError: the phone is not open.
        """
        if self._transport is None:
            raise SoftphoneError("the phone is not open")
        name = self._transport.get_extra_info("sockname")
        return str(name[0]), int(name[1])

    @property
    def contact(self) -> str:
        """The URI under which this phone can be reached directly."""
        host, port = self.address
        return f"sip:{self.account.user}@{uri_host(host)}:{port}"

    async def register(self, *, expires_s: int = 300, deadline_s: float = 5.0) -> int:
        """Register or refresh the binding; answers one challenge. The result is the granted lifetime in seconds.

        Raises:
            RefusedError: with the final status.
            DeadlineError: no final answer in time.
        """
        answer = await self._register(expires_s, deadline_s)
        for contact in ",".join(answer.get_all("Contact")).split(","):
            if self.contact in contact:
                return int(parameter(contact, "expires") or answer.get("Expires") or 0)
        return 0

    async def unregister(self, *, deadline_s: float = 5.0) -> None:
        """Remove the binding (RFC 3261 section 10.2.2).

        Raises:
            RefusedError: with the final status.
            DeadlineError: no final answer in time.
        """
        await self._register(0, deadline_s)

    async def next_invite(self, deadline_s: float) -> SipMessage:
        """The next INVITE that opens a dialog.

        Raises:
            DeadlineError: nobody called in time.
        """
        try:
            async with asyncio.timeout(deadline_s):
                return await self._incoming.get()
        except TimeoutError:
            raise DeadlineError(f"{self.account.user} was not called within {deadline_s} s") from None

    def serve(self, call_id: str, handler: MessageHandler) -> None:
        """Give the requests of this Call-ID to `handler`."""
        self._dialogs[call_id] = handler

    def forget(self, call_id: str) -> None:
        """Answer 481 to further requests of this Call-ID."""
        self._dialogs.pop(call_id, None)

    def via(self) -> tuple[str, str]:
        """A Via header line with a new branch (RFC 3261 section 8.1.1.7, RFC 3581)."""
        host, port = self.address
        return "Via", f"SIP/2.0/UDP {uri_host(host)}:{port};branch=z9hG4bK{new_token()};rport"

    def authorize(self, challenge: SipMessage, message: SipMessage) -> tuple[str, str]:
        """The header line that answers a 401 or 407 to `message` (RFC 3261 section 22.2).

        Raises:
            MalformedError: there is no challenge that this phone can answer.
        """
        proxy = challenge.status == 407
        challenges = challenge.get_all("Proxy-Authenticate" if proxy else "WWW-Authenticate")
        value = authorization(
            challenges,
            method=message.method,
            uri=message.uri,
            user=self.account.user,
            password=self.account.password,
            algorithms=self.account.algorithms,
        )
        return "Proxy-Authorization" if proxy else "Authorization", value

    async def exchange(
        self, message: SipMessage, remote: tuple[str, int], deadline_s: float | None = None
    ) -> SipMessage:
        """Send a request, again until it is answered, and give the final response (RFC 3261 section 17.1.2).

        Raises:
            DeadlineError: no final answer in time (by default timer F).
        """
        limit = self.timers.give_up if deadline_s is None else deadline_s
        interval = self.timers.t1
        try:
            with self.transaction(message) as responses:
                async with asyncio.timeout(limit):
                    self.transmit(message, remote)
                    while True:
                        try:
                            async with asyncio.timeout(interval):
                                answer = await responses.get()
                        except TimeoutError:
                            interval = min(2 * interval, self.timers.t2)
                            self.transmit(message, remote)
                        else:
                            if answer.status >= 200:
                                return answer
                            interval = self.timers.t2
        except TimeoutError:
            raise DeadlineError(f"no final answer to {message.method} within {limit} s") from None

    @contextlib.contextmanager
    def transaction(self, message: SipMessage) -> Iterator["asyncio.Queue[SipMessage]"]:
        """The responses to a request, in the order of their arrival, as long as the context lasts."""
        key = message.branch, message.method
        self._transactions[key] = asyncio.Queue(_MAX_QUEUED)
        try:
            yield self._transactions[key]
        finally:
            del self._transactions[key]

    def transmit(self, message: SipMessage, remote: tuple[str, int]) -> None:
        """Send a message once.

        Raises:
            SoftphoneError: the phone is not open.
        """
        if self._transport is None:
            raise SoftphoneError("the phone is not open")
        if not self._transport.is_closing():
            self._transport.sendto(message.encode(), remote)

    def respond(self, answer: SipMessage) -> None:
        """Send a response to where its topmost Via says, and again for each retransmission of the request.

        See RFC 3261 sections 17.2 and 18.2.2, and RFC 3581 section 4.
        """
        via = answer.require("Via")
        host, port = host_port_of("sip:" + via.split()[1].split(";")[0])
        remote = parameter(via, "received") or host, int(parameter(via, "rport") or port)
        self._remember((answer.branch, answer.method), (answer, remote))
        self.transmit(answer, remote)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Take one datagram: to the transaction that awaits it, else to its dialog, else to whoever awaits a call."""
        try:
            message = SipMessage.parse(data)
            self.received.append(message)
            if message.is_request:
                self._receive_request(message)
            else:
                self._receive_response(message)
        except MalformedError as error:
            _LOG.warning("datagram from %s dropped: %s", addr, error)

    def _receive_response(self, message: SipMessage) -> None:
        responses = self._transactions.get((message.branch, message.method))
        dialog = self._dialogs.get(message.require("Call-ID"))
        if responses is not None and not responses.full():
            responses.put_nowait(message)
        elif dialog is not None:
            dialog.handle(message)

    def _receive_request(self, message: SipMessage) -> None:
        key = message.branch, message.method
        dialog = self._dialogs.get(message.require("Call-ID"))
        if message.method == "ACK":
            if dialog is not None:
                dialog.handle(message)
        elif key in self._answered:
            answered = self._answered[key]
            if answered is not None:
                self.transmit(*answered)
        else:
            self._remember(key, None)
            if dialog is not None:
                dialog.handle(message)
            elif message.method == "INVITE" and not message.tag("To") and not self._incoming.full():
                self._incoming.put_nowait(message)
            elif message.method == "OPTIONS":
                self.respond(response(message, 200, "OK", to_tag=new_token(), extra=[("Allow", ALLOW)]))
            else:
                self.respond(response(message, 481, "Call/Transaction Does Not Exist", to_tag=new_token()))

    def _remember(self, key: tuple[str, str], answered: tuple[SipMessage, tuple[str, int]] | None) -> None:
        self._answered[key] = answered
        while len(self._answered) > _MAX_REMEMBERED:
            self._answered.popitem(last=False)

    async def _register(self, expires_s: int, deadline_s: float) -> SipMessage:
        message = self._register_request(expires_s)
        answer = await self.exchange(message, self.account.proxy, deadline_s)
        if answer.status in {401, 407}:
            message = self._register_request(expires_s, self.authorize(answer, message))
            answer = await self.exchange(message, self.account.proxy, deadline_s)
        if answer.status >= 300:
            raise RefusedError("REGISTER", answer.status, answer.reason)
        return answer

    def _register_request(self, expires_s: int, *more: tuple[str, str]) -> SipMessage:
        self._register_cseq += 1
        headers = [
            self.via(),
            ("Max-Forwards", "70"),
            ("From", f"<{self.account.address_of_record}>;tag={new_token()}"),
            ("To", f"<{self.account.address_of_record}>"),
            ("Call-ID", self._register_call_id),
            ("CSeq", f"{self._register_cseq} REGISTER"),
            ("Contact", f"<{self.contact}>"),
            ("Expires", str(expires_s)),
        ]
        return request("REGISTER", f"sip:{self.account.host}", [*headers, *more])


def new_token() -> str:
    """A token that nobody else has: for branches, tags and Call-IDs."""
    return secrets.token_hex(8)
