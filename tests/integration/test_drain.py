"""SIGTERM: nothing new is taken, what runs goes on and is served, and what is left at the deadline is ended."""

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from sippbx.client import Client, ClientError
from sippbx.softphone.message import SipMessage, request
from tests.harness.pair import Pair
from tests.harness.stage import ALICE, BOB, TRUNK, Scene, Stage, packets, termination
from tests.integration.conftest import SIPP_SETTINGS

pytestmark = pytest.mark.integration


@pytest.fixture
def drain_timeout_s() -> float:
    return 30.0


@pytest.fixture
def pair(tmp_path: Path, drain_timeout_s: float) -> Iterator[Pair]:
    """A pair of its own for each test: none of them leaves it as it was."""
    control: dict[str, Any] = {**SIPP_SETTINGS, "drain": {"timeout_s": drain_timeout_s}}
    dataplane = {"lease": {"drain_timeout_s": 60, "owner_grace_s": 5}}
    with Pair(tmp_path / "pair", control=control, dataplane=dataplane) as started:
        yield started


@pytest.fixture
async def stage(pair: Pair, tmp_path: Path) -> AsyncIterator[Stage]:
    async with Stage(pair, tmp_path) as made:
        yield made


async def answered(stage: Stage) -> Scene:
    await stage.register(BOB)
    scene = await stage.call("trunk_caller_talks_until_cue", TRUNK, "callee_answers", BOB, "+8225550100")
    await scene.caller.until_received("INVITE", 200)
    await scene.callee.until_received("ACK")
    return scene


def ask(pair: Pair, method: str) -> SipMessage:
    """The final answer to a request from outside of any dialog."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as phone:
        phone.bind((ALICE.host, ALICE.port))
        phone.settimeout(5)
        via = f"SIP/2.0/UDP {ALICE.host}:{ALICE.port};branch=z9hG4bK{method}"
        fields = [
            ("Via", via),
            ("From", f"<sip:1001@{ALICE.host}>;tag={method}"),
            ("To", "<sip:1002@pbx>"),
            ("Call-ID", method),
            ("CSeq", f"1 {method}"),
            ("Contact", f"<sip:1001@{ALICE.host}:{ALICE.port}>"),
            ("Max-Forwards", "70"),
        ]
        phone.sendto(request(method, "sip:1002@pbx", fields).encode(), pair.sip)
        while True:
            answer = SipMessage.parse(phone.recv(65_535))
            if answer.status >= 200:
                return answer


def signal_both(pair: Pair) -> None:
    """As Kubernetes does: both containers get the signal at once."""
    for supervisor in pair.supervisors.values():
        supervisor.send_signal(signal.SIGTERM)


async def exit_codes(pair: Pair) -> dict[str, int]:
    return {name: await asyncio.to_thread(supervisor.wait, 20) for name, supervisor in pair.supervisors.items()}


async def test_signal_to_both_planes_lets_the_call_go_on_and_refuses_new_ones(stage: Stage) -> None:
    pair = stage.pair
    scene = await answered(stage)
    signal_both(pair)
    await stage.until(lambda: not pair.is_ready("control"), 5, "the control plane is unready")

    for method in ("INVITE", "REGISTER", "OPTIONS"):
        answer = await asyncio.to_thread(ask, pair, method)
        assert (answer.status, int(answer.require("Retry-After"))) == (503, 10)

    await scene.talk(frames=50)
    assert pair.supervisors["control"].poll() is None
    assert pair.supervisors["dataplane"].poll() is None
    await scene.hang_up()
    assert await exit_codes(pair) == {"dataplane": 0, "control": 0}
    cdr = pair.cdrs()[-1]
    assert termination(cdr) == ("answered", "hangup", 200)
    assert packets(cdr) == {("caller", "audio"): (50, 51, 0), ("callee", "audio"): (50, 51, 0)}
    assert cdr["media_complete"]


@pytest.mark.parametrize("drain_timeout_s", [1.0])
async def test_call_that_outlasts_the_deadline_is_ended_with_bye_and_a_reason(stage: Stage) -> None:
    pair = stage.pair
    scene = await answered(stage)
    signal_both(pair)
    for actor in (scene.caller, scene.callee):
        bye = await actor.until_received("BYE")
        assert bye.require("Reason") == 'SIP;cause=200;text="draining"'
    assert await exit_codes(pair) == {"dataplane": 0, "control": 0}
    cdr = pair.cdrs()[-1]
    assert termination(cdr) == ("answered", "draining", 200)
    assert cdr["media_complete"]


async def test_second_signal_ends_the_calls_at_once(stage: Stage) -> None:
    pair = stage.pair
    scene = await answered(stage)
    signal_both(pair)
    await stage.until(lambda: not pair.is_ready("control"), 5, "the control plane is unready")
    pair.supervisors["control"].send_signal(signal.SIGTERM)
    await scene.callee.until_received("BYE")
    assert await exit_codes(pair) == {"dataplane": 0, "control": 0}
    assert termination(pair.cdrs()[-1]) == ("answered", "draining", 200)


async def test_drain_over_the_api_refuses_new_calls_and_leaves_the_process_running(stage: Stage) -> None:
    pair = stage.pair
    scene = await answered(stage)
    async with Client(pair.grpc_target, pair.api_key) as client:
        node = await client.drain()
        assert (node.draining, node.ready, list(node.not_ready_reasons)) == (True, False, ["draining"])
        with pytest.raises(ClientError, match="draining"):
            await client.originate("late", caller="1002", callee="1001")
        await scene.hang_up()
        await stage.cdr()
        assert (await client.node()).active_calls == 0
    assert pair.supervisors["control"].poll() is None
    assert pair.metric("control", "sip_pbx_draining") == 1


async def test_idle_pair_leaves_at_once(stage: Stage) -> None:
    signal_both(stage.pair)
    assert await exit_codes(stage.pair) == {"dataplane": 0, "control": 0}
