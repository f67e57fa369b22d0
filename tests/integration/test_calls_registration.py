"""Registration with SIPp, and with the scripted phone for SHA-256, which SIPp does not know."""

import pytest

from sippbx.softphone.errors import RefusedError
from sippbx.softphone.phone import Account, Phone
from tests.harness.pair import Pair
from tests.harness.stage import ALICE, CAROL, Stage

pytestmark = pytest.mark.integration


@pytest.mark.rfc("3261", "10.3")
async def test_binding_is_made_refreshed_and_removed(pair: Pair, stage: Stage) -> None:
    actor = await stage.actor("register_refresh_unregister", ALICE)
    await actor.finish()
    made, refreshed, removed = actor.received("REGISTER", 200)
    for answer in (made, refreshed):
        (contact,) = answer.get_all("Contact")
        assert f"sip:1001@{ALICE.host}:{ALICE.port}" in contact
        assert "expires=60" in contact
    assert removed.get_all("Contact") == []
    assert pair.metric("control", "sip_pbx_registrations") == 0


async def test_registration_is_counted_while_it_lasts(pair: Pair, stage: Stage) -> None:
    before = pair.metric("control", "sip_pbx_registrations")
    await stage.register(CAROL)
    assert pair.metric("control", "sip_pbx_registrations") == before + 1
    await (await stage.actor("register", CAROL, expires=0)).finish()
    assert pair.metric("control", "sip_pbx_registrations") == before


@pytest.mark.rfc("3261", "22.4")
async def test_wrong_password_registers_nobody(pair: Pair, stage: Stage) -> None:
    before = pair.metric("control", "sip_pbx_registrations")
    actor = await stage.actor("register_is_refused", CAROL, password="guess")
    await actor.finish()
    assert pair.metric("control", "sip_pbx_registrations") == before


@pytest.mark.rfc("3261", "10.3")
async def test_interval_that_is_too_brief_is_refused_with_the_least_one(pair: Pair) -> None:
    account = Account("1001", ALICE.password, pair.sip, algorithms=("MD5",))
    async with Phone(account, bind=(ALICE.host, ALICE.port)) as phone:
        with pytest.raises(RefusedError, match="423"):
            await phone.register(expires_s=5)
        assert phone.received[-1].require("Min-Expires") == "60"


@pytest.mark.rfc("8760", "2.1")
@pytest.mark.parametrize("algorithm", ["SHA-256", "MD5"])
async def test_phone_authenticates_with_either_algorithm(
    tmp_path_factory: pytest.TempPathFactory, algorithm: str
) -> None:
    with Pair(tmp_path_factory.mktemp("pair")) as pair:
        account = Account("1002", "secret-1002", pair.sip, algorithms=(algorithm,))
        async with Phone(account, bind=(ALICE.host, ALICE.port)) as phone:
            assert await phone.register(expires_s=120) == 120
            await phone.unregister()
        wrong = Account("1002", "guess", pair.sip, algorithms=(algorithm,))
        async with Phone(wrong, bind=(ALICE.host, ALICE.port)) as phone:
            with pytest.raises(RefusedError):
                await phone.register()
