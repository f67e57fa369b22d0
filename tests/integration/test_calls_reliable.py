"""Reliable provisional responses and UPDATE, each settled on its own leg (RFC 3262, RFC 3311)."""

import pytest

from tests.harness.stage import BOB, TRUNK, Stage, termination

pytestmark = pytest.mark.integration


@pytest.mark.rfc("3262", "3")
async def test_reliable_ringing_of_the_callee_gets_a_prack(stage: Stage) -> None:
    await stage.register(BOB)
    scene = await stage.call("trunk_caller_talks_until_cue", TRUNK, "callee_rings_reliably", BOB, "+8225550100")
    await scene.hang_up()
    assert len(scene.callee.received("PRACK")) == 1
    assert scene.caller.received("PRACK") == []
    assert termination(await stage.cdr()) == ("answered", "hangup", 200)
    scene.check_legs_are_separate()


@pytest.mark.rfc("3262", "3")
async def test_caller_that_requires_reliable_ringing_gets_it_and_its_prack_is_answered(stage: Stage) -> None:
    await stage.register(BOB)
    scene = await stage.call("caller_requires_reliable_ringing", TRUNK, "callee_answers_on_cue", BOB, "+8225550100")
    await scene.callee.until_received("INVITE")
    scene.callee.cue()
    await scene.hang_up()
    assert len(scene.caller.received("PRACK", 200)) == 1
    assert scene.callee.received("PRACK") == []
    assert termination(await stage.cdr()) == ("answered", "hangup", 200)


@pytest.mark.rfc("3311", "5.2")
async def test_update_is_answered_with_and_without_a_description(stage: Stage) -> None:
    await stage.register(BOB)
    scene = await stage.call("caller_updates_in_dialog", TRUNK, "callee_is_updated", BOB, "+8225550100")
    await scene.caller.until_received("INVITE", 200)
    scene.caller.cue()
    refreshed = await scene.caller.until_received("UPDATE", 200)
    assert refreshed.body.strip() == ""
    scene.caller.cue()
    await scene.caller.until_received("UPDATE", 200, count=2)
    (line,) = await scene.caller.media("UPDATE", 200, count=2)
    assert line.direction == "recvonly"
    scene.caller.cue()
    await scene.finish()
    assert termination(await stage.cdr()) == ("answered", "hangup", 200)
    scene.check_legs_are_separate()
