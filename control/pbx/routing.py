"""Routing: where a called number leads, for this caller.

A number is the user part of the Request-URI. A local user of exactly that name comes first; otherwise the longest
prefix among the rules that the caller may use decides. Callers from trunks reach users, and trunks only by a rule that
names the caller's trunk.
Left out: routing by domain, as every host in a Request-URI is taken for ours.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from ipaddress import ip_address
from urllib.parse import unquote

from control.pbx.records import CallDirection, Reason
from control.pbx.registrar import Binding
from control.pbx.trunks import Trunks
from control.sip.address import Address, Flow
from control.sip.headers import Uri

# Who may use a rule: all users, by this name, and trunks by theirs.
USERS = "users"

DEFAULT_SIP_PORT = 5060

_MAX_NUMBER_SHOWN = 64
_VISUAL_SEPARATORS = str.maketrans("", "", "-.()")
_DIALLED = re.compile(r"\+?[0-9*#]+")


class NatHandling(StrEnum):
    """Where requests to a registered user go.

    AUTO: to the port in its contact if the contact shows the host that registered, as nothing translates addresses on
    the way; otherwise to where the registration came from. SOURCE: always to where the registration came from.
    A phone that registered over a connection is reached over it, whatever is set.
    """

    AUTO = "auto"
    SOURCE = "source"


@dataclass(frozen=True, slots=True)
class RouteRule:
    """Numbers with `prefix`, dialled by one of `callers`, go to a trunk or a user; one of the two is set.

    Towards a trunk the first `strip` characters are cut and `prepend` is put in front.
    """

    prefix: str
    callers: frozenset[str]
    trunk: str | None = None
    user: str | None = None
    strip: int = 0
    prepend: str = ""

    def __str__(self) -> str:
        return f"{self.prefix!r} of trunk {self.trunk}" if self.trunk else f"{self.prefix!r} of user {self.user}"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls: an authenticated user or a trusted trunk; one of the two is set."""

    user: str | None = None
    trunk: str | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """Where an INVITE goes: its Request-URI, the way there, and whom it reaches."""

    uri: Uri
    flow: Flow
    user: str | None = None
    trunk: str | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """Where a call goes: targets, best first, at least one. `number` is what was dialled, as it was understood."""

    targets: tuple[Target, ...]
    direction: CallDirection
    number: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a call is not set up; `detail` is for people and tells what nearly matched."""

    status: int
    reason: Reason
    detail: str
    retry_after_s: int | None = None


class Router:
    """Decides where calls go. Time grows with the length of a number, not with the number of users or rules."""

    def __init__(
        self,
        *,
        users: Mapping[str, NatHandling],
        bindings_of: Callable[[str, float], Sequence[Binding]],
        trunks: Trunks,
        rules: Iterable[RouteRule] = (),
    ) -> None:
        """Raises ValueError when a rule names a trunk that there is not."""
        self._users = users
        self._bindings_of = bindings_of
        self._trunks = trunks
        self._rules: dict[str, list[RouteRule]] = {}
        for rule in rules:
            if rule.trunk is not None and trunks.get(rule.trunk) is None:
                raise ValueError(f"rule {rule} names no trunk of ours")
            self._rules.setdefault(rule.prefix, []).append(rule)
        self._longest_prefix = max(map(len, self._rules), default=0)
        self._sorted_prefixes = sorted(self._rules)
        self._sorted_users = sorted(users)

    def route(self, caller: Caller, uri: Uri, now: float) -> Route | Refusal:
        """Where a call to `uri` goes, or why it goes nowhere; never raises.

        Refusals: 404 UNKNOWN_NUMBER, 480 NOT_REGISTERED, 403 NOT_ALLOWED, 416 BAD_REQUEST for a scheme without numbers.
        """
        name = USERS if caller.user is not None else caller.trunk
        if name is None:
            return Refusal(403, Reason.NOT_ALLOWED, "the caller is neither a user nor a trunk")
        if uri.scheme not in ("sip", "sips", "tel"):
            return Refusal(416, Reason.BAD_REQUEST, f"{uri.scheme} URIs name nobody here")
        number = _number_of(uri)
        if number in self._users:
            return self._to_user(name, number, number, now)
        digits = number.translate(_VISUAL_SEPARATORS)
        if not _DIALLED.fullmatch(digits):
            return Refusal(404, Reason.UNKNOWN_NUMBER, self._no_such_user(number))
        matching = list(self._matching(digits))
        rule = next((rule for rule in matching if name in rule.callers), None)
        if rule is not None:
            return self._by_rule(rule, name, digits, now)
        if matching:
            detail = f"{_shown(digits)} matches {matching[0]}, which is not open to calls from {_caller(name)}"
            return Refusal(403, Reason.NOT_ALLOWED, detail)
        return Refusal(404, Reason.UNKNOWN_NUMBER, self._no_route(digits))

    def _by_rule(self, rule: RouteRule, name: str, digits: str, now: float) -> Route | Refusal:
        if rule.user is not None:
            return self._to_user(name, rule.user, digits, now)
        trunk = self._trunks.get(rule.trunk) if rule.trunk is not None else None
        sent = rule.prepend + digits[rule.strip :]
        if trunk is None or not sent:
            return Refusal(404, Reason.UNKNOWN_NUMBER, f"{_shown(digits)} is {rule} alone: nothing is left to send")
        remote = trunk.flow.remote
        # '#' is not for the user part of a URI (RFC 3261 section 25.1, user-unreserved).
        uri = Uri("sip", sent.replace("#", "%23"), remote.host, remote.port)
        return Route((Target(uri, trunk.flow, trunk=trunk.name),), CallDirection.OUTBOUND, digits)

    def _to_user(self, name: str, user: str, number: str, now: float) -> Route | Refusal:
        nat = self._users.get(user)
        bindings = self._bindings_of(user, now) if nat is not None else ()
        if nat is None or not bindings:
            return Refusal(480, Reason.NOT_REGISTERED, f"user {user} has no contact registered")
        targets = tuple(
            Target(_request_uri(binding.contact), _flow_to(binding, nat), user=user) for binding in bindings
        )
        return Route(targets, CallDirection.INTERNAL if name == USERS else CallDirection.INBOUND, number)

    def _matching(self, digits: str) -> Iterator[RouteRule]:
        """The rules whose prefix it has, the longest first."""
        for length in range(min(len(digits), self._longest_prefix), 0, -1):
            yield from self._rules.get(digits[:length], ())

    def _no_such_user(self, number: str) -> str:
        if not number:
            return "the Request-URI has no user part"
        similar = [user for user in _neighbours(self._sorted_users, number) if 2 * _common(user, number) >= len(number)]
        hint = f"; similar: {', '.join(similar)}" if similar else ""
        return f"user {_shown(number)} is not configured{hint}"

    def _no_route(self, digits: str) -> str:
        spellings = (
            (f"+{digits}", "the number lacks '+'"),
            (digits.removeprefix("+"), "the number has a '+' too many"),
            (f"+{digits.removeprefix('00')}", "the number has 00 for '+'"),
        )
        for spelling, flaw in spellings:
            if spelling != digits and (rule := next(self._matching(spelling), None)):
                return f"no route for {_shown(digits)}: the longest prefix that nearly matched is {rule}, {flaw}"
        nearest = max(
            _neighbours(self._sorted_prefixes, digits), key=lambda prefix: _common(prefix, digits), default=""
        )
        if common := _common(nearest, digits):
            rule = self._rules[nearest][0]
            flaw = (
                "the number is too short" if common == len(digits) else f"the number differs after {digits[:common]!r}"
            )
            hint = f": the longest prefix that nearly matched is {rule}, {flaw}"
        else:
            hint = ": no prefix comes near"
        return f"no route for {_shown(digits)}{hint}; {self._no_such_user(digits)}"


def _number_of(uri: Uri) -> str:
    # Telephone parameters may stand in the user part (RFC 3261 section 19.1.6); none of them changes where a call goes.
    text = uri.opaque if uri.scheme == "tel" else uri.user or ""
    return unquote(text.partition(";")[0], errors="surrogateescape")


def _request_uri(contact: Uri) -> Uri:
    """A contact as Request-URI, without what section 19.1.1 forbids there."""
    params = tuple(param for param in contact.params if param[0].lower() != "method")
    return replace(contact, params=params, headers="")


def _flow_to(binding: Binding, nat: NatHandling) -> Flow:
    contact, flow = binding.contact, binding.flow
    if flow.transport.is_reliable:
        return flow
    transport = contact.param("transport") or flow.transport
    if (
        nat is NatHandling.SOURCE
        or transport.upper() != flow.transport
        or not _same_host(contact.host, flow.remote.host)
    ):
        return flow
    return replace(flow, remote=Address(flow.remote.host, contact.port or DEFAULT_SIP_PORT))


def _same_host(one: str, other: str) -> bool:
    try:
        return ip_address(one) == ip_address(other)
    except ValueError:
        return False


def _neighbours(ordered: Sequence[str], text: str) -> Sequence[str]:
    """The entries around the place where `text` would stand: those with most in common with it are among them."""
    at = bisect_left(ordered, text)
    return ordered[max(0, at - 2) : at + 2]


def _common(one: str, other: str) -> int:
    """How many characters both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _shown(number: str) -> str:
    return repr(number if len(number) <= _MAX_NUMBER_SHOWN else f"{number[:_MAX_NUMBER_SHOWN]}...")


def _caller(name: str) -> str:
    return "users" if name == USERS else f"trunk {name}"
