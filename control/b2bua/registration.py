"""REGISTER as the edge of the registrar: authentication, metrics, log and events (RFC 3261 section 10)."""

from collections.abc import Callable
from datetime import datetime, timedelta

import structlog

from control.b2bua.authentication import Authentication
from control.metrics import ControlMetrics
from control.pbx.records import Event, RegistrationEvent, RegistrationEventKind, RegistrationView, UnregisterCause
from control.pbx.registrar import Binding, Registrar
from control.sip.address import Flow
from control.sip.digest import DenialReason, Denied
from control.sip.errors import RemoteProtocolError
from control.sip.message import Request, Response

_log = structlog.get_logger(__name__)


class Registration:
    """Registers phones, and tells of those that come and go."""

    def __init__(
        self,
        registrar: Registrar,
        authentication: Authentication,
        *,
        metrics: ControlMetrics,
        publish: Callable[[Event], None],
        new_token: Callable[[], str],
        utc_now: Callable[[], datetime],
    ) -> None:
        self._registrar = registrar
        self._authentication = authentication
        self._metrics = metrics
        self._publish = publish
        self._new_token = new_token
        self._utc_now = utc_now

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
        result = self._registrar.receive(request, flow, verdict.username, now)
        response, status = result.response, result.response.status
        self._metrics.registration("ok" if status == 200 else "rejected")
        for binding in result.added:
            self._tell(RegistrationEventKind.REGISTERED, binding, now)
        for binding in result.refreshed:
            _log.debug("registration.refreshed", user=binding.aor, contact=str(binding.contact))
        for binding in result.removed:
            self._tell(RegistrationEventKind.UNREGISTERED, binding, now, UnregisterCause.REMOVED)
        if status != 200:
            _log.warning("registration.refused", user=verdict.username, sip_status=status, source=str(flow.remote))
        response.headers.set("To", str(response.to.with_tag(response.to.tag or self._new_token())))
        return response

    def expire(self, now: float) -> None:
        """Forgets the phones whose time is over."""
        for binding in self._registrar.expire(now):
            self._tell(RegistrationEventKind.UNREGISTERED, binding, now, UnregisterCause.EXPIRED)

    def next_deadline(self) -> float | None:
        """When `expire` wants to be called."""
        return self._registrar.next_deadline()

    def views(self, now: float) -> list[RegistrationView]:
        """What is registered, by user."""
        return [self._view(binding, now) for binding in self._registrar.bindings(now)]

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
