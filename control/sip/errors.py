"""The two ways in which SIP goes wrong: a peer broke the protocol, or we did.

`RemoteProtocolError` carries the status with which to answer; `LocalProtocolError` is a bug of ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from control.sip.message import Request


class SipError(Exception):
    """Any violation of SIP, SDP or digest rules."""


class RemoteProtocolError(SipError):
    """A peer sent what it must not send.

    `status` is the SIP status to answer with and `header` the field at fault, where one is. `request` is set when the
    request is whole enough to build a response from it (RFC 3261 section 8.2.6.2).
    """

    def __init__(self, status: int, message: str, header: str | None = None, request: Request | None = None) -> None:
        super().__init__(status, message, header, request)
        self.status = status
        self.message = message
        self.header = header
        self.request = request

    def __str__(self) -> str:
        return f"{self.status} {self.header}: {self.message}" if self.header else f"{self.status} {self.message}"


class LocalProtocolError(SipError):
    """We were about to break the protocol: a bug on our side, never the peer's fault."""
