"""Pages of lists, and the tokens that lead from one to the next.

A token says which list it belongs to and the position of the last item that was given, so that items which come and go
between two pages neither repeat nor hide others. It is opaque to clients and holds no secret.
"""

import binascii
import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from control.api.errors import ApiError, ApiErrorKind

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
MAX_TOKEN_CHARACTERS = 512

Position = tuple[str, ...]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Some items of a list; `next_page_token` is empty on the last page."""

    items: tuple[T, ...]
    next_page_token: str


def page_limit(page_size: int) -> int:
    """How many items a client gets that asks for `page_size`, 0 being the default.

    Raises:
        ApiError: it is negative.
    """
    if page_size < 0:
        raise ApiError(ApiErrorKind.INVALID_ARGUMENT, "bad-page-size", f"page_size {page_size} is negative")
    return min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)


def page_of(kind: str, positions: Iterable[tuple[Position, T]], page_size: int, page_token: str) -> Page[T]:
    """One page of a list that is at hand as a whole: its items, each with a unique key that orders them.

    Raises:
        ApiError: the size is negative, or the token is not of this list.
    """
    limit = page_limit(page_size)
    behind = read_token(kind, page_token)
    rest = sorted((entry for entry in positions if entry[0] > behind), key=lambda entry: entry[0])
    items = tuple(item for _, item in rest[:limit])
    return Page(items, write_token(kind, rest[limit - 1][0]) if len(rest) > limit else "")


def write_token(kind: str, position: Position) -> str:
    """The token of the page behind `position`."""
    text = json.dumps([kind, *position], separators=(",", ":"))
    return urlsafe_b64encode(text.encode()).rstrip(b"=").decode()


def read_token(kind: str, token: str) -> Position:
    """The position behind which the page begins; empty for the first page.

    Raises:
        ApiError: it is not a token of this list.
    """
    if not token:
        return ()
    try:
        if len(token) > MAX_TOKEN_CHARACTERS or not token.isascii():
            raise ValueError(token[:MAX_TOKEN_CHARACTERS])
        values = json.loads(urlsafe_b64decode(token + "=" * (-len(token) % 4)))
    except (binascii.Error, ValueError, RecursionError):
        values = None
    match values:
        case [str(known), *position] if known == kind and position and all(isinstance(part, str) for part in position):
            return tuple(position)
        case _:
            raise ApiError(
                ApiErrorKind.INVALID_ARGUMENT,
                "bad-page-token",
                "the page token is not of this list; give next_page_token of the page before, or none to begin anew",
            )
