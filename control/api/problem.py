"""Errors of the HTTP API as problem details (RFC 9457).

type          urn:sippbx:problem:REASON; REASON is in kebab-case, and what a program should look at
title         the reason in words
status        the HTTP status
detail        for people: what was wrong and what to do
instance      the path of the request, or urn:sippbx:error:ID when the node failed; its log has the ID
"""

from collections.abc import Mapping

from aiohttp import hdrs, web

from control.api.documents import dump, valid_unicode
from control.api.errors import ApiError, ApiErrorKind

CONTENT_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:sippbx:problem:"
ERROR_PREFIX = "urn:sippbx:error:"
CHALLENGE = 'Bearer realm="sippbx"'

STATUS_OF_KIND: Mapping[ApiErrorKind, int] = {
    ApiErrorKind.INVALID_ARGUMENT: 400,
    ApiErrorKind.OUT_OF_RANGE: 400,
    ApiErrorKind.UNAUTHENTICATED: 401,
    ApiErrorKind.NOT_FOUND: 404,
    ApiErrorKind.ALREADY_EXISTS: 409,
    ApiErrorKind.FAILED_PRECONDITION: 422,
    ApiErrorKind.RESOURCE_EXHAUSTED: 429,
    ApiErrorKind.INTERNAL: 500,
    ApiErrorKind.UNAVAILABLE: 503,
}


class Problem(Exception):  # noqa: N818 -- the RFC's word
    """Why a request is refused. `closes` ends the connection: what follows on it cannot be trusted, or is not read."""

    def __init__(
        self,
        status: int,
        reason: str,
        detail: str,
        headers: Mapping[str, str] | None = None,
        *,
        closes: bool = False,
    ) -> None:
        super().__init__(f"{status} {reason}: {detail}")
        self.status = status
        self.reason = reason
        self.detail = detail
        self.headers = headers
        self.closes = closes

    def response(self, instance: str) -> web.Response:
        """The answer to the request that `instance` names."""
        document = {
            "type": TYPE_PREFIX + self.reason,
            "title": self.reason.replace("-", " ").capitalize(),
            "status": self.status,
            "detail": valid_unicode(self.detail),
            "instance": valid_unicode(instance),
        }
        response = web.Response(
            status=self.status, body=dump(document), content_type=CONTENT_TYPE, headers=self.headers
        )
        if self.closes:
            response.force_close()
        return response


def of_api_error(error: ApiError) -> Problem:
    """What the service refused."""
    headers: dict[str, str] = {}
    if error.kind is ApiErrorKind.UNAUTHENTICATED:
        headers[hdrs.WWW_AUTHENTICATE] = CHALLENGE
    if error.retry_after_s is not None:
        headers[hdrs.RETRY_AFTER] = str(error.retry_after_s)
    return Problem(STATUS_OF_KIND[error.kind], error.reason, error.detail, headers)


def of_http_exception(error: web.HTTPException, method: str) -> Problem:
    """What aiohttp refused: paths and methods that there are not, bodies that are too long."""
    match error:
        case web.HTTPNotFound():
            return Problem(404, "unknown-path", "there is nothing at this path")
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            return Problem(
                405, "method-not-allowed", f"{method} is not allowed here, {allowed} is", {hdrs.ALLOW: allowed}
            )
        case web.HTTPRequestEntityTooLarge():
            return Problem(413, "body-too-large", error.text or "the body is too long", closes=True)
        case _:
            return Problem(error.status, "bad-request", error.reason, closes=True)
