"""Foreign phones as people use them: two baresip programs register, talk and hang up through the pair as shipped."""

import asyncio
from pathlib import Path

import pytest
import trustme

from tests.harness.baresip import BaresipPhone, baresip_available
from tests.harness.pair import USERS, Pair
from tests.harness.tone import read_samples, seconds_with_tone, write_tone

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not baresip_available(), reason="baresip is not installed (Debian: baresip-core)"),
]

TALK_S = 3.0
TLS_OFFSET = 400
MOST_OF_IT_S = 2.5
ALICE_HZ, BOB_HZ = 440.0, 1000.0
BARESIP_SETTINGS = {"digest_algorithms": ["MD5"]}
"""baresip 1.0 gives up when one of several challenges names an algorithm other than MD5."""


def phone(
    folder: Path, pair: Pair, user: str, *, port: int, hears: float, account: str = "", transport: str = "udp"
) -> BaresipPhone:
    """A registering phone of this user; `hears` is the tone that its microphone hears."""
    folder.mkdir()
    write_tone(folder / "microphone.wav", frequency_hz=hears, duration_s=30)
    host, pbx_port = pair.sip
    address = f"{host}:{pbx_port + TLS_OFFSET if transport == 'tls' else pbx_port};transport={transport}"
    return BaresipPhone(
        folder / "baresip",
        account=f"<sip:{user}@{address}>;auth_pass={USERS[user]};regint=60;audio_codecs=pcmu{account}",
        sip_port=port,
        control_port=port + 5,
        rtp_ports=(port + 5000, port + 5099),
        microphone=folder / "microphone.wav",
    )


async def test_two_baresip_phones_register_and_hear_each_other_through_the_pair(tmp_path: Path) -> None:
    with Pair(tmp_path / "pair", control=BARESIP_SETTINGS) as pair:
        async with (
            phone(tmp_path / "alice", pair, "1001", port=26210, hears=ALICE_HZ) as alice,
            phone(tmp_path / "bob", pair, "1002", port=26410, hears=BOB_HZ, account=";answermode=auto") as bob,
        ):
            await alice.wait_until_registered()
            await bob.wait_until_registered()
            await alice.command("dial", f"sip:1002@{pair.sip[0]}:{pair.sip[1]}")
            await alice.wait_for("CALL_ESTABLISHED")
            await bob.wait_for("CALL_ESTABLISHED")
            await asyncio.sleep(TALK_S)
            await alice.command("hangup")
            await bob.wait_for("CALL_CLOSED")
            await asyncio.to_thread(pair.wait, lambda: bool(pair.cdrs()), 5, "a CDR is written")
            (cdr,) = pair.cdrs()

        heard_by_alice, heard_by_bob = read_samples(alice.recording()), read_samples(bob.recording())
        assert seconds_with_tone(heard_by_bob, ALICE_HZ) > MOST_OF_IT_S
        assert seconds_with_tone(heard_by_alice, BOB_HZ) > MOST_OF_IT_S
        assert seconds_with_tone(heard_by_bob, BOB_HZ) == 0, "bob hears himself"
        assert seconds_with_tone(heard_by_alice, ALICE_HZ) == 0, "alice hears herself"

    assert (cdr["direction"], cdr["caller"], cdr["callee"]) == ("internal", "1001", "1002")
    end = cdr["termination"]
    assert (end["result"], end["reason"], end["sip_status"], end["ended_by"]) == ("answered", "hangup", 200, "caller")
    assert TALK_S <= cdr["duration_s"] < TALK_S + 2
    assert [(leg["name"], leg["user"]) for leg in cdr["legs"]] == [("caller", "1001"), ("callee", "1002")]
    assert cdr["legs"][0]["user_agent"].startswith("baresip")
    assert cdr["media_complete"]
    streams = {stream["leg"]: stream for stream in cdr["streams"]}
    assert set(streams) == {"caller", "callee"}
    for stream in streams.values():
        assert stream["kind"] == "audio"
        assert stream["packets"] > 50 * MOST_OF_IT_S
        assert stream["lost"] == 0
        assert stream["relayed_packets"] > 50 * MOST_OF_IT_S


def with_tls(pair: Pair, folder: Path) -> Pair:
    """The pair with a listener for TLS beside its own, before it is started."""
    issued = trustme.CA().issue_cert(pair.sip[0])
    issued.private_key_pem.write_to_path(folder / "tls.key")
    (folder / "tls.crt").write_bytes(b"".join(each.bytes() for each in issued.cert_chain_pems))
    files = {"certificate_path": str(folder / "tls.crt"), "private_key_path": str(folder / "tls.key")}
    port = pair.sip[1] + TLS_OFFSET
    listener = {"name": "tls", "transport": "tls", "bind": pair.sip[0], "port": port, "tls": files}
    pair.settings["control"]["sip"]["listeners"].append(listener)
    return pair


@pytest.mark.parametrize(("of_alice", "of_bob"), [("tcp", "tcp"), ("tls", "udp"), ("udp", "tls")])
async def test_baresip_phones_talk_over_tcp_and_tls(tmp_path: Path, of_alice: str, of_bob: str) -> None:
    with with_tls(Pair(tmp_path / "pair", control=BARESIP_SETTINGS), tmp_path) as pair:
        async with (
            phone(tmp_path / "alice", pair, "1001", port=26210, hears=ALICE_HZ, transport=of_alice) as alice,
            phone(tmp_path / "bob", pair, "1002", port=26410, hears=BOB_HZ, transport=of_bob) as bob,
        ):
            await alice.wait_until_registered()
            await bob.wait_until_registered()
            port = pair.sip[1] + TLS_OFFSET if of_alice == "tls" else pair.sip[1]
            await alice.command("dial", f"sip:1002@{pair.sip[0]}:{port};transport={of_alice}")
            await bob.wait_for("CALL_INCOMING")
            await bob.command("accept")
            await alice.wait_for("CALL_ESTABLISHED")
            await asyncio.sleep(1)
            await bob.command("hangup")
            await alice.wait_for("CALL_CLOSED")
            await asyncio.to_thread(pair.wait, lambda: bool(pair.cdrs()), 5, "a CDR is written")
            (cdr,) = pair.cdrs()
        for method, transport in (("INVITE", of_bob), ("BYE", of_alice)):
            sent = {"method": method, "direction": "out", "transport": transport}
            assert pair.metric("control", "sip_pbx_sip_requests_total", **sent) == 1
    assert cdr["termination"]["ended_by"] == "callee"
    assert {stream["leg"]: stream["packets"] > 25 for stream in cdr["streams"]} == {"caller": True, "callee": True}


async def test_a_call_that_the_other_baresip_phone_ends_is_closed_on_both_sides(tmp_path: Path) -> None:
    with Pair(tmp_path / "pair", control=BARESIP_SETTINGS) as pair:
        async with (
            phone(tmp_path / "alice", pair, "1001", port=26210, hears=ALICE_HZ) as alice,
            phone(tmp_path / "bob", pair, "1002", port=26410, hears=BOB_HZ) as bob,
        ):
            await alice.wait_until_registered()
            await bob.wait_until_registered()
            await alice.command("dial", f"sip:1002@{pair.sip[0]}:{pair.sip[1]}")
            await bob.wait_for("CALL_INCOMING")
            await alice.wait_for("CALL_RINGING")
            await bob.command("accept")
            await alice.wait_for("CALL_ESTABLISHED")
            await bob.command("hangup")
            await alice.wait_for("CALL_CLOSED")
            await asyncio.to_thread(pair.wait, lambda: bool(pair.cdrs()), 5, "a CDR is written")
            (cdr,) = pair.cdrs()
        assert cdr["termination"]["ended_by"] == "callee"
        assert cdr["ringing_at"] is not None
        assert pair.metric("control", "sip_pbx_active_calls") == 0
