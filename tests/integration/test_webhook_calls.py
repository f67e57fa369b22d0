"""Webhooks of real calls: signed events for a receiver, over a crash of the control plane, too."""

import asyncio
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from aiohttp import web
from standardwebhooks import Webhook

from tests.harness.pair import NETWORK, Pair
from tests.harness.stage import BOB, TRUNK, Stage
from tests.integration.conftest import SIPP_SETTINGS

pytestmark = pytest.mark.integration

SECRET = "whsec_" + b64encode(b"secret of the receiver, 32 bytes").decode()
RECEIVER = (f"{NETWORK}.61", 26100)


class Receiver:
    """A webhook endpoint that can be switched off, and the events that it was sent, signatures checked."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        application = web.Application()
        application.router.add_post("/hook", self._take)
        self._runner = web.AppRunner(application, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, *RECEIVER).start()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _take(self, request: web.Request) -> web.Response:
        self.events.append(Webhook(SECRET).verify(await request.read(), dict(request.headers)))
        return web.Response(status=204)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    """A pair of its own for each test, so that none inherits what another left undelivered."""
    host, port = RECEIVER
    webhook = {"name": "crm", "url": f"http://{host}:{port}/hook", "secret": SECRET}
    with Pair(tmp_path / "pair", control={**SIPP_SETTINGS, "webhooks": [webhook]}) as started:
        yield started


@pytest.fixture
async def stage(pair: Pair, tmp_path: Path) -> AsyncIterator[Stage]:
    async with Stage(pair, tmp_path) as made:
        yield made


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    made = Receiver()
    await made.start()
    yield made
    await made.stop()


async def one_call(stage: Stage) -> dict[str, Any]:
    """A call that 1002 answers and ends; its record."""
    await stage.register(BOB)
    scene = await stage.call("trunk_caller_is_hung_up", TRUNK, "callee_hangs_up_on_cue", BOB, "+8225550100")
    await scene.callee.until_received("ACK")
    scene.callee.cue()
    await scene.finish()
    return await stage.cdr()


async def test_webhook_hears_of_phones_and_calls_in_signed_events(stage: Stage, receiver: Receiver) -> None:
    cdr = await one_call(stage)

    def heard() -> list[dict[str, Any]]:
        return [event for event in receiver.events if event.get("subject") == cdr["call_id"]]

    await stage.until(lambda: len(heard()) == 4, 10, "all events of the call are delivered")
    assert sorted(event["type"] for event in heard()) == [
        "sippbx.call.answered",
        "sippbx.call.ended",
        "sippbx.call.ringing",
        "sippbx.call.started",
    ]
    (ended,) = [event for event in heard() if event["type"] == "sippbx.call.ended"]
    assert ended["data"] == cdr


async def test_events_that_were_not_delivered_survive_a_killed_control_plane(stage: Stage) -> None:
    pair = stage.pair
    cdr = await one_call(stage)
    await stage.until(
        lambda: pair.metric("control", "sip_pbx_webhook_deliveries_total", endpoint="crm", result="retry") > 0,
        10,
        "an attempt has failed",
    )
    (_, child, *_) = pair.pids("control")
    psutil.Process(child).kill()
    await asyncio.to_thread(pair.wait, lambda: not psutil.pid_exists(child), 5, "it is dead")
    receiver = Receiver()
    await receiver.start()
    try:
        await asyncio.to_thread(pair.wait_until_ready, "control")
        wanted = f"evt_{cdr['call_id']}_ended"
        await stage.until(lambda: wanted in [event["id"] for event in receiver.events], 20, "it is delivered")
        assert [event["data"] for event in receiver.events if event["id"] == wanted] == [cdr]
    finally:
        await receiver.stop()
