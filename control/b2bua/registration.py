"""REGISTER as the edge of the registrar: authentication, metrics, log and events (RFC 3261 section 10)."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

import structlog

from control.b2bua.authentication import Authentication
from control.metrics import ControlMetrics
from control.pbx.records import Event, RegistrationEvent, RegistrationEventKind, RegistrationView, UnregisterCause
from control.pbx.registrar import Binding, Registrar, same_contact
from control.sip.address import Flow
from control.sip.digest import DenialReason, Denied
from control.sip.errors import RemoteProtocolError
from control.sip.message import Request, Response
from control.sip.snapshot import Plain, restore, save

_log = structlog.get_logger(__name__)


class BindingPort(Protocol):
    """Where bindings are saved."""

    def save(self, aor: str, bindings: Plain | None) -> None:
        """Save those of an address-of-record; None when it has none any more."""


@dataclass(frozen=True, slots=True)
class _Bindings:
    """The bindings of one address-of-record, best first."""

    bindings: tuple[Binding, ...]


def saved_bindings(bindings: tuple[Binding, ...]) -> Plain:
    """Bindings as plain data."""
    return save(_Bindings(bindings))


def restored_bindings(plain: Plain, *, offset_s: float) -> tuple[Binding, ...]:
    """The bindings of such data, by this process's clock.

    Raises:
        SnapshotError: it cannot be read.
    """
    return restore(_Bindings, plain, offset_s=offset_s, callables={}).bindings


class Registration:
    """Registers phones, and tells of those that come and go.

    `moved` is told of a phone that had registered over one connection and does so over another: its former binding, the
    new flow, and the time.
    """

    def __init__(
        self,
        registrar: Registrar,
        authentication: Authentication,
        *,
        metrics: ControlMetrics,
        publish: Callable[[Event], None],
        new_token: Callable[[], str],
        utc_now: Callable[[], datetime],
        store: BindingPort | None,
        moved: Callable[[Binding, Flow, float], None],
    ) -> None:
        self._registrar = registrar
        self._authentication = authentication
        self._metrics = metrics
        self._publish = publish
        self._new_token = new_token
        self._utc_now = utc_now
        self._store = store
        self._moved = moved

    def answer(self, request: Request, flow: Flow, now: float) -> Response:
        """Carries out a REGISTER, or challenges or refuses it.

        Raises:
            RemoteProtocolError: 420, it requires an extension.
        """
        if request.require:
            raise RemoteProtocolError(420, ", ".join(sorted(request.require)), "Require", request)
        verdict = self._authentication.verify(request, "Authorization", now)
        if isinstance(verdict, Denied):
            self._metrics.registration("challenged" if verdict.reason is DenialReason.MISSING else "denied")
            return self._authentication.answer(request, verdict, flow.remote, now, status=401)
        before = self._registrar.lookup(verdict.username, now)
        result = self._registrar.receive(request, flow, verdict.username, now)
        response, status = result.response, result.response.status
        self._metrics.registration("ok" if status == 200 else "rejected")
        for binding in result.added:
            self._tell(RegistrationEventKind.REGISTERED, binding, now)
        for binding in result.refreshed:
            _log.debug("registration.refreshed", user=binding.aor, contact=str(binding.contact))
        for binding in result.removed:
            self._tell(RegistrationEventKind.UNREGISTERED, binding, now, UnregisterCause.REMOVED)
        if result.added or result.refreshed or result.removed:
            self._save(verdict.username, now)
        for binding in (*result.added, *result.refreshed):
            for old in before:
                if old.flow.transport.is_reliable and old.flow != binding.flow and _is_same_phone(old, binding):
                    self._moved(old, binding.flow, now)
        if status != 200:
            _log.warning("registration.refused", user=verdict.username, sip_status=status, source=str(flow.remote))
        response.headers.set("To", str(response.to.with_tag(response.to.tag or self._new_token())))
        return response

    def expire(self, now: float) -> None:
        """Forgets the phones whose time is over."""
        expired = self._registrar.expire(now)
        for binding in expired:
            self._tell(RegistrationEventKind.UNREGISTERED, binding, now, UnregisterCause.EXPIRED)
        for aor in {binding.aor for binding in expired}:
            self._save(aor, now)

    def next_deadline(self) -> float | None:
        """When `expire` wants to be called."""
        return self._registrar.next_deadline()

    def views(self, now: float) -> list[RegistrationView]:
        """What is registered, by user."""
        return [self._view(binding, now) for binding in self._registrar.bindings(now)]

    def _save(self, aor: str, now: float) -> None:
        if self._store is not None:
            bindings = tuple(self._registrar.lookup(aor, now))
            self._store.save(aor, saved_bindings(bindings) if bindings else None)

    def _tell(
        self, kind: RegistrationEventKind, binding: Binding, now: float, cause: UnregisterCause | None = None
    ) -> None:
        view = self._view(binding, now)
        what = "registration.added" if cause is None else f"registration.{cause.value}"
        _log.info(what, user=view.user, contact=view.contact, source=view.source)
        self._publish(RegistrationEvent(kind, self._utc_now(), view, cause))

    def _view(self, binding: Binding, now: float) -> RegistrationView:
        return RegistrationView(
            user=binding.aor,
            contact=str(binding.contact),
            source=str(binding.flow.remote),
            user_agent=binding.user_agent,
            expires_at=self._utc_now() + timedelta(seconds=binding.expires_at - now),
        )


def _is_same_phone(one: Binding, other: Binding) -> bool:
    """Whether two bindings are of one device, which a new connection may have given another contact (RFC 5626)."""
    return same_contact(one.contact, other.contact) or (one.instance is not None and one.instance == other.instance)
