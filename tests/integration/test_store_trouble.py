"""The pair on a full disk and with a locked store: calls that run go on and get their records, new ones get 503."""

import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.harness.disk import fill, small_disk
from tests.harness.pair import Pair
from tests.harness.stage import BOB, TRUNK, Scene, Stage, termination
from tests.integration.conftest import SIPP_SETTINGS

pytestmark = pytest.mark.integration

MIB = 1024 * 1024
# While one call of the trunk runs: its address is taken, another port of it is not.
OTHER_CALLER = replace(TRUNK, port=TRUNK.port + 1, audio_port=TRUNK.audio_port + 10)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 16 * MIB) as folder:
        yield folder


@pytest.fixture
def pair(tmp_path: Path, disk: Path) -> Iterator[Pair]:
    store = {"path": str(disk / "sippbx.sqlite"), "reserve_bytes": 2 * MIB, "slow_after_s": 0.3}
    with Pair(tmp_path / "pair", control={**SIPP_SETTINGS, "store": store}) as started:
        yield started


@pytest.fixture
async def stage(pair: Pair, tmp_path: Path) -> AsyncIterator[Stage]:
    async with Stage(pair, tmp_path) as made:
        yield made


@contextmanager
def locked(store: Path) -> Iterator[None]:
    """Somebody holds the file."""
    other = sqlite3.connect(store, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        other.close()


async def answered(stage: Stage) -> Scene:
    await stage.register(BOB)
    scene = await stage.call("trunk_caller_talks_until_cue", TRUNK, "callee_answers", BOB, "+8225550100")
    await scene.callee.until_received("ACK")
    return scene


async def refused(stage: Stage, dials: str) -> int:
    """The status of another call."""
    caller = await stage.actor("trunk_caller_is_refused", OTHER_CALLER, dials=dials)
    await caller.finish()
    assert caller.final_status is not None
    return caller.final_status


async def until_refusing(stage: Stage) -> None:
    await stage.until(lambda: not stage.pair.is_ready("control"), 10, "new calls are refused")


async def until_ready(stage: Stage) -> None:
    await stage.until(lambda: stage.pair.is_ready("control"), 15, "new calls are taken again")


def terminations(pair: Pair) -> list[tuple[str, str, int]]:
    return [termination(cdr) for cdr in pair.cdrs()]


async def test_on_a_full_disk_calls_go_on_new_ones_are_refused_and_each_has_its_record(
    stage: Stage, disk: Path
) -> None:
    scene = await answered(stage)
    filler = fill(disk)
    # Its record is the first that finds no room, unless one of the call before was.
    assert await refused(stage, "12345") in {404, 503}
    await until_refusing(stage)
    assert await refused(stage, "+8225550100") == 503
    await scene.talk(frames=20)
    await scene.hang_up()
    filler.unlink()
    await until_ready(stage)
    await stage.until(lambda: len(stage.pair.cdrs()) == 3, 10, "all records are in the file")
    assert terminations(stage.pair)[1:] == [
        ("rejected", "store-unavailable", 503),
        ("answered", "hangup", 200),
    ]


async def test_with_a_locked_store_calls_go_on_new_ones_are_refused_and_each_has_its_record(
    stage: Stage, disk: Path
) -> None:
    scene = await answered(stage)
    with locked(disk / "sippbx.sqlite"):
        assert await refused(stage, "12345") == 404
        await until_refusing(stage)
        assert await refused(stage, "+8225550100") == 503
        await scene.talk(frames=20)
    await until_ready(stage)
    await scene.hang_up()
    await stage.until(lambda: len(stage.pair.cdrs()) == 3, 10, "all records are in the file")
    assert sorted(reason for _, reason, _ in terminations(stage.pair)) == [
        "hangup", "store-unavailable", "unknown-number",
    ]  # fmt: skip
