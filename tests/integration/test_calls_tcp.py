"""Calls over TCP and TLS: SIPp at one end or both, and a phone that loses its connection."""

import asyncio
import signal
import ssl
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import trustme

from sippbx.softphone.message import SipMessage
from tests.harness.messages import sdp
from tests.harness.pair import HOST, TRUNK_HOST, TRUNK_PORT, USERS, Pair
from tests.harness.sipp import Actor
from tests.harness.stage import ALICE, BOB, CAROL, TRUNK, Scene, Stage, termination
from tests.harness.tcp_phone import TcpPhone
from tests.integration.conftest import SIPP_SETTINGS

pytestmark = pytest.mark.integration

BOBS_NUMBER = "+8225550100"


@pytest.fixture
def own_pair(tmp_path: Path) -> Iterator[Pair]:
    """A pair for one test, with trunk and listeners as it wants them; the test starts it."""
    with Pair(tmp_path / "pair", control=SIPP_SETTINGS) as started:
        yield started


def phone(pair: Pair, tls: ssl.SSLContext | None = None) -> TcpPhone:
    """Carol's: Bob has one that speaks UDP."""
    return TcpPhone(CAROL.user, USERS[CAROL.user], host=CAROL.host, pbx=pair.sip, tls=tls)


async def called(stage: Stage, carol: TcpPhone) -> tuple[Actor, SipMessage]:
    """The trunk, which talks until it is cued, and the INVITE that the phone has answered."""
    caller = await stage.actor("trunk_caller_talks_until_cue", TRUNK, dials=CAROL.user)
    invite = await carol.receive("INVITE")
    carol.answer(invite, 180, "Ringing")
    carol.answer(invite, 200, "OK", body=sdp(CAROL.host).decode())
    await carol.receive("ACK")
    await caller.until_sent("ACK")
    return caller, invite


async def hung_up(stage: Stage, caller: Actor, carol: TcpPhone) -> None:
    """Let the trunk hang up; the phone must hear of it."""
    caller.cue()
    carol.answer(await carol.receive("BYE"), 200, "OK")
    await caller.finish()
    assert termination(await stage.cdr()) == ("answered", "hangup", 200)


# ---- SIPp ------------------------------------------------------------------------------------------------------------


async def test_a_call_over_tcp_is_answered_over_udp_and_hung_up_over_its_connection(stage: Stage) -> None:
    await stage.register(BOB)
    callee = await stage.actor("callee_hangs_up_on_cue", BOB)
    caller = await stage.actor("trunk_caller_is_hung_up", TRUNK, dials=BOBS_NUMBER, tcp=True)
    scene = Scene(stage, caller, callee, TRUNK, BOB)
    await callee.until_received("ACK")
    callee.cue()
    await scene.finish()
    scene.check_legs_are_separate()
    assert termination(await stage.cdr()) == ("answered", "hangup", 200)
    assert caller.received("INVITE", 200)[0].require("Contact").endswith(";transport=tcp>")
    assert "transport" not in callee.received("INVITE")[0].require("Contact")


async def test_a_call_may_be_cancelled_over_tcp(stage: Stage) -> None:
    await stage.register(BOB)
    callee = await stage.actor("callee_rings_until_cancelled", BOB)
    caller = await stage.actor("cancel_while_ringing", TRUNK, dials=BOBS_NUMBER, tcp=True)
    await Scene(stage, caller, callee, TRUNK, BOB).finish()
    assert termination(await stage.cdr())[0] == "cancelled"


async def test_a_user_is_challenged_and_refused_over_tcp(stage: Stage) -> None:
    caller = await stage.actor("caller_is_refused", ALICE, dials="5551234", tcp=True)
    await caller.finish()
    assert caller.final_status == 404
    assert termination(await stage.cdr()) == ("rejected", "unknown-number", 404)


async def test_a_trunk_over_tcp_is_called_over_one_connection(tmp_path: Path) -> None:
    trunk = {"name": "carrier", "destination": f"{TRUNK_HOST}:{TRUNK_PORT}", "transport": "tcp"}
    with Pair(tmp_path / "pair", control={**SIPP_SETTINGS, "trunks": [trunk]}) as pair:
        async with Stage(pair, tmp_path) as stage:
            await stage.register(ALICE)
            callee = await stage.actor("callee_answers", TRUNK, tcp=True)
            caller = await stage.actor("caller_talks_until_cue", ALICE, dials="915550002222")
            scene = Scene(stage, caller, callee, ALICE, TRUNK)
            await scene.talk()
            await scene.hang_up()
            scene.check_legs_are_separate()
            assert termination(await stage.cdr()) == ("answered", "hangup", 200)
        assert pair.metric("control", "sip_pbx_sip_socket_events_total", event="connections_opened") == 1


async def test_a_trunk_that_takes_no_connection_fails_the_call_at_once(tmp_path: Path) -> None:
    trunk = {"name": "carrier", "destination": f"{TRUNK_HOST}:{TRUNK_PORT}", "transport": "tcp"}
    with Pair(tmp_path / "pair", control={**SIPP_SETTINGS, "trunks": [trunk]}) as pair:
        async with Stage(pair, tmp_path) as stage:
            caller = await stage.actor("caller_is_refused", ALICE, dials="915550002222")
            await caller.finish()
            cdr = await stage.cdr()
            assert termination(cdr)[:2] == ("failed", "callee-unreachable")
            # Timer B would take 6.4 s here.
            assert cdr["setup_s"] < 3


# ---- a phone by hand -------------------------------------------------------------------------------------------------


async def test_a_phone_is_called_over_the_connection_that_it_registered_on(stage: Stage) -> None:
    async with phone(stage.pair) as carol:
        await carol.register()
        caller, invite = await called(stage, carol)
        assert invite.require("Via").startswith(f"SIP/2.0/TCP {HOST}:{stage.pair.sip[1]};")
        await hung_up(stage, caller, carol)


async def test_a_phone_whose_connection_is_gone_cannot_be_called_until_it_registers_again(stage: Stage) -> None:
    carol = phone(stage.pair)
    async with carol:
        await carol.register()
    refused = await stage.actor("trunk_caller_is_refused", TRUNK, dials=CAROL.user)
    await refused.finish()
    assert refused.final_status == 480
    assert termination(await stage.cdr()) == ("rejected", "not-registered", 480)
    async with carol:
        await carol.register()
        caller, _ = await called(stage, carol)
        await hung_up(stage, caller, carol)


async def test_a_call_goes_on_over_the_connection_by_which_its_phone_comes_back(stage: Stage) -> None:
    async with phone(stage.pair) as carol:
        await carol.register()
        caller, _ = await called(stage, carol)
        await carol.disconnect()
        await carol.connect()
        await carol.register()
        await hung_up(stage, caller, carol)


async def test_a_call_over_tcp_outlives_a_killed_control_plane(own_pair: Pair, tmp_path: Path) -> None:
    async with Stage(own_pair, tmp_path) as stage, phone(own_pair) as carol:
        await carol.register()
        caller, _ = await called(stage, carol)
        await asyncio.sleep(0.2)
        psutil.Process(own_pair.pids("control")[1]).send_signal(signal.SIGKILL)
        await carol.until_disconnected()
        # At once: the connection waits in the socket for the next process.
        await carol.connect()
        await carol.register()
        await hung_up(stage, caller, carol)


async def test_over_tls_certificates_are_replaced_on_sighup_while_a_call_goes_on(tmp_path: Path) -> None:
    authority = trustme.CA()

    def certify() -> int:
        issued = authority.issue_cert(HOST)
        issued.private_key_pem.write_to_path(tmp_path / "tls.key")
        (tmp_path / "tls.crt").write_bytes(b"".join(each.bytes() for each in issued.cert_chain_pems))
        return int(ssl._ssl._test_decode_cert(str(tmp_path / "tls.crt"))["serialNumber"], 16)  # type: ignore[attr-defined]

    certify()
    context = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
    files = {"certificate_path": str(tmp_path / "tls.crt"), "private_key_path": str(tmp_path / "tls.key")}
    pair = Pair(tmp_path / "pair", control=SIPP_SETTINGS)
    pair.settings["control"]["sip"]["listeners"][1] |= {"name": "tls", "transport": "tls", "tls": files}
    with pair:
        async with Stage(pair, tmp_path) as stage, phone(pair, tls=context) as carol, phone(pair, tls=context) as other:
            await carol.register()
            caller, invite = await called(stage, carol)
            assert invite.require("Contact").endswith(";transport=tls>")
            await other.disconnect()
            serial = certify()
            pair.supervisors["control"].send_signal(signal.SIGHUP)

            async def shown() -> int:
                await other.connect()
                assert other._writer is not None
                found = other._writer.get_extra_info("ssl_object").getpeercert()["serialNumber"]
                await other.disconnect()
                return int(found, 16)

            async with asyncio.timeout(10):
                while await shown() != serial:
                    await asyncio.sleep(0.05)
            await hung_up(stage, caller, carol)
