"""Requests to stop, and the loop lag."""

import asyncio
import time

import pytest

from sippbx.runtime.lifecycle import Stop, sample_loop_lag


async def test_first_request_drains_and_second_stops_now() -> None:
    stop = Stop()
    assert (stop.draining.is_set(), stop.now.is_set()) == (False, False)
    stop.request()
    assert (stop.draining.is_set(), stop.now.is_set()) == (True, False)
    stop.request()
    assert (stop.draining.is_set(), stop.now.is_set()) == (True, True)


async def test_loop_that_was_blocked_is_seen_to_be_late() -> None:
    lags: list[float] = []
    sampler = asyncio.create_task(sample_loop_lag(lags.append, interval_s=0.001))
    await asyncio.sleep(0)
    blocked_until = time.monotonic() + 0.05
    while time.monotonic() < blocked_until:
        pass
    await asyncio.sleep(0.005)
    sampler.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sampler
    assert 0.04 < max(lags) < 1.0
    assert min(lags) >= 0.0
