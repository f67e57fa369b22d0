"""The registrar and its location service (RFC 3261 section 10.3).

Authentication (step 3) comes before it, and so do Require (step 2) and Route: see control.b2bua. An address-of-record
is named by its user part alone, as this PBX serves one domain. Left out: Path (RFC 3327), outbound (RFC 5626), GRUU.
"""

import heapq
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import ip_address

from control.sip.address import Flow
from control.sip.errors import RemoteProtocolError
from control.sip.headers import NameAddr, Uri, parse_decimal
from control.sip.message import MAX_EXPIRES_S, Request, Response, build_response
from control.sip.snapshot import Moment

# Section 10.3 step 7: what a malformed interval counts as.
MALFORMED_EXPIRES_S = 3600

# Section 19.1.4: parameters that make URIs differ even when one of them lacks it.
_DISTINGUISHING = ("user", "ttl", "method", "maddr", "transport")


# Section 25.1.
_QVALUE = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")


@dataclass(frozen=True, slots=True)
class Binding:
    """One way to reach an address-of-record.

    `flow` is where its REGISTER came from, `expires_at` is monotonic seconds, `q` its preference from 0 to 1,
    `instance` the device's +sip.instance (RFC 5626 section 4.1).
    """

    aor: str
    contact: Uri
    flow: Flow
    sip_call_id: str
    cseq: int
    expires_at: Moment
    q: float = 1.0
    user_agent: str | None = None
    instance: str | None = None


@dataclass(frozen=True, slots=True)
class RegistrarResult:
    """What to answer, without To tag, and what changed: `added` are new bindings, `refreshed` stay, `removed` went."""

    response: Response
    added: tuple[Binding, ...] = ()
    refreshed: tuple[Binding, ...] = ()
    removed: tuple[Binding, ...] = ()


@dataclass(frozen=True, slots=True)
class _Update:
    """What a REGISTER asks for one contact; `expires_s` 0 removes it."""

    contact: Uri
    expires_s: int
    q: float
    instance: str | None


class Registrar:
    """Keeps the bindings of all users. Whatever a REGISTER asks is done as a whole or not at all."""

    def __init__(
        self,
        *,
        is_user: Callable[[str], bool],
        min_expires_s: int,
        max_expires_s: int,
        default_expires_s: int,
        max_bindings: int,
    ) -> None:
        self._is_user = is_user
        self._min_expires_s = min_expires_s
        self._max_expires_s = max_expires_s
        self._default_expires_s = default_expires_s
        self._max_bindings = max_bindings
        # Best first: by q, then the one registered last.
        self._bindings: dict[str, list[Binding]] = {}
        # Entries are never withdrawn: one whose binding was refreshed or removed is passed over when its time comes.
        self._deadlines: list[tuple[float, str]] = []
        self._count = 0

    def __len__(self) -> int:
        """Bindings kept, those included that `expire` has yet to remove."""
        return self._count

    def receive(self, request: Request, flow: Flow, aor: str, now: float) -> RegistrarResult:
        """Carries out a REGISTER of the authenticated user `aor` that came along `flow`.

        The answer is 200 with all bindings; 400 for what is malformed, 403 for somebody else's address-of-record or too
        many bindings, 404 for no user, 423 for too short an interval, 500 for a CSeq out of order.
        """
        try:
            if request.to.uri.username != aor:
                return RegistrarResult(build_response(request, 403))
            if not self._is_user(aor):
                return RegistrarResult(build_response(request, 404))
            if request.is_wildcard_contact:
                return self._remove_all(request, aor, now)
            updates = [self._update(request, contact) for contact in request.contacts]
            if any(0 < update.expires_s < self._min_expires_s for update in updates):
                response = build_response(request, 423)
                response.headers.set("Min-Expires", str(self._min_expires_s))
                return RegistrarResult(response)
            return self._apply(request, updates, flow, aor, now)
        except RemoteProtocolError as error:
            return RegistrarResult(build_response(request, error.status))

    def lookup(self, aor: str, now: float) -> list[Binding]:
        """The live bindings, best first: by q, then the one registered last."""
        return [binding for binding in self._bindings.get(aor, ()) if binding.expires_at > now]

    def restore(self, bindings: Iterable[Binding]) -> None:
        """Takes up bindings of an earlier process, best first for each address-of-record; none that is no user's."""
        for binding in bindings:
            if self._is_user(binding.aor):
                self._store(binding.aor, [*self._bindings.get(binding.aor, ()), binding])
                heapq.heappush(self._deadlines, (binding.expires_at, binding.aor))

    def bindings(self, now: float) -> list[Binding]:
        """All live bindings, by address-of-record."""
        return [binding for aor in sorted(self._bindings) for binding in self.lookup(aor, now)]

    def expire(self, now: float) -> list[Binding]:
        """Removes and returns the bindings whose time is over."""
        expired: list[Binding] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, aor = heapq.heappop(self._deadlines)
            kept = self.lookup(aor, now)
            expired += [binding for binding in self._bindings.get(aor, ()) if binding not in kept]
            self._store(aor, kept)
        return expired

    def next_deadline(self) -> float | None:
        """When `expire` wants to be called; it may then find nothing, if a binding was refreshed meanwhile."""
        return self._deadlines[0][0] if self._deadlines else None

    def _update(self, request: Request, contact: NameAddr) -> _Update:
        if contact.uri.scheme != "sip":
            raise RemoteProtocolError(400, f"cannot reach a {contact.uri.scheme} URI", "Contact")
        return _Update(
            contact=contact.uri,
            expires_s=min(self._expires_s(request, contact), self._max_expires_s),
            q=_q_of(contact),
            instance=contact.param("+sip.instance") or None,
        )

    def _expires_s(self, request: Request, contact: NameAddr) -> int:
        text = contact.param("expires")
        if text is None:
            text = request.headers.get("expires")
        if text is None:
            return self._default_expires_s
        if text.isascii() and text.isdigit():
            value = parse_decimal(text, MAX_EXPIRES_S)
            return MAX_EXPIRES_S if value is None else value
        return MALFORMED_EXPIRES_S

    def _remove_all(self, request: Request, aor: str, now: float) -> RegistrarResult:
        """Section 10.3 step 6."""
        if request.expires != 0 or len(request.headers.get_list("contact")) != 1:
            raise RemoteProtocolError(400, "* needs Expires: 0 and no other contact", "Contact")
        for binding in self.lookup(aor, now):
            _check_order(request, binding)
        removed = tuple(self._bindings.get(aor, ()))
        self._store(aor, [])
        return RegistrarResult(build_response(request, 200), removed=removed)

    def _apply(self, request: Request, updates: list[_Update], flow: Flow, aor: str, now: float) -> RegistrarResult:
        """Section 10.3 steps 7 and 8."""
        before = self.lookup(aor, now)
        bindings = list(before)
        for update in updates:
            for binding in before:
                if same_contact(binding.contact, update.contact):
                    _check_order(request, binding)
            bindings = [binding for binding in bindings if not same_contact(binding.contact, update.contact)]
            if update.expires_s:
                binding = Binding(
                    aor=aor,
                    contact=update.contact,
                    flow=flow,
                    sip_call_id=request.call_id,
                    cseq=request.cseq.number,
                    expires_at=now + update.expires_s,
                    q=update.q,
                    user_agent=request.user_agent,
                    instance=update.instance,
                )
                bindings.insert(0, binding)
        if len(bindings) > max(self._max_bindings, len(before)):
            return RegistrarResult(build_response(request, 403, "Too Many Bindings"))
        bindings.sort(key=lambda binding: -binding.q)
        written = tuple(binding for binding in bindings if binding not in before)
        refreshed = tuple(
            binding for binding in written if any(same_contact(binding.contact, old.contact) for old in before)
        )
        added = tuple(binding for binding in written if binding not in refreshed)
        removed = tuple(
            old
            for old in self._bindings.get(aor, ())
            if not any(same_contact(old.contact, binding.contact) for binding in bindings)
        )
        self._store(aor, bindings)
        for binding in written:
            heapq.heappush(self._deadlines, (binding.expires_at, aor))
        self._compact()
        response = build_response(request, 200)
        for binding in bindings:
            response.headers.add("Contact", str(_described(binding, now)))
        return RegistrarResult(response, added, refreshed, removed)

    def _store(self, aor: str, bindings: list[Binding]) -> None:
        self._count += len(bindings) - len(self._bindings.get(aor, ()))
        if bindings:
            self._bindings[aor] = bindings
        else:
            self._bindings.pop(aor, None)

    def _compact(self) -> None:
        # A phone that refreshes every second must not leave an hour of dead deadlines behind.
        if len(self._deadlines) > 2 * self._count + 64:
            self._deadlines = [(binding.expires_at, aor) for aor, kept in self._bindings.items() for binding in kept]
            heapq.heapify(self._deadlines)


def same_contact(one: Uri, other: Uri) -> bool:
    """Whether two contacts are equal (RFC 3261 section 19.1.4); numeric hosts are compared by value."""
    if (one.scheme, one.username, one.password, one.port, one.opaque, one.headers) != (
        other.scheme, other.username, other.password, other.port, other.opaque, other.headers,
    ):  # fmt: skip
        return False
    if _host(one) != _host(other):
        return False
    names = {name.lower() for name, _ in one.params} | {name.lower() for name, _ in other.params}
    for name in names:
        mine, theirs = one.param(name), other.param(name)
        if mine is None or theirs is None:
            if name in _DISTINGUISHING:
                return False
        elif mine.lower() != theirs.lower():
            return False
    return True


def _host(uri: Uri) -> str:
    try:
        return str(ip_address(uri.host))
    except ValueError:
        return uri.host.lower()


def _q_of(contact: NameAddr) -> float:
    text = contact.param("q")
    if text is None:
        return 1.0
    if not _QVALUE.fullmatch(text):
        raise RemoteProtocolError(400, "q is not from 0 to 1", "Contact")
    return float(text)


def _check_order(request: Request, binding: Binding) -> None:
    if binding.sip_call_id == request.call_id and request.cseq.number <= binding.cseq:
        raise RemoteProtocolError(500, "not above the CSeq of the binding", "CSeq")


def _described(binding: Binding, now: float) -> NameAddr:
    params: list[tuple[str, str | None]] = []
    if binding.q != 1.0:
        params.append(("q", f"{binding.q:g}"))
    params.append(("expires", str(max(1, round(binding.expires_at - now)))))
    return NameAddr(binding.contact, params=tuple(params))
