"""Calls that come to nothing: each with its status for the caller and its reason in the CDR."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.pair import Pair
from tests.harness.stage import ALICE, BOB, CAROL, TRUNK, Stage, termination
from tests.integration.conftest import SIPP_SETTINGS

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A pair that lets phones ring for a second."""
    control = SIPP_SETTINGS | {"sip": {"ring_timeout_s": 1}}
    with Pair(tmp_path_factory.mktemp("pair"), control=control) as started:
        yield started


async def test_busy_callee_is_busy_to_the_caller(stage: Stage) -> None:
    await stage.register(ALICE, BOB)
    scene = await stage.call("caller_is_refused", ALICE, "callee_busy", BOB, "1002")
    await scene.finish()
    assert scene.caller.final_status == 486
    assert termination(await stage.cdr()) == ("busy", "callee-busy", 486)
    scene.check_legs_are_separate()


async def test_callee_that_never_answers_is_cancelled_after_the_ring_timeout(stage: Stage) -> None:
    await stage.register(ALICE, BOB)
    scene = await stage.call("caller_is_refused", ALICE, "callee_rings_until_cancelled", BOB, "1002")
    await scene.finish()
    assert scene.caller.received("INVITE", 180)
    assert scene.caller.final_status in {408, 480}
    assert termination(await stage.cdr()) == ("no_answer", "ring-timeout", scene.caller.final_status)
    scene.check_legs_are_separate()


@pytest.mark.rfc("3261", "9.2")
async def test_caller_that_gives_up_while_ringing_cancels_the_callee(stage: Stage) -> None:
    await stage.register(BOB)
    scene = await stage.call("cancel_while_ringing", TRUNK, "callee_rings_until_cancelled", BOB, "+8225550100")
    await scene.finish()
    assert scene.caller.final_status == 487
    cdr = await stage.cdr()
    assert termination(cdr) == ("cancelled", "caller-cancelled", 487)
    assert cdr["termination"]["ended_by"] == "caller"
    scene.check_legs_are_separate()


async def test_number_that_leads_nowhere_is_not_found(stage: Stage) -> None:
    caller = await stage.actor("caller_is_refused", ALICE, dials="5551234")
    await caller.finish()
    assert caller.final_status == 404
    assert termination(await stage.cdr()) == ("rejected", "unknown-number", 404)


async def test_user_that_is_not_registered_is_unavailable(stage: Stage) -> None:
    caller = await stage.actor("caller_is_refused", ALICE, dials="1003")
    await caller.finish()
    assert caller.final_status == 480
    assert termination(await stage.cdr()) == ("rejected", "not-registered", 480)


@pytest.mark.rfc("3261", "22.1")
async def test_call_with_a_wrong_password_rings_nobody(stage: Stage) -> None:
    await stage.register(BOB)
    callee = await stage.actor("callee_answers", BOB)
    caller = await stage.actor("caller_is_refused", ALICE, dials="1002", password="guess")
    await caller.finish()
    assert caller.final_status in {401, 403, 407}
    cdr = await stage.cdr()
    assert termination(cdr) == ("rejected", "wrong-credentials", caller.final_status)
    assert callee.trace() == []


async def test_stranger_is_challenged_where_the_trunk_is_trusted(stage: Stage) -> None:
    """The address decides, not what the caller says of itself."""
    await stage.register(BOB)
    impostor = await stage.actor("caller_is_refused", CAROL, dials="1002", password="guess")
    await impostor.finish()
    assert impostor.final_status in {401, 403, 407}
    await stage.cdr()


class TestLimits:
    """Each with a pair of its own, so small that one call fills it."""

    @pytest.fixture
    def pair(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
        control, dataplane = request.param
        with Pair(tmp_path / "pair", control=SIPP_SETTINGS | control, dataplane=dataplane) as started:
            yield started

    @pytest.mark.parametrize("pair", [({}, {"media": {"port_range": [12096, 12103]}})], indirect=True)
    async def test_call_without_a_free_port_block_is_refused_before_anyone_rings(self, stage: Stage) -> None:
        await _fill_and_refuse(stage, "ports-exhausted")

    @pytest.mark.parametrize("pair", [({"limits": {"max_calls": 1}}, {})], indirect=True)
    async def test_call_above_the_limit_is_refused_before_anyone_rings(self, stage: Stage) -> None:
        await _fill_and_refuse(stage, "call-limit")

    @pytest.mark.parametrize("pair", [({"limits": {"calls_per_second": 0.01}}, {})], indirect=True)
    async def test_source_that_calls_too_often_is_refused(self, stage: Stage) -> None:
        await _fill_and_refuse(stage, "rate-limit")


async def _fill_and_refuse(stage: Stage, reason: str) -> None:
    await stage.register(BOB, CAROL)
    first = await stage.call("trunk_caller_talks_until_cue", TRUNK, "callee_answers", BOB, "+8225550100")
    await first.callee.until_received("ACK")
    untouched = await stage.actor("callee_answers", CAROL)
    second = await stage.actor("trunk_caller_is_refused", SECOND_TRUNK_CALLER, dials="+8225550101")
    await second.finish()
    (refusal,) = second.received("INVITE", 503)
    if reason != "ports-exhausted":
        assert int(refusal.require("Retry-After")) > 0
    assert termination(await stage.cdr()) == ("rejected", reason, 503)
    assert untouched.trace() == []
    await first.hang_up()
    assert termination(await stage.cdr()) == ("answered", "hangup", 200)


SECOND_TRUNK_CALLER = type(TRUNK)(TRUNK.user, TRUNK.host, TRUNK.port + 1, TRUNK.audio_port + 10)
