"""Messages that get lost between a phone and the PBX; T1 is 100 ms here."""

import pytest

from tests.harness.stage import BOB, TRUNK, Stage, termination

pytestmark = pytest.mark.integration


@pytest.mark.rfc("3261", "17.2.1")
async def test_retransmitted_invite_is_one_invite_to_the_callee(stage: Stage) -> None:
    await stage.register(BOB)
    scene = await stage.call("retransmitted_invite", TRUNK, "callee_answers_on_cue", BOB, "+8225550100")
    await stage.until(lambda: len(scene.caller.sent("INVITE")) >= 3, 5, "the caller has repeated its INVITE")
    assert len(scene.caller.received("INVITE", 100)) >= 2
    scene.callee.cue()
    await scene.hang_up()
    invites = scene.callee.received("INVITE")
    assert len({invite.branch for invite in invites}) == 1
    assert termination(await stage.cdr()) == ("answered", "hangup", 200)


@pytest.mark.rfc("3261", "13.3.1.4")
async def test_call_whose_answer_is_never_acknowledged_is_ended_on_both_sides(stage: Stage) -> None:
    await stage.register(BOB)
    scene = await stage.call("lost_ack", TRUNK, "callee_answers", BOB, "+8225550100")
    await scene.finish()
    assert len(scene.caller.received("INVITE", 200)) >= 5
    assert len(scene.callee.received("ACK")) == 1
    cdr = await stage.cdr()
    assert termination(cdr)[1] == "ack-timeout"
    assert cdr["termination"]["ended_by"] is None
    scene.check_legs_are_separate()


@pytest.mark.rfc("3261", "17.2.2")
async def test_repeated_bye_gets_its_answer_again(stage: Stage) -> None:
    await stage.register(BOB)
    scene = await stage.call("lost_answer_to_bye", TRUNK, "callee_answers", BOB, "+8225550100")
    await scene.hang_up()
    assert len(scene.caller.received("BYE", 200)) >= 2
    assert len(scene.callee.received("BYE")) == 1
    assert termination(await stage.cdr()) == ("answered", "hangup", 200)


@pytest.mark.rfc("3261", "17.1.2.2")
async def test_bye_is_sent_again_until_it_is_answered(stage: Stage) -> None:
    await stage.register(BOB)
    scene = await stage.call("trunk_caller_talks_until_cue", TRUNK, "callee_loses_bye", BOB, "+8225550100")
    await scene.hang_up()
    byes = scene.callee.received("BYE")
    assert len(byes) >= 2
    assert len({bye.branch for bye in byes}) == 1
    assert termination(await stage.cdr()) == ("answered", "hangup", 200)
