"""The images as they are shipped: two containers of a pod that share a network and a socket, and nothing else."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.containers import PLANES, CannotRunError, ContainerPair, Podman, missing
from tests.harness.stage import ALICE, BOB, TRUNK, Party, Stage, packets, termination

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(missing()), reason=missing())]

SIPP_SETTINGS = {"digest_algorithms": ["MD5"]}
LATECOMER = Party(TRUNK.user, TRUNK.host, TRUNK.port + 1, TRUNK.audio_port + 10)
EXIT_S = 20.0


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    try:
        with Podman() as built:
            yield built
    except CannotRunError as error:
        pytest.skip(str(error))


async def test_a_call_goes_through_the_planes_as_containers(podman: Podman, tmp_path: Path) -> None:
    with ContainerPair(tmp_path / "pair", podman, control=SIPP_SETTINGS) as pair:
        async with Stage(pair, tmp_path) as stage:
            await stage.register(ALICE, BOB)
            scene = await stage.call("caller_talks_until_cue", ALICE, "callee_answers", BOB, "1002")
            await scene.talk()
            await scene.hang_up()
            cdr = await stage.cdr()
        assert termination(cdr) == ("answered", "hangup", 200)
        assert packets(cdr) == {("caller", "audio"): (25, 26, 0), ("callee", "audio"): (25, 26, 0)}


def test_the_planes_have_no_rights_and_only_their_own_command(podman: Podman, tmp_path: Path) -> None:
    with ContainerPair(tmp_path / "pair", podman) as pair:
        for plane in PLANES:
            status = dict(
                line.split(":", 1) for line in pair.execute(plane, "cat", "/proc/1/status").splitlines() if ":" in line
            )
            assert status["Uid"].split() == ["10001"] * 4
            assert int(status["CapBnd"], 16) == 0
            assert status["NoNewPrivs"].strip() == "1"
            (root,) = [
                line.split()[3]
                for line in pair.execute(plane, "cat", "/proc/mounts").splitlines()
                if line.split()[1] == "/"
            ]
            assert "ro" in root.split(",")
            packages = pair.execute(plane, "ls", "/opt/sippbx/bin", "/opt/sippbx/lib/").split()
            assert not {"pip", "ruff", "pytest", "mypy"} & set(packages)
        assert "Usage: sippbx" in pair.execute("control", "sippbx", "--help")


async def test_both_planes_drain_when_they_get_the_signal_at_once(podman: Podman, tmp_path: Path) -> None:
    patience = {"drain": {"timeout_s": 60}} | SIPP_SETTINGS
    with ContainerPair(
        tmp_path / "pair", podman, control=patience, dataplane={"lease": {"drain_timeout_s": 90}}
    ) as pair:
        async with Stage(pair, tmp_path) as stage:
            await stage.register(ALICE, BOB)
            scene = await stage.call("caller_talks_until_cue", ALICE, "callee_answers", BOB, "1002")
            await scene.talk()

            await asyncio.to_thread(pair.terminate)
            await stage.until(lambda: not any(map(pair.is_ready, PLANES)), 5, "both planes are unready")
            latecomer = await stage.actor("trunk_caller_is_refused", LATECOMER, dials="+8225550100")
            await latecomer.finish()
            (refusal,) = latecomer.received("INVITE", 503)
            assert int(refusal.require("Retry-After")) > 0

            log = pair.folder / "dataplane.log"
            await stage.until(lambda: "node.draining" in log.read_text(), 5, "the data plane takes no sessions")
            await scene.talk()
            assert [pair.supervisors[plane].poll() for plane in PLANES] == [None, None]

            await scene.hang_up()
            codes = [await asyncio.to_thread(pair.supervisors[plane].wait, EXIT_S) for plane in PLANES]
            assert codes == [0, 0]
        control_ended, dataplane_ended = (pair.inspect(plane, "{{.State.FinishedAt.UnixNano}}") for plane in PLANES)
        assert int(control_ended) <= int(dataplane_ended), "the data plane goes last"
        (answered,) = [cdr for cdr in pair.cdrs() if termination(cdr) == ("answered", "hangup", 200)]
        received_and_relayed = {leg: counts[:2] for (leg, _), counts in packets(answered).items()}
        assert received_and_relayed == {"caller": (50, 52), "callee": (50, 52)}
