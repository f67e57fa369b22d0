"""The demonstration call: with a pair of its own, with one that runs, and with one that refuses it."""

from pathlib import Path

import pytest

from sippbx.demo import run_demo
from tests.harness.pair import HOST, USERS, Pair

pytestmark = pytest.mark.integration


async def test_demo_starts_a_pair_of_its_own_and_shows_the_record(tmp_path: Path) -> None:
    told: list[str] = []
    assert await run_demo(tmp_path / "nobody-runs-here", tell=told.append, talk_s=0.5) == 0
    text = "\n".join(told)
    assert "1001 sent 25 packets and received 25, 0 damaged" in text
    assert "1002 sent 25 packets and received 25, 0 damaged" in text
    assert "1001 -> 1002, answered (hangup)" in text
    assert [line.split()[:3] for line in text.splitlines()[-2:]] == [
        ["caller", "audio", "25"],
        ["callee", "audio", "25"],
    ]


async def test_demo_uses_a_running_pair_and_fails_plainly_where_it_is_refused(pair: Pair) -> None:
    for passwords, expected in ((USERS, 0), (dict.fromkeys(USERS, "guess"), 1)):
        told: list[str] = []
        pair.description(passwords).write()
        assert await run_demo(pair.folder, tell=told.append, talk_s=0.1) == expected
        assert told[0] == f"using the pair at {HOST}:{pair.sip[1]}"
        assert ("REGISTER was refused" in told[-1]) is bool(expected)


async def test_demo_names_the_refusal_of_its_call(pair: Pair) -> None:
    told: list[str] = []
    passwords = {"1001": USERS["1001"], "1002": USERS["1002"]}
    pair.description(passwords).write()
    pair.kill("dataplane")
    assert await run_demo(pair.folder, tell=told.append, talk_s=0.1) == 1
    assert "INVITE was refused: 503" in told[-1]
    pair.start("dataplane")
    pair.wait_until_ready("control")
