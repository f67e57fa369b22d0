"""Digest authentication, the server's side (RFC 7616 and 8760; RFC 3261 section 22).

Nonces need no storage: an issue time and a serial number, sealed. A nonce is remembered only when a correct answer used
it, so that its counts can be told from replays and nobody without a password fills the table. An unknown user and a
wrong password cannot be told apart, neither by the answer nor by the work done. Left out: auth-int, session algorithms,
userhash.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import count
from typing import Final

from control.sip.errors import RemoteProtocolError
from control.sip.headers import Uri, quote, split_commas, unquote_string

MAX_REMEMBERED_NONCES: Final = 65536

_NONCE_COUNT: Final = re.compile(r"[0-9A-Fa-f]{8}")


def _hash(algorithm: str, text: str) -> str:
    octets = text.encode("utf-8", "surrogateescape")
    if algorithm == "SHA-256":
        return hashlib.sha256(octets).hexdigest()
    return hashlib.md5(octets, usedforsecurity=False).hexdigest()


@dataclass(frozen=True, slots=True)
class Password:
    """A user's secret: in plain text, or as H(username:realm:password) in hexadecimal by algorithm name, or both."""

    plain: str | None = field(default=None, repr=False)
    ha1: Mapping[str, str] = field(default_factory=dict, repr=False)


class DenialReason(StrEnum):
    """Why a request is not authenticated."""

    MISSING = "missing"
    MALFORMED = "malformed"
    WRONG = "wrong"
    STALE = "stale"
    REPLAYED = "replayed"


@dataclass(frozen=True, slots=True)
class Verified:
    """The request was made by this user."""

    username: str


@dataclass(frozen=True, slots=True)
class Denied:
    """The request is not authenticated; `username` is what it claimed, if anything."""

    reason: DenialReason
    username: str | None = None

    @property
    def is_stale(self) -> bool:
        """Whether the password was right and only the nonce was not: challenge with `stale` (RFC 7616 section 3.3)."""
        return self.reason in (DenialReason.STALE, DenialReason.REPLAYED)


@dataclass(frozen=True, slots=True)
class Credentials:
    """An Authorization or Proxy-Authorization value of the Digest scheme (RFC 7616 section 3.4), unquoted.

    `nc` is None and `cnonce` empty when there is no `qop`, as RFC 2069 had it.
    """

    username: str
    realm: str
    nonce: str
    uri: str
    response: str
    algorithm: str = "MD5"
    qop: str | None = None
    nc: str | None = None
    cnonce: str = ""

    @classmethod
    def parse(cls, text: str) -> Credentials:
        """Read a value.

        Raises:
            RemoteProtocolError: 400, another scheme, or a parameter is missing or malformed.
        """
        fields = _parse_digest(text)
        if fields is None:
            raise RemoteProtocolError(400, "not of the Digest scheme", "Authorization")
        return cls.of_fields(fields)

    @classmethod
    def of_fields(cls, fields: Mapping[str, str]) -> Credentials:
        """The credentials with these parameters, unquoted, by name in lower case.

        Raises:
            RemoteProtocolError: 400, a parameter is missing or malformed.
        """
        missing = [name for name in ("username", "realm", "nonce", "uri", "response") if name not in fields]
        if missing:
            raise RemoteProtocolError(400, f"no {missing[0]} parameter", "Authorization")
        qop = fields.get("qop")
        nc = fields.get("nc") if qop is not None else None
        if qop is not None and (
            qop.lower() != "auth" or not _NONCE_COUNT.fullmatch(nc or "") or "cnonce" not in fields
        ):
            raise RemoteProtocolError(400, "malformed qop, nc or cnonce", "Authorization")
        return cls(
            username=fields["username"],
            realm=fields["realm"],
            nonce=fields["nonce"],
            uri=fields["uri"],
            response=fields["response"].lower(),
            algorithm=fields.get("algorithm", "MD5").upper(),
            qop=qop,
            nc=nc,
            cnonce=fields.get("cnonce", ""),
        )


def expected_response(credentials: Credentials, method: str, ha1: str) -> str:
    """What `response` must be for a user with this `ha1` (RFC 7616 section 3.4.1)."""
    ha2 = _hash(credentials.algorithm, f"{method}:{credentials.uri}")
    middle = credentials.nonce
    if credentials.qop is not None:
        middle += f":{credentials.nc}:{credentials.cnonce}:{credentials.qop}"
    return _hash(credentials.algorithm, f"{ha1}:{middle}:{ha2}")


class DigestAuthenticator:
    """Challenges requests and verifies their credentials, for one realm.

    `secret` seals the nonces; with a new one all nonces at large are stale. Strongest algorithm first.

    Raises:
        ValueError: an algorithm is neither SHA-256 nor MD5.
    """

    def __init__(
        self,
        realm: str,
        secret: bytes,
        algorithms: Sequence[str] = ("SHA-256", "MD5"),
        nonce_lifetime_s: float = 300,
        max_remembered_nonces: int = MAX_REMEMBERED_NONCES,
    ) -> None:
        if not set(algorithms) <= {"SHA-256", "MD5"}:
            raise ValueError(f"unknown digest algorithm among {', '.join(algorithms)}")
        self.realm = realm
        self._secret = secret
        self._algorithms = tuple(algorithms)
        self._nonce_lifetime_s = nonce_lifetime_s
        self._max_remembered_nonces = max_remembered_nonces
        self._serial = count()
        self._decoy = hmac.digest(secret, b"password of nobody", "sha256").hex()
        self._counts: dict[str, tuple[float, int]] = {}
        self._forgotten_until = float("-inf")

    def challenges(self, now: float, *, stale: bool = False) -> list[str]:
        """Values for as many WWW-Authenticate or Proxy-Authenticate lines, to be sent in this order (RFC 8760)."""
        nonce = self._new_nonce(now)
        suffix = ", stale=true" if stale else ""
        return [
            f'Digest realm={quote(self.realm)}, nonce="{nonce}", algorithm={algorithm}, qop="auth"{suffix}'
            for algorithm in self._algorithms
        ]

    def verify(
        self,
        method: str,
        uri: str,
        authorization_values: Sequence[str],
        password_of: Callable[[str], Password | None],
        now: float,
    ) -> Verified | Denied:
        """Judge the credentials of a request with this method and Request-URI.

        Credentials for other realms and schemes are passed over. `password_of` gets the claimed username.
        """
        fields = self._select(authorization_values)
        if fields is None:
            return Denied(DenialReason.MISSING)
        claimed = fields.get("username")
        try:
            credentials = Credentials.of_fields(fields)
        except RemoteProtocolError:
            return Denied(DenialReason.MALFORMED, claimed)
        if credentials.algorithm not in self._algorithms or not _same_target(credentials.uri, uri):
            return Denied(DenialReason.MALFORMED, claimed)
        if not self._is_correct(credentials, method, password_of(credentials.username)):
            return Denied(DenialReason.WRONG, claimed)
        reason = self._spend(credentials, now)
        return Verified(credentials.username) if reason is None else Denied(reason, claimed)

    def _select(self, values: Iterable[str]) -> Mapping[str, str] | None:
        """The first credentials for our realm."""
        for value in values:
            fields = _parse_digest(value)
            if fields is not None and fields.get("realm") == self.realm:
                return fields
        return None

    def _is_correct(self, credentials: Credentials, method: str, password: Password | None) -> bool:
        """Compare `response`, with the same work whether there is a password or not."""
        algorithm = credentials.algorithm
        plain = None if password is None else password.plain
        prefix = f"{credentials.username}:{self.realm}:"
        derived = _hash(algorithm, prefix + (self._decoy if plain is None else plain))
        stored = None if password is None else password.ha1.get(algorithm)
        expected = expected_response(credentials, method, stored.lower() if stored else derived)
        return hmac.compare_digest(expected.encode(), credentials.response.encode("utf-8", "surrogateescape"))

    def _new_nonce(self, now: float) -> str:
        text = f"{int(now * 1000):x}.{next(self._serial):x}"
        return f"{text}.{self._seal(text)}"

    def _seal(self, text: str) -> str:
        return hmac.digest(self._secret, text.encode("utf-8", "surrogateescape"), "sha256")[:16].hex()

    def _issued_at(self, nonce: str) -> float | None:
        """When we issued `nonce`; None when we did not."""
        text, _, seal = nonce.rpartition(".")
        if not hmac.compare_digest(self._seal(text).encode(), seal.encode("utf-8", "surrogateescape")):
            return None
        return int(text.partition(".")[0], 16) / 1000

    def _spend(self, credentials: Credentials, now: float) -> DenialReason | None:
        """Use the nonce for this count, once. A nonce without counts (RFC 2069) is good for one request."""
        nonce = credentials.nonce
        issued_at = self._issued_at(nonce)
        if issued_at is None or not 0 <= now - issued_at < self._nonce_lifetime_s:
            self._counts.pop(nonce, None)
            return DenialReason.STALE
        nonce_count = 1 if credentials.nc is None else int(credentials.nc, 16)
        known = self._counts.get(nonce)
        if known is None:
            if issued_at <= self._forgotten_until:
                return DenialReason.STALE
            self._make_room(now)
        if nonce_count <= (0 if known is None else known[1]):
            return DenialReason.REPLAYED
        self._counts[nonce] = (issued_at, nonce_count)
        return None

    def _make_room(self, now: float) -> None:
        """Drop expired nonces, oldest use first, and one more if the table is still full.

        Whatever was issued up to then and is not in the table is refused from now on: its counts are not known.
        """
        while self._counts:
            nonce, (issued_at, _) = next(iter(self._counts.items()))
            is_expired = now - issued_at >= self._nonce_lifetime_s
            if not is_expired and len(self._counts) < self._max_remembered_nonces:
                break
            del self._counts[nonce]
            if not is_expired:
                self._forgotten_until = max(self._forgotten_until, issued_at)


def _parse_digest(text: str) -> dict[str, str] | None:
    """The parameters of a Digest value with names in lower case, the first of each name; None for another scheme."""
    scheme, _, rest = text.strip().partition(" ")
    if scheme.lower() != "digest":
        return None
    fields: dict[str, str] = {}
    for element in split_commas(rest):
        name, _, value = element.partition("=")
        fields.setdefault(name.strip().lower(), unquote_string(value.strip()))
    return fields


def _same_target(claimed: str, actual: str) -> bool:
    """Whether the digest's URI means the Request-URI.

    The host decides, and the user where it is given: peers differ in ports and parameters, and some name the server
    alone.
    """
    if claimed == actual:
        return True
    try:
        one, other = Uri.parse(claimed), Uri.parse(actual)
    except RemoteProtocolError:
        return False
    same_host = (one.host.lower(), one.opaque) == (other.host.lower(), other.opaque)
    return same_host and one.user in (None, other.user)
