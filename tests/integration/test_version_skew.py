"""Each plane beside the other one of an earlier version: a call with media goes through either way.

The earlier version is the newest tag and, before there is one, the commit that closed the first issue.
"""

import asyncio
import signal
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.harness.pair import Pair
from tests.harness.stage import BOB, TRUNK, Scene, Stage, termination
from tests.integration.conftest import SIPP_SETTINGS

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
BEFORE_ANY_TAG = "4c14cb0"
# Sections of the control plane's settings that came later than that commit; there, records had a store of their own.
LATER_SECTIONS = ("store", "api", "events", "drain")


def git(*arguments: str) -> bytes | None:
    """What git says in this clone; None when it says no, or there is no git."""
    try:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources of the earlier version."""
    tag = git("describe", "--tags", "--abbrev=0")
    revision = tag.decode().strip() if tag else BEFORE_ANY_TAG
    archive = git("archive", "--format=tar", revision)
    if archive is None:
        pytest.skip(f"{revision} is not in this clone, or there is no git")
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(fileobj=BytesIO(archive)) as sources:
        sources.extractall(folder, filter="data")
    return folder


class SkewedPair(Pair):
    """A pair of which one plane is of the earlier version."""

    def __init__(self, folder: Path, *, plane: str, sources: Path, control: dict[str, Any]) -> None:
        super().__init__(folder, control=control)
        self.earlier_plane = plane
        self._sources = sources
        settings = self.settings["control"]
        if plane == "control" and (sources / "control" / "settings.py").exists():
            for section in LATER_SECTIONS:
                settings.pop(section, None)
            settings["cdr"]["sqlite_path"] = str(self.store_path)
            sip = settings["sip"]
            sip["listeners"] = [each for each in sip["listeners"] if each.get("transport", "udp") == "udp"]

    def start(self, plane: str) -> None:
        """Start the supervisor of a plane, from the sources that it is to be of."""
        if plane != self.earlier_plane:
            super().start(plane)
            return
        config = self.folder / f"{plane}.yaml"
        config.write_text(yaml.safe_dump(self.settings[plane]))
        with (self.folder / f"{plane}.log").open("ab") as log:
            command = [sys.executable, "-m", plane, "--supervise", "--config", str(config)]
            self.supervisors[plane] = subprocess.Popen(
                command, cwd=self._sources, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def check_sources(self) -> None:
        """Check that the earlier plane is what it is called.

        Raises:
            AssertionError: it runs other sources.
        """
        for pid in self.pids(self.earlier_plane):
            assert Path(psutil.Process(pid).cwd()) == self._sources


@contextmanager
def skewed(folder: Path, plane: str, sources: Path) -> Iterator[SkewedPair]:
    control = {**SIPP_SETTINGS, "media": {"lost_timeout_s": 10}}
    with SkewedPair(folder / "pair", plane=plane, sources=sources, control=control) as pair:
        pair.check_sources()
        yield pair


@asynccontextmanager
async def answered(pair: Pair, folder: Path) -> AsyncIterator[tuple[Stage, Scene]]:
    async with Stage(pair, folder) as stage:
        await stage.register(BOB)
        scene = await stage.call("trunk_caller_talks_until_cue", TRUNK, "callee_answers", BOB, "+8225550100")
        await scene.caller.until_received("INVITE", 200)
        await scene.callee.until_received("ACK")
        yield stage, scene


@pytest.mark.parametrize("plane", ["control", "dataplane"])
async def test_a_call_with_media_goes_through_with_one_plane_of_the_earlier_version(
    plane: str, earlier: Path, tmp_path: Path
) -> None:
    with skewed(tmp_path, plane, earlier) as pair:
        async with answered(pair, tmp_path) as (stage, scene):
            await scene.talk(frames=50)
            await scene.hang_up()
            cdr = await stage.cdr()
        assert termination(cdr) == ("answered", "hangup", 200)
        assert cdr["media_complete"]
        assert [stream["packets"] for stream in cdr["streams"]] == [50, 50]
        scene.check_legs_are_separate()
        for name in ("control", "dataplane"):
            assert pair.metric(name, "sip_pbx_errors_total") == 0


async def test_a_call_outlives_a_killed_control_plane_beside_an_earlier_data_plane(
    earlier: Path, tmp_path: Path
) -> None:
    with skewed(tmp_path, "dataplane", earlier) as pair:
        async with answered(pair, tmp_path) as (stage, scene):
            await asyncio.sleep(0.2)
            child = pair.pids("control")[1]
            talking = asyncio.create_task(scene.talk(frames=150))
            await asyncio.sleep(0.5)
            psutil.Process(child).send_signal(signal.SIGKILL)
            await stage.until(_is_back(pair, child), 10, "the control plane is back")
            await talking
            await scene.hang_up()
            cdr = await stage.cdr()
        assert termination(cdr) == ("answered", "hangup", 200)
        assert [stream["packets"] for stream in cdr["streams"]] == [150, 150]


def _is_back(pair: Pair, before: int) -> Callable[[], bool]:
    def back() -> bool:
        pids = pair.pids("control")
        return len(pids) > 1 and pids[1] != before and pair.is_ready("control")

    return back
