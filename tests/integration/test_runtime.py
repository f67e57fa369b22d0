"""Probes over HTTP, and signals as the kernel delivers them."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import aiohttp
import pytest
from prometheus_client import CollectorRegistry, Counter

from sippbx.runtime.lifecycle import Stop
from sippbx.runtime.probes import ProbeError, ProbeServer

pytestmark = pytest.mark.integration


class Plane:
    """A plane as its probes see it."""

    def __init__(self) -> None:
        self.unready: list[str] = []
        self.registry = CollectorRegistry()
        self.server = ProbeServer("127.0.0.1", 0, registry=self.registry, unready=lambda: self.unready)

    async def get(self, path: str, accept: str = "text/plain") -> tuple[int, str, str]:
        async with (
            aiohttp.ClientSession(headers={"Accept": accept}) as client,
            client.get(f"http://127.0.0.1:{self.server.port}{path}") as response,
        ):
            return response.status, response.content_type, await response.text()


@pytest.fixture
async def plane() -> AsyncIterator[Plane]:
    plane = Plane()
    await plane.server.start()
    yield plane
    await plane.server.stop()


async def test_ready_plane_answers_ok(plane: Plane) -> None:
    assert await plane.get("/readyz") == (200, "text/plain", "ok\n")


async def test_unready_plane_says_every_reason_and_is_alive_all_the_same(plane: Plane) -> None:
    plane.unready = ["data plane not connected", "draining"]
    assert await plane.get("/readyz") == (503, "text/plain", "data plane not connected\ndraining\n")
    assert (await plane.get("/livez"))[0] == 200


async def test_metrics_are_those_of_the_registry_without_created_series(plane: Plane) -> None:
    Counter("sip_pbx_calls", "Calls.", registry=plane.registry).inc(3)
    status, content_type, text = await plane.get("/metrics")
    assert (status, content_type) == (200, "text/plain")
    assert "sip_pbx_calls_total 3.0" in text
    assert "_created" not in text


async def test_scraper_that_asks_for_openmetrics_gets_it(plane: Plane) -> None:
    _, content_type, text = await plane.get("/metrics", accept="application/openmetrics-text; version=1.0.0")
    assert content_type == "application/openmetrics-text"
    assert text.endswith("# EOF\n")


async def test_other_paths_are_not_found(plane: Plane) -> None:
    assert (await plane.get("/"))[0] == 404


async def test_taken_port_is_named(plane: Plane) -> None:
    second = ProbeServer("127.0.0.1", plane.server.port, registry=plane.registry, unready=list)
    with pytest.raises(ProbeError, match=f"127.0.0.1 port {plane.server.port}"):
        await second.start()
    assert second.port == 0
    await second.stop()


async def test_stopped_server_leaves_its_port_free() -> None:
    plane = Plane()
    await plane.server.start()
    port = plane.server.port
    await plane.server.stop()
    again = ProbeServer("127.0.0.1", port, registry=plane.registry, unready=list)
    await again.start()
    await again.stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signals_are_requests_to_stop(number: signal.Signals) -> None:
    stop = Stop()
    with stop.on_signals(hangup=lambda: None):
        os.kill(os.getpid(), number)
        await asyncio.wait_for(stop.draining.wait(), 5)
        assert not stop.now.is_set()
        os.kill(os.getpid(), number)
        await asyncio.wait_for(stop.now.wait(), 5)
    assert signal.getsignal(number) in {signal.SIG_DFL, signal.default_int_handler}


async def test_hangup_is_heard_and_kills_nothing() -> None:
    heard = asyncio.Event()
    stop = Stop()
    with stop.on_signals(hangup=heard.set):
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.wait_for(heard.wait(), 5)
    assert not stop.draining.is_set()
