"""What other programs see of calls on the real pair, over HTTP and in the metrics."""

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from tests.harness.pair import Pair
from tests.harness.stage import BOB, TRUNK, Scene, Stage, termination

pytestmark = pytest.mark.integration


@pytest.fixture
async def http(pair: Pair) -> AsyncIterator[aiohttp.ClientSession]:
    headers = {"Authorization": f"Bearer {pair.api_key}"}
    async with aiohttp.ClientSession(pair.http_url, headers=headers) as client:
        yield client


async def get(http: aiohttp.ClientSession, path: str, status: int = 200) -> Any:
    async with http.get(path) as response:
        assert response.status == status, await response.text()
        return await response.json(content_type=None)


async def answered(stage: Stage) -> Scene:
    scene = await stage.call("trunk_caller_is_hung_up", TRUNK, "callee_answers", BOB, "+8225550100")
    await scene.callee.until_received("ACK")
    return scene


async def test_call_is_seen_and_hung_up_over_http(stage: Stage, http: aiohttp.ClientSession) -> None:
    await stage.register(BOB)
    registrations = await get(http, "/v1/registrations?user=1002")
    assert [phone["source"] for phone in registrations["registrations"]] == [f"{BOB.host}:{BOB.port}"]
    scene = await answered(stage)
    (call,) = (await get(http, "/v1/calls"))["calls"]
    assert (call["state"], call["direction"], call["callee"]) == ("established", "inbound", "+8225550100")
    async with http.post(f"/v1/calls/{call['call_id']}/hangup") as response:
        assert response.status == 200
    await scene.finish()
    cdr = await stage.cdr()
    assert termination(cdr) == ("answered", "api-hangup", 200)
    assert cdr["termination"]["detail"]
    assert (await get(http, f"/v1/calls/{call['call_id']}"))["state"] == "ended"
    assert (await get(http, "/v1/cdrs?page_size=1"))["cdrs"] == [cdr]


async def hang_up_over_http(pair: Pair) -> None:
    async with aiohttp.ClientSession(pair.http_url, headers={"Authorization": f"Bearer {pair.api_key}"}) as client:
        for call in (await get(client, "/v1/calls"))["calls"]:
            async with client.post(f"/v1/calls/{call['call_id']}/hangup") as response:
                assert response.status == 200


async def test_metrics_tell_of_events_and_requests(stage: Stage, http: aiohttp.ClientSession) -> None:
    await get(http, "/v1/node")
    pair = stage.pair
    assert pair.metric("control", "sip_pbx_http_request_seconds_count", route="/v1/node", method="GET", code="200") >= 1
    before = pair.metric("control", "sip_pbx_events_total", type="call.ended")
    await stage.register(BOB)
    scene = await answered(stage)
    await hang_up_over_http(pair)
    await scene.finish()
    await stage.cdr()
    assert pair.metric("control", "sip_pbx_events_total", type="call.ended") == before + 1
