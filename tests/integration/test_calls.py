"""Calls through the supervised pair: SIPp on both sides, real RTP, and what the PBX wrote down of each."""

import pytest

from tests.harness.pair import Pair
from tests.harness.stage import ALICE, BOB, CAROL, TRUNK, Stage, packets, termination

pytestmark = pytest.mark.integration


async def test_users_talk_both_ways_and_nothing_of_a_leg_reaches_the_other(stage: Stage) -> None:
    await stage.register(ALICE, BOB)
    scene = await stage.call("caller_talks_until_cue", ALICE, "callee_answers", BOB, dials="1002")
    await scene.talk("audio", frames=25)
    await scene.hang_up()
    cdr = await stage.cdr()
    assert termination(cdr) == ("answered", "hangup", 200)
    assert packets(cdr) == {("caller", "audio"): (25, 26, 0), ("callee", "audio"): (25, 26, 0)}
    scene.check_legs_are_separate()


async def test_audio_and_video_are_relayed_side_by_side(stage: Stage) -> None:
    await stage.register(BOB)
    scene = await stage.call("caller_with_video_talks_until_cue", ALICE, "callee_with_video_answers", BOB, dials="1002")
    await scene.talk("audio", "video", frames=20)
    await scene.hang_up()
    cdr = await stage.cdr()
    assert termination(cdr) == ("answered", "hangup", 200)
    assert {key: value[0] for key, value in packets(cdr).items()} == {
        (leg, kind): 20 for leg in ("caller", "callee") for kind in ("audio", "video")
    }


async def test_user_calls_the_trunk_by_prefix(stage: Stage) -> None:
    scene = await stage.call("caller_talks_until_cue", ALICE, "callee_answers", TRUNK, dials="915550001111")
    await scene.talk("audio", frames=10)
    await scene.hang_up()
    cdr = await stage.cdr()
    assert termination(cdr) == ("answered", "hangup", 200)
    assert cdr["direction"] == "outbound"


async def test_trunk_calls_a_user_without_a_challenge(stage: Stage) -> None:
    await stage.register(BOB)
    scene = await stage.call("trunk_caller_talks_until_cue", TRUNK, "callee_answers", BOB, dials="+8225550100")
    await scene.talk("audio", frames=10)
    await scene.hang_up()
    cdr = await stage.cdr()
    assert termination(cdr) == ("answered", "hangup", 200)
    assert cdr["direction"] == "inbound"


async def test_busy_callee_is_busy_for_the_caller(stage: Stage) -> None:
    await stage.register(BOB)
    scene = await stage.call("caller_is_refused", ALICE, "callee_busy", BOB, dials="1002")
    await scene.finish()
    assert scene.caller.final_status == 486
    assert termination(await stage.cdr()) == ("busy", "callee-busy", 486)


async def test_cancel_while_ringing_reaches_the_callee(stage: Stage) -> None:
    await stage.register(BOB)
    scene = await stage.call("cancel_while_ringing", TRUNK, "callee_rings_until_cancelled", BOB, dials="+8225550100")
    await scene.finish()
    assert termination(await stage.cdr()) == ("cancelled", "caller-cancelled", 487)


@pytest.mark.parametrize(
    ("number", "status", "reason"), [("4711", 404, "unknown-number"), ("1003", 480, "not-registered")]
)
async def test_number_that_leads_nowhere_is_refused_with_its_reason(
    stage: Stage, number: str, status: int, reason: str
) -> None:
    caller = await stage.actor("caller_is_refused", ALICE, dials=number)
    await caller.finish()
    assert caller.final_status == status
    assert termination(await stage.cdr()) == ("rejected", reason, status)


async def test_wrong_password_is_refused_for_calls_and_registrations(stage: Stage) -> None:
    caller = await stage.actor("caller_is_refused", ALICE, dials="1002", password="guessed")
    await caller.finish()
    assert caller.final_status == 403
    assert termination(await stage.cdr()) == ("rejected", "wrong-credentials", 403)
    registering = await stage.actor("register_is_refused", ALICE, password="guessed")
    await registering.finish()
    assert registering.received("REGISTER", 403)


async def test_binding_is_registered_refreshed_and_removed(stage: Stage, pair: Pair) -> None:
    before = pair.metric("control", "sip_pbx_registrations")
    actor = await stage.actor("register_refresh_unregister", CAROL)
    await actor.finish()
    assert pair.metric("control", "sip_pbx_registrations") == before


async def test_retransmitted_invite_rings_the_callee_once(stage: Stage) -> None:
    await stage.register(BOB)
    scene = await stage.call("retransmitted_invite", TRUNK, "callee_answers_on_cue", BOB, dials="+8225550100")
    await scene.callee.until_received("INVITE")
    scene.callee.cue()
    await scene.hang_up()
    assert len({message.require("Call-ID") for message in scene.callee.received("INVITE")}) == 1
    assert termination(await stage.cdr()) == ("answered", "hangup", 200)


async def test_lost_ack_ends_the_call_on_both_sides(stage: Stage) -> None:
    await stage.register(BOB)
    scene = await stage.call("lost_ack", TRUNK, "callee_answers", BOB, dials="+8225550100")
    await scene.finish()
    assert termination(await stage.cdr()) == ("answered", "ack-timeout", 200)
    assert len(scene.caller.received("INVITE", 200)) > 3


async def test_lost_answer_to_bye_is_given_again(stage: Stage) -> None:
    await stage.register(BOB)
    scene = await stage.call("lost_answer_to_bye", TRUNK, "callee_answers", BOB, dials="+8225550100")
    await scene.hang_up()
    assert termination(await stage.cdr()) == ("answered", "hangup", 200)


async def test_lost_bye_is_sent_again(stage: Stage) -> None:
    await stage.register(BOB)
    scene = await stage.call("caller_talks_until_cue", ALICE, "callee_loses_bye", BOB, dials="1002")
    await scene.hang_up()
    assert termination(await stage.cdr()) == ("answered", "hangup", 200)
    assert len(scene.callee.received("BYE")) > 1


async def test_reliable_ringing_of_the_callee_is_acknowledged(stage: Stage) -> None:
    await stage.register(BOB)
    scene = await stage.call("caller_talks_until_cue", ALICE, "callee_rings_reliably", BOB, dials="1002")
    await scene.hang_up()
    assert scene.callee.received("PRACK")
    assert termination(await stage.cdr()) == ("answered", "hangup", 200)


async def test_caller_that_requires_reliable_ringing_gets_it(stage: Stage) -> None:
    await stage.register(BOB)
    scene = await stage.call("caller_requires_reliable_ringing", TRUNK, "callee_answers", BOB, dials="+8225550100")
    await scene.hang_up()
    assert termination(await stage.cdr()) == ("answered", "hangup", 200)


async def test_update_in_a_call_is_answered_with_and_without_a_description(stage: Stage) -> None:
    await stage.register(BOB)
    scene = await stage.call("caller_updates_in_dialog", TRUNK, "callee_is_updated", BOB, dials="+8225550100")
    await scene.caller.until_received("INVITE", 200)
    for count in (1, 2):
        scene.caller.cue()
        answer = await scene.caller.until_received("UPDATE", 200, count=count)
    assert "m=audio" in answer.body
    await scene.hang_up()
    assert termination(await stage.cdr()) == ("answered", "hangup", 200)


async def test_hold_and_resume_reach_the_other_side(stage: Stage) -> None:
    await stage.register(BOB)
    scene = await stage.call("caller_holds_and_resumes", TRUNK, "callee_is_held_and_resumed", BOB, dials="+8225550100")
    for count in (1, 2):
        await scene.caller.until_received("INVITE", 200, count=count)
        scene.caller.cue()
    await scene.caller.until_received("INVITE", 200, count=3)
    await scene.hang_up()
    offers = [message.body for message in scene.callee.received("INVITE")]
    assert any("a=sendonly" in offer for offer in offers)
    assert termination(await stage.cdr()) == ("answered", "hangup", 200)


async def test_early_media_of_the_callee_is_heard(stage: Stage) -> None:
    await stage.register(BOB)
    scene = await stage.call("caller_talks_until_cue", ALICE, "callee_plays_early_media", BOB, dials="1002")
    await scene.talk("audio", frames=10, answer_status=183)
    scene.callee.cue()
    await scene.hang_up()
    assert termination(await stage.cdr()) == ("answered", "hangup", 200)


async def test_names_of_the_metrics_are_those_that_dashboards_use(pair: Pair) -> None:
    control, dataplane = pair._get("control", "/metrics"), pair._get("dataplane", "/metrics")
    for name in (
        "sip_pbx_active_calls",
        "sip_pbx_total_calls",
        "sip_pbx_call_duration_seconds_count",
        "sip_pbx_errors_total",
    ):
        assert f"\n{name}" in control, name
    for name in ("sip_pbx_media_sessions", "sip_pbx_media_ports_in_use", "sip_pbx_rtp_packets_total"):
        assert f"\n{name}" in dataplane, name
