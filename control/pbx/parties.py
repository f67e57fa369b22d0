"""Who is on a call."""

from collections.abc import Mapping
from dataclasses import dataclass

from control.pbx.records import CallDirection, LegName, LegRecord
from control.sip.headers import NameAddr


@dataclass(frozen=True, slots=True)
class Invitation:
    """The INVITE to a leg that we call: its Request-URI, and its From and To without tags."""

    request_uri: str
    from_: NameAddr
    to: NameAddr
    max_forwards: int


@dataclass(frozen=True, slots=True)
class Parties:
    """Who is on a call: for the record, and as the legs that we call show them.

    `caller_record` is what the caller's INVITE said of it, None for an originated call.
    """

    direction: CallDirection
    caller: str
    callee: str
    invitations: Mapping[LegName, Invitation]
    caller_record: LegRecord | None = None
    caller_user: str | None = None
    caller_trunk: str | None = None
    callee_user: str | None = None
    callee_trunk: str | None = None

    @property
    def originated(self) -> bool:
        """The caller is called, too: the call was asked for over an API."""
        return LegName.CALLER in self.invitations
