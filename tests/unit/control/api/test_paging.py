import contextlib
from base64 import urlsafe_b64encode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api.errors import ApiError, ApiErrorKind
from control.api.paging import MAX_PAGE_SIZE, page_limit, page_of, read_token, write_token

NUMBERS = [((f"{number:04}",), number) for number in range(2500)]


def test_pages_follow_each_other_without_a_gap() -> None:
    seen: list[int] = []
    token = ""
    sizes = []
    while True:
        page = page_of("numbers", reversed(NUMBERS), 1000, token)
        seen += page.items
        sizes.append(len(page.items))
        if not (token := page.next_page_token):
            break
    assert seen == list(range(2500))
    assert sizes == [1000, 1000, 500]


def test_page_that_ends_with_the_list_is_the_last() -> None:
    assert page_of("numbers", NUMBERS[:100], 100, "").next_page_token == ""


def test_what_comes_and_goes_between_two_pages_neither_repeats_nor_hides_others() -> None:
    first = page_of("numbers", NUMBERS[:10], 4, "")
    changed = [entry for entry in NUMBERS[:10] if entry[1] not in {0, 3, 4}] + [(("0000x",), -1)]
    assert page_of("numbers", changed, 100, first.next_page_token).items == (5, 6, 7, 8, 9)


def test_default_and_greatest_page_size() -> None:
    assert page_limit(0) == 100
    assert page_limit(MAX_PAGE_SIZE + 1) == MAX_PAGE_SIZE


def test_negative_page_size_is_refused() -> None:
    with pytest.raises(ApiError, match="bad-page-size"):
        page_limit(-1)


def test_token_is_safe_in_a_query() -> None:
    token = write_token("calls", ("2026-03-01T09:00:00.000000+00:00", "ÿ?>~"))
    assert token.replace("-", "").replace("_", "").isalnum()


def test_token_of_another_list_is_refused() -> None:
    with pytest.raises(ApiError) as refused:
        read_token("registrations:", write_token("calls", ("1",)))
    assert (refused.value.kind, refused.value.reason) == (ApiErrorKind.INVALID_ARGUMENT, "bad-page-token")


def _encoded(text: str) -> str:
    return urlsafe_b64encode(text.encode()).rstrip(b"=").decode()


@pytest.mark.parametrize(
    "token",
    [
        "!",
        "a",
        "ä",
        _encoded("x"),
        _encoded("1"),
        _encoded("{}"),
        _encoded("[]"),
        _encoded('["calls"]'),
        _encoded('["calls", 1]'),
        _encoded('["calls", ["1"]]'),
        _encoded("[" * 300),
        _encoded('["calls", "' + "1" * 1000 + '"]'),
    ],
)
def test_malformed_token_is_refused(token: str) -> None:
    with pytest.raises(ApiError, match="bad-page-token"):
        read_token("calls", token)


@given(st.text(max_size=600))
def test_no_token_is_worse_than_refused(token: str) -> None:
    with contextlib.suppress(ApiError):
        read_token("calls", token)
