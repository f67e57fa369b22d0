"""Calls that are answered, with SIPp at both ends and real RTP: between users, from and to the trunk, with video."""

import pytest

from tests.harness.pair import Pair
from tests.harness.stage import ALICE, BOB, TRUNK, Scene, Stage, packets, termination

pytestmark = pytest.mark.integration


async def test_registered_users_call_each_other_and_hear_each_other(stage: Stage) -> None:
    await stage.register(ALICE, BOB)
    scene = await stage.call("caller_talks_until_cue", ALICE, "callee_answers", BOB, "1002")
    await scene.talk(frames=50)
    await scene.hang_up()
    cdr = await stage.cdr()
    assert termination(cdr) == ("answered", "hangup", 200)
    assert cdr["termination"]["ended_by"] == "caller"
    assert (cdr["direction"], cdr["caller"], cdr["callee"]) == ("internal", "1001", "1002")
    assert packets(cdr) == {("caller", "audio"): (50, 51, 0), ("callee", "audio"): (50, 51, 0)}
    assert {stream["rtcp_packets"] for stream in cdr["streams"]} == {1}
    assert [leg["user"] for leg in cdr["legs"]] == ["1001", "1002"]
    scene.check_legs_are_separate()


async def test_call_from_the_trunk_reaches_a_user_without_challenge(stage: Stage) -> None:
    await stage.register(BOB)
    scene = await stage.call("trunk_caller_talks_until_cue", TRUNK, "callee_answers", BOB, "+8225550100")
    await scene.talk()
    await scene.hang_up()
    cdr = await stage.cdr()
    assert termination(cdr) == ("answered", "hangup", 200)
    assert cdr["direction"] == "inbound"
    assert cdr["legs"][0]["trunk"] == "carrier"
    assert packets(cdr) == {("caller", "audio"): (25, 26, 0), ("callee", "audio"): (25, 26, 0)}
    scene.check_legs_are_separate()


async def test_call_to_the_trunk_has_its_prefix_stripped(stage: Stage) -> None:
    await stage.register(ALICE)
    scene = await stage.call("caller_talks_until_cue", ALICE, "callee_answers", TRUNK, "915550002222")
    await scene.talk()
    invite = await scene.callee.until_received("INVITE")
    assert invite.uri.startswith("sip:15550002222@")
    await scene.hang_up()
    cdr = await stage.cdr()
    assert termination(cdr) == ("answered", "hangup", 200)
    assert cdr["direction"] == "outbound"
    assert cdr["legs"][1]["trunk"] == "carrier"
    assert packets(cdr) == {("caller", "audio"): (25, 26, 0), ("callee", "audio"): (25, 26, 0)}
    scene.check_legs_are_separate()


async def test_audio_and_video_are_relayed_side_by_side(stage: Stage) -> None:
    await stage.register(ALICE, BOB)
    scene = await stage.call("caller_with_video_talks_until_cue", ALICE, "callee_with_video_answers", BOB, "1002")
    await scene.talk("audio", "video")
    await scene.hang_up()
    cdr = await stage.cdr()
    assert packets(cdr) == {(leg, kind): (25, 26, 0) for leg in ("caller", "callee") for kind in ("audio", "video")}
    scene.check_legs_are_separate()


async def test_callee_hangs_up_and_the_cdr_says_so(stage: Stage) -> None:
    await stage.register(BOB)
    scene = await stage.call("trunk_caller_is_hung_up", TRUNK, "callee_hangs_up_on_cue", BOB, "+8225550100")
    await scene.callee.until_received("ACK")
    scene.callee.cue()
    await scene.finish()
    cdr = await stage.cdr()
    assert termination(cdr) == ("answered", "hangup", 200)
    assert cdr["termination"]["ended_by"] == "callee"
    scene.check_legs_are_separate()


@pytest.mark.rfc("3960", "3")
async def test_early_media_flows_before_the_answer(stage: Stage) -> None:
    await stage.register(BOB)
    scene = await stage.call("trunk_caller_talks_until_cue", TRUNK, "callee_plays_early_media", BOB, "+8225550100")
    await scene.talk(answer_status=183)
    scene.callee.cue()
    await scene.hang_up()
    cdr = await stage.cdr()
    assert termination(cdr) == ("answered", "hangup", 200)
    assert cdr["ringing_at"] is not None
    assert packets(cdr) == {("caller", "audio"): (25, 26, 0), ("callee", "audio"): (25, 26, 0)}


@pytest.mark.rfc("3264", "8.4")
async def test_hold_and_resume_reach_the_other_side_on_the_same_ports(stage: Stage) -> None:
    await stage.register(BOB)
    scene = await stage.call("caller_holds_and_resumes", TRUNK, "callee_is_held_and_resumed", BOB, "+8225550100")
    for turn, (offered, answered) in enumerate([("sendonly", "recvonly"), ("sendrecv", "sendrecv")], start=2):
        await scene.caller.until_received("INVITE", 200, count=turn - 1)
        await scene.callee.until_received("ACK", count=turn - 1)
        scene.caller.cue()
        (there,) = await scene.callee.media("INVITE", count=turn)
        (back,) = await scene.caller.media("INVITE", 200, count=turn)
        assert (there.direction, back.direction) == (offered, answered)
    await scene.callee.until_received("ACK", count=3)
    assert _ports(scene) == (1, 1)
    scene.caller.cue()
    await scene.finish()
    assert termination(await stage.cdr()) == ("answered", "hangup", 200)
    scene.check_legs_are_separate()


def _ports(scene: Scene) -> tuple[int, int]:
    """How many different relay ports each side was told during the call."""
    told = [
        {line for message in messages for line in message.body.splitlines() if line.startswith("m=")}
        for messages in (scene.caller.received("INVITE", 200), scene.callee.received("INVITE"))
    ]
    return len(told[0]), len(told[1])


async def test_metrics_of_both_planes_have_their_names(pair: Pair, stage: Stage) -> None:
    before = pair.metric("control", "sip_pbx_total_calls")
    await stage.register(BOB)
    scene = await stage.call("trunk_caller_talks_until_cue", TRUNK, "callee_answers", BOB, "+8225550100")
    await scene.talk()
    assert pair.metric("control", "sip_pbx_active_calls") == 1
    assert pair.metric("dataplane", "sip_pbx_media_sessions") == 1
    assert pair.metric("dataplane", "sip_pbx_media_ports_in_use") == 8
    await scene.hang_up()
    await stage.cdr()
    assert pair.metric("control", "sip_pbx_active_calls") == 0
    assert pair.metric("control", "sip_pbx_total_calls") == before + 1
    assert pair.metric("control", "sip_pbx_calls_total") == before + 1
    assert pair.metric("control", "sip_pbx_call_duration_seconds_count", direction="inbound") >= 1
    assert pair.metric("control", "sip_pbx_calls_ended_total", result="answered", reason="hangup") >= 1
    assert pair.metric("control", "sip_pbx_sip_requests_total", method="INVITE", direction="out") >= 1
    pair.wait(
        lambda: pair.metric("dataplane", "sip_pbx_rtp_packets_total", direction="rx", kind="rtp") >= 50,
        5,
        "the packets of the call are counted",
    )
    names = {name for name, _ in pair.metrics("control")}
    assert {"sip_pbx_errors_total", "sip_pbx_registrations", "sip_pbx_sip_transactions"} <= names
    names = {name for name, _ in pair.metrics("dataplane")}
    assert {"sip_pbx_media_ports_capacity", "sip_pbx_rtp_dropped_total", "sip_pbx_rtp_lost_total"} <= names
