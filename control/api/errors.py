"""What the service says no with; each face of it, gRPC and HTTP, has its own words for the kinds."""

from enum import StrEnum


class ApiErrorKind(StrEnum):
    """What sort of no it is, in gRPC's words."""

    INVALID_ARGUMENT = "invalid-argument"
    NOT_FOUND = "not-found"
    ALREADY_EXISTS = "already-exists"
    FAILED_PRECONDITION = "failed-precondition"
    RESOURCE_EXHAUSTED = "resource-exhausted"
    UNAVAILABLE = "unavailable"
    UNAUTHENTICATED = "unauthenticated"
    OUT_OF_RANGE = "out-of-range"
    INTERNAL = "internal"


class ApiError(Exception):
    """A request is refused.

    `reason` is for programs, in kebab-case, and part of the documented interface (docs/api.md). `detail` is for people:
    what was wrong and what to do.
    """

    def __init__(self, kind: ApiErrorKind, reason: str, detail: str, retry_after_s: int | None = None) -> None:
        super().__init__(f"{reason}: {detail}")
        self.kind = kind
        self.reason = reason
        self.detail = detail
        self.retry_after_s = retry_after_s


class ApiBindError(Exception):
    """An API cannot be served; the message names the address or the file and says why."""
