"""Who asks: API keys, of which nothing but the SHA-256 is kept."""

from collections.abc import Sequence
from hashlib import sha256
from hmac import compare_digest

from control.api.errors import ApiError, ApiErrorKind
from control.settings.sections import ApiKeySettings

SCHEME = "bearer"


class ApiKeys:
    """The keys that open the APIs, each with the name of the program that has it."""

    def __init__(self, keys: Sequence[ApiKeySettings]) -> None:
        self._keys = tuple((key.name, _digest_of(key)) for key in keys)

    def client_of(self, authorization: str | None) -> str:
        """The name of the key in `Bearer KEY`, found in a time that does not tell how much of it was right.

        Raises:
            ApiError: there is none, or it is not one of ours.
        """
        scheme, _, credentials = (authorization or "").strip().partition(" ")
        key = credentials.strip()
        if scheme.lower() != SCHEME or not key:
            raise ApiError(
                ApiErrorKind.UNAUTHENTICATED, "no-api-key", "this needs an API key; send authorization: Bearer KEY"
            )
        given = sha256(key.encode("utf-8", "surrogatepass")).digest()
        client = None
        for name, digest in self._keys:
            if compare_digest(given, digest) and client is None:
                client = name
        if client is None:
            raise ApiError(
                ApiErrorKind.UNAUTHENTICATED, "wrong-api-key", "the API key is not one of api.keys of this node"
            )
        return client


def _digest_of(settings: ApiKeySettings) -> bytes:
    if settings.key is not None:
        return sha256(settings.key.get_secret_value().encode()).digest()
    # Settings have exactly one of the two.
    return b"" if settings.sha256 is None else bytes.fromhex(settings.sha256.get_secret_value())
