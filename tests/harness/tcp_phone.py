"""A phone on a TCP or TLS connection, played by hand: a test says what it sends, and sees each message that comes."""

import asyncio
import contextlib
import secrets
import ssl
from types import TracebackType
from typing import Self

from control.sip.framing import Framer
from sippbx.softphone.digest import authorization
from sippbx.softphone.message import SipMessage, request, response

PATIENCE_S = 10.0


class TcpPhone:
    """One user at `host`; its Contact names a port at which nobody listens, as behind NAT."""

    def __init__(
        self, user: str, password: str, *, host: str, pbx: tuple[str, int], tls: ssl.SSLContext | None = None
    ) -> None:
        self.user = user
        self.contact = f"<sip:{user}@{host}:9;transport={'tls' if tls else 'tcp'}>"
        self._password = password
        self._host = host
        self._pbx = pbx
        self._tls = tls
        self._cseq = 0
        self._call_id = secrets.token_hex(8)
        self._framer = Framer()
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.disconnect()

    async def connect(self) -> None:
        """Open a connection, from a port that the system chooses."""
        self._framer = Framer()
        name = self._pbx[0] if self._tls else None
        self._reader, self._writer = await asyncio.wait_for(
            asyncio.open_connection(*self._pbx, local_addr=(self._host, 0), ssl=self._tls, server_hostname=name),
            PATIENCE_S,
        )

    async def disconnect(self) -> None:
        """Close the connection."""
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(OSError, TimeoutError):
                await asyncio.wait_for(self._writer.wait_closed(), PATIENCE_S)
            self._writer = None

    async def until_disconnected(self) -> None:
        """Wait until the other end has closed the connection."""
        assert self._reader is not None
        with contextlib.suppress(ConnectionError):
            while await asyncio.wait_for(self._reader.read(65_536), PATIENCE_S):
                pass
        await self.disconnect()

    def send(self, message: SipMessage) -> None:
        """Send a message."""
        assert self._writer is not None
        self._writer.write(message.encode())

    async def receive(self, method: str, status: int = 0) -> SipMessage:
        """The next message, which must be this request, or the response of this status to it; 100 is passed over."""
        assert self._reader is not None
        while True:
            while (frame := self._framer.next()) is None:
                data = await asyncio.wait_for(self._reader.read(65_536), PATIENCE_S)
                assert data, "the connection was closed"
                self._framer.feed(data)
            assert isinstance(frame, bytes)
            message = SipMessage.parse(frame)
            if message.status != 100:
                assert (message.method, message.status) == (method, status), message
                return message

    async def register(self) -> None:
        """Register, answering the challenge."""
        uri = f"sip:{self._pbx[0]}"
        self.send(self._register(uri))
        challenge = await self.receive("REGISTER", 401)
        values = challenge.get_all("WWW-Authenticate")
        proof = authorization(values, method="REGISTER", uri=uri, user=self.user, password=self._password)
        self.send(self._register(uri, ("Authorization", proof)))
        await self.receive("REGISTER", 200)

    def answer(self, to: SipMessage, status: int, reason: str, *, body: str = "") -> None:
        """Answer a request."""
        extra = [("Contact", self.contact)] + ([("Content-Type", "application/sdp")] if body else [])
        self.send(response(to, status, reason, to_tag="phone", extra=extra, body=body))

    def _register(self, uri: str, *more: tuple[str, str]) -> SipMessage:
        self._cseq += 1
        via = f"SIP/2.0/{'TLS' if self._tls else 'TCP'} {self._host}:9;rport;branch=z9hG4bK{secrets.token_hex(8)}"
        whose = f"<sip:{self.user}@{self._pbx[0]}>"
        headers = [
            ("Via", via),
            ("Max-Forwards", "70"),
            ("From", f"{whose};tag=phone"),
            ("To", whose),
            ("Call-ID", self._call_id),
            ("CSeq", f"{self._cseq} REGISTER"),
            ("Contact", self.contact),
            ("Expires", "600"),
            *more,
        ]
        return request("REGISTER", uri, headers)
