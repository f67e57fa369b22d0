"""kill -9 of either plane while SIPp talks: calls go on, far ends notice nothing, and each call has one record."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest

from tests.harness.pair import Pair
from tests.harness.stage import ALICE, BOB, TRUNK, Scene, Stage, termination
from tests.integration.conftest import SIPP_SETTINGS

pytestmark = pytest.mark.integration


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with Pair(tmp_path / "pair", control={**SIPP_SETTINGS, "media": {"lost_timeout_s": 10}}) as started:
        yield started


@pytest.fixture
async def stage(pair: Pair, tmp_path: Path) -> AsyncIterator[Stage]:
    async with Stage(pair, tmp_path) as made:
        yield made


def kill_main(pair: Pair, plane: str) -> None:
    """kill -9 of the plane's own process; its supervisor stays."""
    (_, child, *_) = pair.pids(plane)
    psutil.Process(child).send_signal(signal.SIGKILL)


async def until_back(pair: Pair, plane: str, before: int) -> None:
    """Until another process of the plane is ready."""

    def back() -> bool:
        pids = pair.pids(plane)
        return len(pids) > 1 and pids[1] != before and pair.is_ready(plane)

    await asyncio.to_thread(pair.wait, back, 10, f"{plane} is back")


async def until_restored(stage: Stage) -> None:
    """Until the data plane has the call's session again."""

    def restored() -> bool:
        return stage.pair.metric("control", "sip_pbx_media_restores_total", result="ok") == 1

    await stage.until(restored, 5, "the session is made again")


async def answered(stage: Stage) -> Scene:
    await stage.register(BOB)
    scene = await stage.call("trunk_caller_talks_until_cue", TRUNK, "callee_answers", BOB, "+8225550100")
    await scene.caller.until_received("INVITE", 200)
    await scene.callee.until_received("ACK")
    await asyncio.sleep(0.2)
    return scene


async def test_call_outlives_a_killed_control_plane_without_a_lost_packet_or_a_message(stage: Stage) -> None:
    pair = stage.pair
    scene = await answered(stage)
    child = pair.pids("control")[1]
    talking = asyncio.create_task(scene.talk(frames=150))
    await asyncio.sleep(0.5)
    kill_main(pair, "control")
    await until_back(pair, "control", child)
    await talking
    assert len(scene.callee.received("INVITE")) == 1
    assert pair.metric("control", "sip_pbx_active_calls") == 1
    await scene.hang_up()
    cdr = await stage.cdr()
    assert termination(cdr) == ("answered", "hangup", 200)
    assert cdr["media_complete"]
    assert [stream["packets"] for stream in cdr["streams"]] == [150, 150]
    assert len(pair.cdrs()) == 1
    scene.check_legs_are_separate()


async def test_bye_that_came_while_the_control_plane_was_dead_is_served(stage: Stage) -> None:
    pair = stage.pair
    scene = await answered(stage)
    kill_main(pair, "control")
    scene.caller.cue()
    await scene.finish()
    assert termination(await stage.cdr()) == ("answered", "hangup", 200)


async def test_call_that_rang_is_ended_on_both_sides(stage: Stage) -> None:
    pair = stage.pair
    await stage.register(BOB)
    scene = await stage.call("trunk_caller_is_refused", TRUNK, "callee_rings_until_cancelled", BOB, "+8225550100")
    await scene.caller.until_received("INVITE", 180)
    await asyncio.sleep(0.2)
    kill_main(pair, "control")
    await scene.finish()
    assert termination(await stage.cdr()) == ("failed", "node-restarted", 503)


async def test_call_outlives_a_killed_data_plane(stage: Stage) -> None:
    pair = stage.pair
    scene = await answered(stage)
    child = pair.pids("dataplane")[1]
    kill_main(pair, "dataplane")
    await until_back(pair, "dataplane", child)
    await until_restored(stage)
    await scene.talk(frames=50)
    await scene.hang_up()
    cdr = await stage.cdr()
    assert termination(cdr) == ("answered", "hangup", 200)
    assert cdr["media_interruptions"] == 1
    assert 0 < cdr["media_gap_s"] < 10


async def test_call_outlives_both_planes_killed_at_once(stage: Stage) -> None:
    pair = stage.pair
    scene = await answered(stage)
    children = {plane: pair.pids(plane)[1] for plane in ("control", "dataplane")}
    for plane in children:
        kill_main(pair, plane)
    for plane, child in children.items():
        await until_back(pair, plane, child)
    await until_restored(stage)
    await scene.talk(frames=50)
    await scene.hang_up()
    assert termination(await stage.cdr()) == ("answered", "hangup", 200)
    assert len(pair.cdrs()) == 1


async def test_stopped_control_plane_goes_on_where_it_was(stage: Stage) -> None:
    pair = stage.pair
    await stage.register(ALICE)
    scene = await answered(stage)
    pair.freeze("control")
    await asyncio.sleep(2)
    scene.caller.cue()
    await asyncio.sleep(0.2)
    pair.thaw("control")
    await scene.finish()
    assert termination(await stage.cdr()) == ("answered", "hangup", 200)


async def test_phones_are_known_to_the_next_control_plane(stage: Stage) -> None:
    pair = stage.pair
    await stage.register(BOB)
    child = pair.pids("control")[1]
    kill_main(pair, "control")
    await until_back(pair, "control", child)
    assert pair.metric("control", "sip_pbx_registrations") == 1
    scene = await stage.call("trunk_caller_talks_until_cue", TRUNK, "callee_answers", BOB, "+8225550100")
    await scene.talk()
    await scene.hang_up()
    assert termination(await stage.cdr()) == ("answered", "hangup", 200)
