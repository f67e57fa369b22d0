"""Who sends a request: digest authentication of users (RFC 3261 section 22), with what is counted and logged of it."""

from collections.abc import Callable, Iterable
from typing import Final

import structlog

from control.metrics import ControlMetrics
from control.settings.sections import UserSettings
from control.sip.address import Address
from control.sip.digest import DenialReason, Denied, DigestAuthenticator, Password, Verified
from control.sip.message import Request, Response, build_response

# After these the peer may try again with a challenge of ours; wrong credentials are refused for good.
_WORTH_ANOTHER_TRY: Final = frozenset({DenialReason.MISSING, DenialReason.STALE, DenialReason.REPLAYED})

_log = structlog.get_logger(__name__)


class Authentication:
    """Checks the credentials of requests, and writes the answers to those that have none or wrong ones."""

    def __init__(
        self,
        authenticator: DigestAuthenticator,
        users: Iterable[UserSettings],
        *,
        metrics: ControlMetrics,
        new_token: Callable[[], str],
    ) -> None:
        self._authenticator = authenticator
        self._users = {user.name: user for user in users}
        self._metrics = metrics
        self._new_token = new_token

    def verify(self, request: Request, header: str, now: float) -> Verified | Denied:
        """Who the credentials in `header` (Authorization or Proxy-Authorization) are of."""
        values = request.headers.get_all(header)
        verdict = self._authenticator.verify(request.method, request.uri, values, self._password_of, now)
        outcome = "ok" if isinstance(verdict, Verified) else verdict.reason.value
        self._metrics.authentication(request.method, outcome)
        return verdict

    def without_credentials(self, request: Request) -> Denied:
        """The verdict on a request that was not even looked at because it has none."""
        self._metrics.authentication(request.method, DenialReason.MISSING.value)
        return Denied(DenialReason.MISSING)

    def answer(self, request: Request, verdict: Denied, source: Address, now: float, *, status: int) -> Response:
        """A challenge of 401 or 407, as `status` says; or 403, so that nobody goes on trying with wrong credentials."""
        if verdict.reason in _WORTH_ANOTHER_TRY:
            response = build_response(request, status, to_tag=self._new_token())
            header = "WWW-Authenticate" if status == 401 else "Proxy-Authenticate"
            for value in self._authenticator.challenges(now, stale=verdict.reason is not DenialReason.MISSING):
                response.headers.add(header, value)
            return response
        _log.warning(
            "authentication.failed",
            method=request.method,
            user=verdict.username,
            source=str(source),
            reason=verdict.reason.value,
        )
        return build_response(request, 403, to_tag=self._new_token())

    def _password_of(self, username: str) -> Password | None:
        user = self._users.get(username)
        if user is None:
            return None
        if user.password is not None:
            return Password(plain=user.password.get_secret_value())
        if user.ha1 is None:
            return None
        hashes = {"MD5": user.ha1.md5, "SHA-256": user.ha1.sha256}
        return Password(ha1={name: value.get_secret_value() for name, value in hashes.items() if value is not None})
