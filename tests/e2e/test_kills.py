"""Calls through a pair whose processes are killed or stopped: nobody on the phone notices, and the books are right.

`SIPPBX_KILLS_SEED=N` repeats the draws of a run; each round prints its own seed.
"""

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.kill_plans import Manner, Moment, Plan
from tests.harness.kill_verdicts import Result
from tests.harness.kills import SETTINGS, Round, Striker
from tests.harness.pair import Pair

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

CALLS = 20
CONTROL, DATAPLANE = ("control",), ("dataplane",)
EACH_ORDER = (("control", "dataplane"), ("dataplane", "control"))
SOAK_ROUNDS, SOAK_CALLS, SOAK_STOP_S = 50, 100, 10.0
SOAK_LIMIT_S = 3600


@pytest.fixture(scope="module")
def striker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Striker]:
    """One pair for the short rounds."""
    with Pair(tmp_path_factory.mktemp("pair"), **SETTINGS) as pair:
        yield Striker(pair)


@pytest.fixture
def seed() -> int:
    """Of this run's draws."""
    return int(os.environ.get("SIPPBX_KILLS_SEED") or random.randrange(2**32))


async def held(striker: Striker, plan: Plan) -> Result:
    """Run a round, in which all must hold."""
    print(plan)
    result = await Round(striker, plan).run()
    print(result)
    assert not result.wrong, "\n".join([str(result), *result.wrong])
    return result


@pytest.mark.parametrize("manner", [Manner.PROCESS, Manner.GROUP], ids=["process", "group"])
async def test_killed_control_plane_costs_no_packet_and_no_call(striker: Striker, manner: Manner, seed: int) -> None:
    quiet = await held(striker, Plan(seed, CALLS))
    struck = await held(striker, Plan(seed, CALLS, CONTROL, manner))
    assert (quiet.lost, struck.lost) == (0, 0)
    assert min(quiet.sent, struck.sent) > CALLS * 2 * 25


@pytest.mark.parametrize("manner", [Manner.PROCESS, Manner.GROUP], ids=["process", "group"])
async def test_killed_data_plane_relays_again_on_the_same_ports(striker: Striker, manner: Manner, seed: int) -> None:
    result = await held(striker, Plan(seed, CALLS, DATAPLANE, manner))
    assert 0 < result.lost < result.sent
    assert len(result.told_gaps_s) == CALLS


@pytest.mark.parametrize("manner", [Manner.PROCESS, Manner.GROUP], ids=["process", "group"])
@pytest.mark.parametrize("planes", EACH_ORDER, ids=" then ".join)
async def test_both_planes_killed_cost_no_call(
    striker: Striker, planes: tuple[str, ...], manner: Manner, seed: int
) -> None:
    await held(striker, Plan(seed, CALLS, planes, manner))


@pytest.mark.parametrize("moment", [Moment.ANSWERED, Moment.CHANGING, Moment.HANGING_UP], ids=lambda each: each.value)
async def test_kill_within_a_transaction_costs_no_call(striker: Striker, moment: Moment, seed: int) -> None:
    result = await held(striker, Plan(seed, CALLS, CONTROL, moment=moment))
    assert result.reasons == {"hangup": CALLS}


async def test_calls_that_ring_when_the_control_plane_is_killed_end_on_both_sides(striker: Striker, seed: int) -> None:
    result = await held(striker, Plan(seed, CALLS, CONTROL, moment=Moment.RINGING))
    assert result.reasons == {"node-restarted": CALLS / 2, "hangup": CALLS / 2}


@pytest.mark.parametrize("planes", [CONTROL, DATAPLANE], ids=" then ".join)
async def test_plane_that_was_stopped_goes_on_where_it_was(
    striker: Striker, planes: tuple[str, ...], seed: int
) -> None:
    result = await held(striker, Plan(seed, CALLS, planes, Manner.STOP))
    assert result.reasons == {"hangup": CALLS}


async def test_control_plane_killed_again_and_again_under_load_costs_no_call_that_was_answered(
    striker: Striker, seed: int
) -> None:
    plan = Plan(seed, 2 * CALLS, CONTROL, moment=Moment.ANY, blows=3, calls_per_s=10)
    result = await held(striker, plan)
    assert result.reasons["hangup"] > CALLS


def soak_plans(chance: random.Random) -> Iterator[Plan]:
    """Rounds of every kind; each tenth is followed by the same one with nothing killed."""
    for number in range(SOAK_ROUNDS):
        moment = chance.choice(list(Moment))
        plan = Plan(
            seed=chance.randrange(2**32),
            calls=SOAK_CALLS,
            planes=chance.choice([CONTROL, DATAPLANE, *EACH_ORDER]),
            manner=chance.choice(list(Manner)),
            moment=moment,
            blows=chance.randint(1, 4) if moment is Moment.ANY else 1,
            stop_s=SOAK_STOP_S,
            calls_per_s=10 if moment is Moment.ANY else 25,
        )
        yield plan
        if number % 10 == 9:
            yield Plan(plan.seed, plan.calls, moment=plan.moment, calls_per_s=plan.calls_per_s)


@pytest.mark.soak
@pytest.mark.timeout(SOAK_LIMIT_S)
async def test_fifty_rounds_of_a_hundred_calls_with_kills_of_every_kind(tmp_path: Path, seed: int) -> None:
    print(f"\nseed {seed}")
    wrong: list[str] = []
    started_at = time.monotonic()
    with Pair(tmp_path / "pair", **SETTINGS) as pair:
        striker = Striker(pair)
        for number, plan in enumerate(soak_plans(random.Random(seed)), 1):
            result = await Round(striker, plan).run()
            print(f"{number:>3} {result}", *result.wrong[:10], sep="\n      ", flush=True)
            wrong += [f"{number} ({plan}): {what}" for what in result.wrong]
    print(f"{time.monotonic() - started_at:.0f} s in all")
    assert not wrong, "\n".join(wrong)
