from hashlib import sha256

import pytest
from pydantic import SecretStr

from control.api.auth import ApiKeys
from control.api.errors import ApiError, ApiErrorKind
from control.settings.sections import ApiKeySettings

KEY = "0123456789abcdef0123"
OTHER_KEY = "fedcba9876543210fedc"


@pytest.fixture
def keys() -> ApiKeys:
    return ApiKeys(
        [
            ApiKeySettings(name="dialler", key=SecretStr(KEY)),
            ApiKeySettings(name="billing", sha256=SecretStr(sha256(OTHER_KEY.encode()).hexdigest().upper())),
        ]
    )


@pytest.mark.parametrize("authorization", [f"Bearer {KEY}", f"bearer {KEY}", f"  BEARER   {KEY} "])
def test_key_is_known_by_its_name(keys: ApiKeys, authorization: str) -> None:
    assert keys.client_of(authorization) == "dialler"


def test_key_of_which_only_the_hash_is_configured_is_known(keys: ApiKeys) -> None:
    assert keys.client_of(f"Bearer {OTHER_KEY}") == "billing"


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer  ", KEY, f"Basic {KEY}", f"Bearer{KEY}"])
def test_request_without_a_key_is_told_to_send_one(keys: ApiKeys, authorization: str | None) -> None:
    with pytest.raises(ApiError) as refused:
        keys.client_of(authorization)
    assert (refused.value.kind, refused.value.reason) == (ApiErrorKind.UNAUTHENTICATED, "no-api-key")
    assert "Bearer" in refused.value.detail


@pytest.mark.parametrize(
    "key",
    [KEY[:-1], KEY + "0", KEY.upper(), f"{KEY} {KEY}", "dialler", sha256(OTHER_KEY.encode()).hexdigest(), "\udcff"],
)
def test_wrong_key_is_refused_and_not_repeated(keys: ApiKeys, key: str) -> None:
    with pytest.raises(ApiError) as refused:
        keys.client_of(f"Bearer {key}")
    assert (refused.value.kind, refused.value.reason) == (ApiErrorKind.UNAUTHENTICATED, "wrong-api-key")
    assert key not in refused.value.detail


def test_without_configured_keys_nobody_gets_in() -> None:
    with pytest.raises(ApiError, match="wrong-api-key"):
        ApiKeys([]).client_of(f"Bearer {KEY}")


def test_keys_themselves_are_not_kept(keys: ApiKeys) -> None:
    assert KEY not in repr(vars(keys))
