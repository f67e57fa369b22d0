"""A program that drives calls over gRPC, while SIPp plays the phones."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from sippbx.client import Client, ClientError
from sippbx.control.v1 import call_service_pb2
from tests.harness.pair import HOST, Pair
from tests.harness.stage import ALICE, BOB, TRUNK, Scene, Stage, packets, termination

pytestmark = pytest.mark.integration


class Orchestrator:
    """tests.harness.orchestrator, running, and what it has printed."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, pair: Pair, *arguments: str) -> "Orchestrator":
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.harness.orchestrator", pair.grpc_target, pair.api_key, *arguments),
            stdout=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        return cls(process)

    async def line(self) -> str:
        assert self._process.stdout is not None
        return (await asyncio.wait_for(self._process.stdout.readline(), 15)).decode().strip()

    async def finish(self) -> int:
        return await asyncio.wait_for(self._process.wait(), 15)

    async def stop(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()


@pytest.fixture
async def client(pair: Pair) -> AsyncIterator[Client]:
    async with Client(pair.grpc_target, pair.api_key) as made:
        yield made


async def talk(scene: Scene, frames: int = 25) -> None:
    """Both parties of an originated call hear each other: the caller where its re-INVITE said."""
    told = await scene.caller.media("INVITE", count=2)
    offered = await scene.callee.media("INVITE")
    lines = [*scene.stage.endpoints(ALICE, ("audio",)), *scene.stage.endpoints(BOB, ("audio",))]
    for line, (remote,) in zip(lines, (told, offered), strict=True):
        assert remote.host == HOST
        line.connect(remote.host, remote.port, remote.rtcp_port)
    await asyncio.gather(*(line.send_frames(frames) for line in lines))
    for line in lines:
        await line.wait_for(frames, 5)
        assert (line.report.received, line.report.missing_of(frames)) == (frames, [])


async def test_orchestrator_originates_a_call_follows_it_to_its_end_and_hangs_up_another(stage: Stage) -> None:
    await stage.register(ALICE, BOB)
    caller = await stage.actor("originated_caller_answers", ALICE)
    callee = await stage.actor("callee_hangs_up_on_cue", BOB)
    scene = Scene(stage, caller, callee, ALICE, BOB)
    orchestrator = await Orchestrator.start(stage.pair, "order-1", "1001", "1002", TRUNK.user)
    try:
        assert await orchestrator.line() == "snapshot 0"
        assert await orchestrator.line() == "originated order-1"
        assert await orchestrator.line() == "call_ringing order-1 caller"
        assert await orchestrator.line() == "call_ringing order-1 callee"
        assert await orchestrator.line() == "call_answered order-1"
        await talk(scene)
        assert len(caller.received("INVITE")) == 2, "the second origination made no second call"
        callee.cue()
        assert (await orchestrator.line()).startswith("call_ended order-1 hangup ")
        await scene.finish()
        cdr = await stage.cdr()
        assert termination(cdr) == ("answered", "hangup", 200)
        assert cdr["termination"]["ended_by"] == "callee"
        assert (cdr["call_id"], cdr["caller"], cdr["callee"]) == ("order-1", "1001", "1002")
        assert packets(cdr) == {("caller", "audio"): (25, 25, 0), ("callee", "audio"): (25, 25, 0)}
        scene.check_legs_are_separate()

        other = await stage.call("trunk_caller_is_hung_up", TRUNK, "callee_answers", BOB, "+8225550100")
        await other.finish()
        lines = [await orchestrator.line() for _ in range(3)]
        cdr = await stage.cdr()
        kinds = [line.split()[0] for line in lines]
        assert kinds == ["call_ringing", "call_answered", "call_ended"]
        assert {line.split()[1] for line in lines} == {cdr["call_id"]}
        assert termination(cdr) == ("answered", "api-hangup", 200)
        for actor in (other.caller, other.callee):
            assert actor.received("BYE")[0].require("Reason") == 'SIP;cause=200;text="api-hangup"'
        assert await orchestrator.finish() == 0
    finally:
        await orchestrator.stop()


async def test_caller_that_does_not_pick_up_is_cancelled_by_a_hangup(stage: Stage, client: Client) -> None:
    await stage.register(ALICE, BOB)
    caller = await stage.actor("callee_rings_until_cancelled", ALICE)
    await client.originate("order-2", caller="1001", callee="1002")
    await caller.until_sent("INVITE", 180)
    assert [call.call_id for call in [call async for call in client.calls()]] == ["order-2"]
    call = await client.hang_up("order-2")
    assert call.state in {call_service_pb2.CALL_STATE_RELEASING, call_service_pb2.CALL_STATE_ENDED}
    await caller.finish()
    cdr = await stage.cdr()
    assert termination(cdr) == ("cancelled", "api-hangup", 480)
    ended = await client.get_call("order-2")
    assert ended.state == call_service_pb2.CALL_STATE_ENDED
    assert (await client.hang_up("order-2")).record == ended.record


async def test_caller_is_hung_up_when_the_callee_is_busy(stage: Stage, client: Client) -> None:
    await stage.register(ALICE, BOB)
    caller = await stage.actor("callee_answers", ALICE)
    callee = await stage.actor("callee_busy", BOB)
    await client.originate("order-3", caller="1001", callee="1002")
    await caller.finish()
    await callee.finish()
    assert termination(await stage.cdr()) == ("busy", "callee-busy", 486)
    assert caller.received("BYE")[0].require("Reason") == 'SIP;cause=486;text="callee-busy"'


async def test_call_between_a_user_and_the_trunk_is_originated(stage: Stage, client: Client) -> None:
    await stage.register(ALICE)
    caller = await stage.actor("originated_caller_answers", ALICE)
    callee = await stage.actor("callee_hangs_up_on_cue", TRUNK)
    await client.originate("order-4", caller="1001", callee="915550002222")
    await caller.until_received("ACK", count=2)
    assert (await callee.until_received("INVITE")).uri.startswith("sip:15550002222@")
    callee.cue()
    await caller.finish()
    await callee.finish()
    cdr = await stage.cdr()
    assert (cdr["direction"], cdr["caller"], cdr["callee"]) == ("outbound", "1001", "915550002222")


@pytest.mark.parametrize(
    ("callee", "code", "reason"),
    [
        ("1009", grpc.StatusCode.FAILED_PRECONDITION, "unknown-number"),
        ("1003", grpc.StatusCode.FAILED_PRECONDITION, "not-registered"),
        ("two words", grpc.StatusCode.INVALID_ARGUMENT, "bad-callee"),
    ],
)
async def test_call_that_cannot_be_made_is_refused_with_its_reason_and_leaves_no_record(
    stage: Stage, client: Client, callee: str, code: grpc.StatusCode, reason: str
) -> None:
    await stage.register(ALICE)
    records = len(stage.pair.cdrs())
    with pytest.raises(ClientError) as refused:
        await client.originate("order-5", caller="1001", callee=callee)
    assert (refused.value.code, refused.value.reason) == (code, reason)
    assert len(stage.pair.cdrs()) == records
