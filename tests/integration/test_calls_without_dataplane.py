"""The data plane is gone: nobody is rung in vain, and calls without media do not last (lost_timeout_s is 1)."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.pair import Pair
from tests.harness.stage import BOB, TRUNK, Stage, termination
from tests.integration.conftest import SIPP_SETTINGS

pytestmark = pytest.mark.integration


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    """A pair of the test's own, as it loses a half of it."""
    with Pair(tmp_path / "pair", control=SIPP_SETTINGS) as started:
        yield started


async def test_new_call_is_refused_before_anyone_rings(pair: Pair, stage: Stage) -> None:
    await stage.register(BOB)
    callee = await stage.actor("callee_answers", BOB)
    pair.kill("dataplane")
    await stage.until(lambda: not pair.is_ready("control"), 5, "the control plane has noticed")
    caller = await stage.actor("trunk_caller_is_refused", TRUNK, dials="+8225550100")
    await caller.finish()
    assert caller.final_status == 503
    assert termination(await stage.cdr()) == ("rejected", "media-unavailable", 503)
    assert callee.trace() == []


async def test_new_call_is_refused_while_the_data_plane_hangs(pair: Pair, stage: Stage) -> None:
    await stage.register(BOB)
    callee = await stage.actor("callee_answers", BOB)
    pair.freeze("dataplane")
    try:
        caller = await stage.actor("trunk_caller_is_refused", TRUNK, dials="+8225550100")
        await caller.finish()
        assert caller.final_status == 503
        assert termination(await stage.cdr()) == ("failed", "media-unavailable", 503)
        assert callee.trace() == []
    finally:
        pair.thaw("dataplane")
    await stage.until(lambda: pair.is_ready("control"), 10, "the control plane has its data plane again")
    await stage.until(lambda: pair.metric("dataplane", "sip_pbx_media_sessions") == 0, 5, "the late session is removed")


async def test_running_call_ends_on_both_sides_once_its_media_is_gone_too_long(pair: Pair, stage: Stage) -> None:
    await stage.register(BOB)
    scene = await stage.call("trunk_caller_is_hung_up", TRUNK, "callee_answers", BOB, "+8225550100")
    await scene.callee.until_received("ACK")
    pair.kill("dataplane")
    await scene.finish()
    cdr = await stage.cdr()
    assert termination(cdr) == ("answered", "media-lost", 200)
    assert cdr["termination"]["ended_by"] is None
    assert cdr["media_complete"] is False
    assert 0.9 <= cdr["duration_s"] <= 5


async def test_data_plane_that_comes_back_serves_the_next_call(pair: Pair, stage: Stage) -> None:
    await stage.register(BOB)
    pair.kill("dataplane")
    pair.start("dataplane")
    pair.wait_until_ready("dataplane")
    pair.wait_until_ready("control")
    scene = await stage.call("trunk_caller_talks_until_cue", TRUNK, "callee_answers", BOB, "+8225550100")
    await scene.talk()
    await scene.hang_up()
    assert termination(await stage.cdr()) == ("answered", "hangup", 200)
