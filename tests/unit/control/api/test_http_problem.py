"""What becomes of a refusal over HTTP."""

import json

import pytest

from control.api.errors import ApiError, ApiErrorKind
from control.api.problem import of_api_error


@pytest.mark.parametrize("kind", ApiErrorKind)
def test_every_kind_of_refusal_has_an_error_status(kind: ApiErrorKind) -> None:
    assert 400 <= of_api_error(ApiError(kind, "for-a-reason", "in detail")).status < 600


def test_problem_names_its_type_by_the_reason() -> None:
    response = of_api_error(ApiError(ApiErrorKind.NOT_FOUND, "no-such-call", "no call 1 runs")).response("/v1/calls/1")
    assert response.content_type == "application/problem+json"
    assert isinstance(response.body, bytes)
    assert json.loads(response.body) == {
        "type": "urn:sippbx:problem:no-such-call",
        "title": "No such call",
        "status": 404,
        "detail": "no call 1 runs",
        "instance": "/v1/calls/1",
    }


def test_detail_that_is_no_unicode_is_told_all_the_same() -> None:
    response = of_api_error(ApiError(ApiErrorKind.ALREADY_EXISTS, "in-use", "from \udcff")).response("/\udcfe")
    assert isinstance(response.body, bytes)
    assert json.loads(response.body)["detail"] == "from \N{REPLACEMENT CHARACTER}"


def test_only_a_refusal_that_passes_says_when_to_come_back() -> None:
    passing = of_api_error(ApiError(ApiErrorKind.UNAVAILABLE, "draining", "it stops", retry_after_s=10))
    lasting = of_api_error(ApiError(ApiErrorKind.NOT_FOUND, "no-such-call", "none"))
    assert passing.headers == {"Retry-After": "10"}
    assert not lasting.headers
