"""Digest authentication: the RFCs' own examples, every way to be refused, and what must not leak."""

import hashlib
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.sip import digest
from control.sip.digest import (
    Credentials,
    DenialReason,
    Denied,
    DigestAuthenticator,
    Password,
    Verified,
    expected_response,
)
from control.sip.errors import RemoteProtocolError
from control.sip.headers import quote

REALM = "example.test"
URI = "sip:example.test"
NOW = 5000.0


def hexdigest(algorithm: str, text: str) -> str:
    return hashlib.new(algorithm.replace("-", ""), text.encode("utf-8", "surrogateescape")).hexdigest()


def users(username: str) -> Password | None:
    return {"1001": Password("secret"), 'we"ird\\': Password("pässword")}.get(username)


def nonce_of(challenge: str) -> str:
    match = re.search(r'nonce="([^"]+)"', challenge)
    assert match is not None
    return match[1]


def authorization(
    nonce: str,
    *,
    username: str = "1001",
    password: str = "secret",
    method: str = "REGISTER",
    uri: str = URI,
    realm: str = REALM,
    algorithm: str = "SHA-256",
    nc: str | None = "00000001",
    cnonce: str = "0a4f113b",
) -> str:
    """The Authorization value of a client, computed apart from the code under test."""
    ha1 = hexdigest(algorithm, f"{username}:{realm}:{password}")
    ha2 = hexdigest(algorithm, f"{method}:{uri}")
    middle = nonce if nc is None else f"{nonce}:{nc}:{cnonce}:auth"
    response = hexdigest(algorithm, f"{ha1}:{middle}:{ha2}")
    text = (
        f'Digest username={quote(username)},realm="{realm}", nonce="{nonce}", uri="{uri}",'
        f' response="{response}", algorithm={algorithm}'
    )
    return text if nc is None else f'{text}, qop=auth, nc={nc}, cnonce="{cnonce}"'


@pytest.fixture
def authenticator() -> DigestAuthenticator:
    return DigestAuthenticator(REALM, b"seal", nonce_lifetime_s=300)


def verify(
    authenticator: DigestAuthenticator,
    *values: str,
    method: str = "REGISTER",
    uri: str = URI,
    password_of: Callable[[str], Password | None] = users,
    now: float = NOW,
) -> Verified | Denied:
    return authenticator.verify(method, uri, values, password_of, now)


# -------------------------------------------------------------------------------------------------- the RFCs' examples


@pytest.mark.rfc("7616", "3.9.1")
@pytest.mark.parametrize(
    ("algorithm", "response"),
    [
        ("MD5", "8ca523f5e9506fed4657c9700eebdbec"),
        ("SHA-256", "753927fa0e85d155564e2e272a28d1802ca10daf4496794697cf8db5856cb6c1"),
    ],
)
def test_example_of_the_rfc_gives_its_response(algorithm: str, response: str) -> None:
    credentials = Credentials.parse(
        'Digest username="Mufasa", realm="http-auth@example.org", uri="/dir/index.html",'
        f' algorithm={algorithm}, nonce="7ypf/xlj9XXwfDPEoM4URrv/xwf94BcCAzFZH4GiTo0v", nc=00000001,'
        f' cnonce="f2/wE4q74E6zIJEtWaHKaf5wv/H5QzzpXusqGemxURZJ", qop=auth, response="{response}"'
    )
    ha1 = hexdigest(algorithm, "Mufasa:http-auth@example.org:Circle of Life")
    assert expected_response(credentials, "GET", ha1) == response == credentials.response


# --------------------------------------------------------------------------------------------------------- challenges


@pytest.mark.rfc("8760", "2.4")
def test_strongest_algorithm_is_offered_first(authenticator: DigestAuthenticator) -> None:
    sha256, md5 = authenticator.challenges(NOW)
    assert re.fullmatch(r'Digest realm="example\.test", nonce="[0-9a-f.]+", algorithm=SHA-256, qop="auth"', sha256)
    assert md5 == sha256.replace("SHA-256", "MD5")


@pytest.mark.rfc("7616", "3.3")
def test_stale_challenge_says_so(authenticator: DigestAuthenticator) -> None:
    assert all(value.endswith(", stale=true") for value in authenticator.challenges(NOW, stale=True))


def test_nonces_are_never_the_same(authenticator: DigestAuthenticator) -> None:
    assert len({nonce_of(authenticator.challenges(NOW)[0]) for _ in range(100)}) == 100


def test_unknown_algorithm_is_a_mistake_of_configuration() -> None:
    with pytest.raises(ValueError, match="SHA-1"):
        DigestAuthenticator(REALM, b"seal", algorithms=("SHA-1",))


# ----------------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.rfc("3261", "22.4")
@pytest.mark.parametrize("algorithm", ["SHA-256", "MD5"])
def test_right_password_is_verified(authenticator: DigestAuthenticator, algorithm: str) -> None:
    value = authorization(nonce_of(authenticator.challenges(NOW)[0]), algorithm=algorithm)
    assert verify(authenticator, value) == Verified("1001")


def test_algorithm_is_md5_when_not_stated(authenticator: DigestAuthenticator) -> None:
    value = authorization(nonce_of(authenticator.challenges(NOW)[0]), algorithm="MD5")
    assert verify(authenticator, value.replace(", algorithm=MD5", "")) == Verified("1001")


def test_names_and_hexadecimal_are_read_without_case(authenticator: DigestAuthenticator) -> None:
    value = authorization(nonce_of(authenticator.challenges(NOW)[0]))
    response = re.search(r'response="([^"]+)"', value)
    assert response is not None
    value = value.replace(response[1], response[1].upper()).replace("Digest username", "DIGEST  USERNAME")
    assert verify(authenticator, value.replace("algorithm=SHA-256", "Algorithm = sha-256")) == Verified("1001")


def test_unusual_usernames_and_passwords_are_read(authenticator: DigestAuthenticator) -> None:
    value = authorization(nonce_of(authenticator.challenges(NOW)[0]), username='we"ird\\', password="pässword")
    assert verify(authenticator, value) == Verified('we"ird\\')


@pytest.mark.parametrize("algorithm", ["SHA-256", "MD5"])
def test_stored_hash_does_instead_of_a_password(authenticator: DigestAuthenticator, algorithm: str) -> None:
    value = authorization(nonce_of(authenticator.challenges(NOW)[0]), algorithm=algorithm)
    stored = Password(ha1={algorithm: hexdigest(algorithm, f"1001:{REALM}:secret").upper()})
    assert verify(authenticator, value, password_of=lambda _: stored) == Verified("1001")
    other = Password(ha1={"none": "0" * 32})
    assert verify(authenticator, value, password_of=lambda _: other) == Denied(DenialReason.WRONG, "1001")


@pytest.mark.parametrize("values", [(), ("Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==",), ("",), ("Digest",)])
def test_request_without_credentials_for_us_lacks_them(
    authenticator: DigestAuthenticator, values: tuple[str, ...]
) -> None:
    assert verify(authenticator, *values) == Denied(DenialReason.MISSING)


@pytest.mark.rfc("3261", "22.3")
def test_credentials_for_other_realms_are_passed_over(authenticator: DigestAuthenticator) -> None:
    nonce = nonce_of(authenticator.challenges(NOW)[0])
    other = authorization(nonce, realm="elsewhere")
    assert verify(authenticator, other) == Denied(DenialReason.MISSING)
    assert verify(authenticator, other, authorization(nonce)) == Verified("1001")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('username="1001"', "x=y"),
        ("nonce=", "nounce="),
        ("response=", "respond="),
        ("uri=", "url="),
        ("qop=auth", "qop=auth-int"),
        ("nc=00000001", "nc=1"),
        ("nc=00000001", "nc=0000000g"),
        ("nc=00000001", "nc=000000001"),
        ("nc=00000001, ", ""),
        ("cnonce=", "cnounce="),
        ("algorithm=SHA-256", "algorithm=SHA-512-256"),
        ("algorithm=SHA-256", "algorithm=MD5-sess"),
    ],
)
def test_malformed_credentials_are_told_apart_from_wrong_ones(
    authenticator: DigestAuthenticator, old: str, new: str
) -> None:
    value = authorization(nonce_of(authenticator.challenges(NOW)[0]))
    assert old in value
    verdict = verify(authenticator, value.replace(old, new))
    assert isinstance(verdict, Denied)
    assert verdict.reason is DenialReason.MALFORMED
    assert verdict.username == (None if "username" in old else "1001")
    assert not verdict.is_stale


def test_algorithm_that_was_not_offered_is_refused() -> None:
    authenticator = DigestAuthenticator(REALM, b"seal", algorithms=("SHA-256",))
    value = authorization(nonce_of(authenticator.challenges(NOW)[0]), algorithm="MD5")
    assert verify(authenticator, value) == Denied(DenialReason.MALFORMED, "1001")


@pytest.mark.rfc("7616", "3.4.6")
@pytest.mark.parametrize(
    ("claimed", "actual", "accepted"),
    [
        ("sip:example.test", "sip:example.test", True),
        ("sip:example.test", "sip:EXAMPLE.test:5060;transport=udp", True),
        ("sip:1002@example.test", "sip:1002@example.test;user=phone", True),
        ("sip:1002@example.test", "sip:900555@example.test", False),
        ("sip:1002@example.test", "sip:1002@elsewhere.test", False),
        ("tel:1", "tel:2", False),
        ("*", "sip:example.test", False),
        ("*", "*", True),
    ],
)
def test_credentials_are_good_for_their_target_alone(
    authenticator: DigestAuthenticator, claimed: str, actual: str, accepted: bool
) -> None:
    value = authorization(nonce_of(authenticator.challenges(NOW)[0]), uri=claimed)
    expected = Verified("1001") if accepted else Denied(DenialReason.MALFORMED, "1001")
    assert verify(authenticator, value, uri=actual) == expected


def test_credentials_are_good_for_their_method_alone(authenticator: DigestAuthenticator) -> None:
    value = authorization(nonce_of(authenticator.challenges(NOW)[0]))
    assert verify(authenticator, value, method="INVITE") == Denied(DenialReason.WRONG, "1001")


# --------------------------------------------------------------------------------------------------- nothing may leak


def test_unknown_user_and_wrong_password_get_the_same_verdict(authenticator: DigestAuthenticator) -> None:
    nonce = nonce_of(authenticator.challenges(NOW)[0])
    wrong = verify(authenticator, authorization(nonce, password="guess"))
    unknown = verify(authenticator, authorization(nonce, username="9999", password="guess"))
    assert (wrong, unknown) == (Denied(DenialReason.WRONG, "1001"), Denied(DenialReason.WRONG, "9999"))
    late = NOW + 1000
    assert verify(authenticator, authorization(nonce, password="guess"), now=late) == wrong
    assert verify(authenticator, authorization(nonce, username="9999", password="guess"), now=late) == unknown


@pytest.mark.parametrize(
    "password",
    [None, Password(), Password("secret"), Password(ha1={"SHA-256": "0" * 64}), Password("secret", {"MD5": "0"})],
)
def test_the_same_hashes_are_computed_for_everybody(
    authenticator: DigestAuthenticator, monkeypatch: pytest.MonkeyPatch, password: Password | None
) -> None:
    calls: list[str] = []
    real = digest._hash

    def counted(algorithm: str, text: str) -> str:
        calls.append(algorithm)
        return real(algorithm, text)

    monkeypatch.setattr(digest, "_hash", counted)
    value = authorization(nonce_of(authenticator.challenges(NOW)[0]), password="guess")
    assert verify(authenticator, value, password_of=lambda _: password) == Denied(DenialReason.WRONG, "1001")
    assert calls == ["SHA-256"] * 3


def test_nobody_can_log_in_with_the_decoy_of_another_secret() -> None:
    one, other = DigestAuthenticator(REALM, b"one"), DigestAuthenticator(REALM, b"other")
    assert one._decoy != other._decoy


def test_password_does_not_show_in_its_representation() -> None:
    assert "secret" not in repr(Password("secret", {"MD5": "secret"}))


# ------------------------------------------------------------------------------------------------------------- nonces


@pytest.mark.rfc("7616", "3.4.5")
def test_each_count_of_a_nonce_is_good_once(authenticator: DigestAuthenticator) -> None:
    nonce = nonce_of(authenticator.challenges(NOW)[0])
    first, second = (authorization(nonce, nc=nc) for nc in ("00000001", "0000000A"))
    assert verify(authenticator, first) == Verified("1001")
    assert verify(authenticator, first) == Denied(DenialReason.REPLAYED, "1001")
    assert verify(authenticator, second) == Verified("1001")
    assert verify(authenticator, first) == Denied(DenialReason.REPLAYED, "1001")
    assert verify(authenticator, second) == Denied(DenialReason.REPLAYED, "1001")
    assert Denied(DenialReason.REPLAYED).is_stale


def test_count_zero_was_never_to_be_used(authenticator: DigestAuthenticator) -> None:
    value = authorization(nonce_of(authenticator.challenges(NOW)[0]), nc="00000000")
    assert verify(authenticator, value) == Denied(DenialReason.REPLAYED, "1001")


def test_nonce_without_counts_is_good_for_one_request(authenticator: DigestAuthenticator) -> None:
    value = authorization(nonce_of(authenticator.challenges(NOW)[0]), nc=None)
    assert verify(authenticator, value) == Verified("1001")
    assert verify(authenticator, value) == Denied(DenialReason.REPLAYED, "1001")


@pytest.mark.rfc("7616", "3.3")
def test_nonce_grows_stale_with_age(authenticator: DigestAuthenticator) -> None:
    nonce = nonce_of(authenticator.challenges(NOW)[0])
    assert verify(authenticator, authorization(nonce), now=NOW + 299.9) == Verified("1001")
    late = verify(authenticator, authorization(nonce, nc="00000002"), now=NOW + 300)
    assert late == Denied(DenialReason.STALE, "1001")
    assert late.is_stale


@pytest.mark.parametrize("nonce", ["", ".", "x.y.z", "1388.0.00000000000000000000000000000000", "é", "ff" * 16])
def test_nonce_that_is_not_ours_is_stale(authenticator: DigestAuthenticator, nonce: str) -> None:
    assert verify(authenticator, authorization(nonce)) == Denied(DenialReason.STALE, "1001")


def test_nonce_of_another_secret_or_of_the_future_is_stale(authenticator: DigestAuthenticator) -> None:
    foreign = nonce_of(DigestAuthenticator(REALM, b"other").challenges(NOW)[0])
    assert verify(authenticator, authorization(foreign)) == Denied(DenialReason.STALE, "1001")
    future = nonce_of(authenticator.challenges(NOW + 10)[0])
    assert verify(authenticator, authorization(future)) == Denied(DenialReason.STALE, "1001")


def test_wrong_answers_do_not_use_up_a_nonce_or_memory(authenticator: DigestAuthenticator) -> None:
    nonce = nonce_of(authenticator.challenges(NOW)[0])
    assert verify(authenticator, authorization(nonce, password="guess")) == Denied(DenialReason.WRONG, "1001")
    assert not authenticator._counts
    assert verify(authenticator, authorization(nonce)) == Verified("1001")


def test_memory_of_nonces_is_bounded_and_forgetting_never_opens_a_replay() -> None:
    authenticator = DigestAuthenticator(REALM, b"seal", nonce_lifetime_s=300, max_remembered_nonces=3)
    nonces = [nonce_of(authenticator.challenges(NOW + i)[0]) for i in range(6)]
    now = NOW + 10
    for nonce in nonces[:5]:
        assert verify(authenticator, authorization(nonce), now=now) == Verified("1001")
        assert len(authenticator._counts) <= 3
    for nonce in nonces[:2]:
        assert verify(authenticator, authorization(nonce), now=now) == Denied(DenialReason.STALE, "1001")
    for nonce in nonces[2:5]:
        assert verify(authenticator, authorization(nonce), now=now) == Denied(DenialReason.REPLAYED, "1001")
        assert verify(authenticator, authorization(nonce, nc="00000002"), now=now) == Verified("1001")
    assert verify(authenticator, authorization(nonces[5]), now=now) == Verified("1001")


def test_expired_nonces_are_forgotten_without_harm_to_younger_ones(authenticator: DigestAuthenticator) -> None:
    old = nonce_of(authenticator.challenges(NOW)[0])
    young = nonce_of(authenticator.challenges(NOW + 200)[0])
    assert verify(authenticator, authorization(old)) == Verified("1001")
    assert verify(authenticator, authorization(young), now=NOW + 400) == Verified("1001")
    assert list(authenticator._counts) == [young]
    assert verify(authenticator, authorization(old), now=NOW + 400) == Denied(DenialReason.STALE, "1001")


# -------------------------------------------------------------------------------------------------------- credentials


@pytest.mark.parametrize("text", ["", "Basic x", "Digest", "Digest username", "Digest ,,=,"])
def test_text_that_is_no_credentials_is_refused(text: str) -> None:
    with pytest.raises(RemoteProtocolError) as refusal:
        Credentials.parse(text)
    assert refusal.value.status == 400


@given(st.text('Digest =",\\usernacopq0auth-\udcff ', max_size=80))
def test_no_value_makes_the_verifier_raise(text: str) -> None:
    authenticator = DigestAuthenticator(REALM, b"seal")
    for value in (
        text,
        f'Digest realm="{REALM}",{text}',
        f"{authorization('x')},{text}",
        f"{text},{authorization('x')}",
    ):
        assert isinstance(verify(authenticator, value), Denied)
