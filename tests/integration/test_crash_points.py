"""A control plane killed before and after every write and every message of a call, and what far ends, data plane and
store have of it: see tests/harness/crash_points.py for what is looked at.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.crash_points import STORIES

pytestmark = pytest.mark.integration

SEED = 1


@pytest.mark.parametrize("story", STORIES)
def test_call_survives_a_kill_at_every_point_of_its_life(story: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.harness.crash_points", str(tmp_path), story, str(SEED)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.stdout == ""
    assert run.returncode == 0, run.stderr
    print(run.stderr)
    kills = re.search(r"(\d+) kills", run.stderr)
    assert kills is not None
    assert int(kills[1]) > 40, "each write, commit and message was a point, most of them with another behind it"
