"""Makes calls: out of an INVITE and where it leads, or out of two parties that shall talk to each other."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final
from urllib.parse import quote

from control.pbx.call import Call, CallLimits
from control.pbx.call_media import CallMedia, MediaAddress, sdp_number
from control.pbx.parties import Invitation, Parties
from control.pbx.records import CallDirection, CallId, LegName, LegRecord
from control.pbx.routing import Caller, Route, Target
from control.settings.settings import Settings
from control.sip.address import Address, Flow
from control.sip.headers import NameAddr, Uri
from control.sip.message import Request
from control.sip.session import InviteSession, LocalParty
from control.sip.stack import RequestReceived
from control.sip.transaction import Timers

DEFAULT_MAX_FORWARDS: Final = 70


@dataclass(frozen=True, slots=True)
class OriginatedParty:
    """One of the parties of an originated call: what was asked for, and where it leads."""

    name: str
    route: Route


class CallFactory:
    """Builds calls with their sessions and media, as the settings want them; it starts none."""

    def __init__(self, settings: Settings, *, new_token: Callable[[], str]) -> None:
        self._settings = settings
        self._new_token = new_token
        self._random = random.SystemRandom().random
        self._timers = Timers(settings.sip.timers.t1_s, settings.sip.timers.t2_s, settings.sip.timers.t4_s)
        self._limits = CallLimits(
            settings.sip.ring_timeout_s, settings.sip.max_call_duration_s, settings.limits.retry_after_s
        )
        self._users = {user.name: user for user in settings.users}
        self._listeners = {listener.name: listener for listener in settings.sip.listeners}
        self._media_addresses = {
            address.version: MediaAddress(address.bind, address.advertise) for address in settings.media.addresses
        }

    def invited(
        self, event: RequestReceived, caller: Caller, shown: str, route: Route, *, utc: datetime, now: float
    ) -> Call:
        """The call that an admitted INVITE asks for. `shown` is the caller, for the record and for the callee.

        Raises:
            RemoteProtocolError: see InviteSession.of_caller.
        """
        request, target = event.request, route.targets[0]
        display_name = self._display_name(caller.user) or request.from_.display_name
        hops = request.max_forwards
        parties = Parties(
            direction=route.direction,
            caller=shown,
            callee=route.number,
            invitations={
                LegName.CALLEE: Invitation(
                    str(target.uri),
                    NameAddr(self._uri(shown, target.flow), display_name),
                    NameAddr(replace(target.uri, params=(), headers="")),
                    (DEFAULT_MAX_FORWARDS if hops is None else hops) - 1,
                )
            },
            caller_record=caller_record(request, event.flow.remote, caller.user, caller.trunk),
            caller_user=caller.user,
            caller_trunk=caller.trunk,
            callee_user=target.user,
            callee_trunk=target.trunk,
        )
        session = InviteSession.of_caller(
            event,
            symmetric=caller.user is not None,
            party=self._party(parties.callee, event.flow),
            timers=self._timers,
            new_token=self._new_token,
            random=self._random,
        )
        call_id = CallId(self._new_token())
        callee = self._called(target.flow, target.user, parties.caller)
        legs = {LegName.CALLER: session, LegName.CALLEE: callee}
        return self._call(call_id, parties, legs, request.body, utc=utc, now=now)

    def originated(
        self, call_id: CallId, caller: OriginatedParty, callee: OriginatedParty, *, utc: datetime, now: float
    ) -> Call:
        """A call that is asked for over an API: both parties are called, and each sees the other's number."""
        to_caller, to_callee = caller.route.targets[0], callee.route.targets[0]
        outward = to_caller.trunk is not None or to_callee.trunk is not None
        parties = Parties(
            direction=CallDirection.OUTBOUND if outward else CallDirection.INTERNAL,
            caller=caller.name,
            callee=callee.name,
            invitations={
                LegName.CALLER: self._invitation(to_caller, callee),
                LegName.CALLEE: self._invitation(to_callee, caller),
            },
            caller_user=to_caller.user,
            caller_trunk=to_caller.trunk,
            callee_user=to_callee.user,
            callee_trunk=to_callee.trunk,
        )
        legs = {
            LegName.CALLER: self._called(to_caller.flow, to_caller.user, callee.route.number),
            LegName.CALLEE: self._called(to_callee.flow, to_callee.user, caller.route.number),
        }
        return self._call(call_id, parties, legs, b"", utc=utc, now=now)

    def _invitation(self, target: Target, other: OriginatedParty) -> Invitation:
        shown = NameAddr(self._uri(other.route.number, target.flow), self._display_name(other.route.targets[0].user))
        to = NameAddr(replace(target.uri, params=(), headers=""))
        return Invitation(str(target.uri), shown, to, DEFAULT_MAX_FORWARDS)

    def _call(
        self,
        call_id: CallId,
        parties: Parties,
        legs: dict[LegName, InviteSession],
        offer: bytes,
        *,
        utc: datetime,
        now: float,
    ) -> Call:
        flows = {leg: session.flow for leg, session in legs.items()}
        media = CallMedia.between(
            call_id,
            self._settings.media.mode,
            self._settings.media.latch_policy,
            addresses={leg: self._media_addresses[6 if ":" in flow.remote.host else 4] for leg, flow in flows.items()},
            signalling={leg: flow.remote.host for leg, flow in flows.items()},
            session_ids={leg: sdp_number(self._new_token()) for leg in LegName},
        )
        return Call.between(
            call_id,
            parties,
            caller=legs[LegName.CALLER],
            callee=legs[LegName.CALLEE],
            media=media,
            limits=self._limits,
            offer=offer,
            utc=utc,
            now=now,
        )

    def _called(self, flow: Flow, user: str | None, other: str) -> InviteSession:
        """The session towards a party that we call; our Contact there names the other one."""
        return InviteSession.of_callee(
            flow=flow,
            symmetric=user is not None,
            party=self._party(other, flow),
            timers=self._timers,
            new_token=self._new_token,
            random=self._random,
        )

    def _display_name(self, user: str | None) -> str | None:
        settings = self._users.get(user) if user is not None else None
        return settings.display_name or None if settings is not None else None

    def _party(self, name: str, flow: Flow) -> LocalParty:
        contact = self._uri(name, flow)
        if flow.transport.is_reliable:
            # Without it the peer would send requests by UDP (RFC 3263 section 4.1).
            contact = replace(contact, params=(("transport", flow.transport.lower()),))
        return LocalParty(NameAddr(contact), self._settings.sip.server_name)

    def _uri(self, name: str, flow: Flow) -> Uri:
        """A name at our own address, as peers along `flow` see it: never at the other party's."""
        listener = self._listeners[flow.listener]
        address = Address(listener.advertise, listener.advertised_port)
        return Uri("sip", _escaped(name), address.host, address.port)


def caller_record(request: Request, remote: Address, user: str | None, trunk: str | None) -> LegRecord:
    """The record of a caller, out of its INVITE."""
    return LegRecord(
        name=LegName.CALLER,
        sip_call_id=request.call_id,
        from_uri=str(request.from_.uri),
        to_uri=str(request.to.uri),
        remote=str(remote),
        trunk=trunk,
        user=user,
        user_agent=request.user_agent,
    )


def _escaped(user: str) -> str:
    """A user part as a URI writes it (RFC 3261 section 25.1, user)."""
    return quote(user, safe="-_.!~*'()&=+$,;?/", errors="surrogateescape")
