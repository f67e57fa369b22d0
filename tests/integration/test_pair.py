"""The pair in other settings than the usual: IPv6, gRPC over TCP, and planes that die under their supervisors."""

import asyncio
import signal
from pathlib import Path

import psutil
import pytest

from sippbx.demo import run_demo
from sippbx.pair import Pair as LocalPair
from sippbx.pair import describe
from sippbx.softphone.phone import Account, Phone
from tests.harness.pair import HOST, USERS, Pair

pytestmark = pytest.mark.integration

PORTS_OF_THIS_FILE = 24300


async def test_call_over_ipv6_is_heard_both_ways(tmp_path: Path) -> None:
    pair = LocalPair(
        describe(
            "::1",
            sip_port=PORTS_OF_THIS_FILE,
            metrics_port=PORTS_OF_THIS_FILE + 1,
            http_port=PORTS_OF_THIS_FILE + 3,
            grpc_port=PORTS_OF_THIS_FILE + 4,
            rtp_range=(17800, 17879),
            folder=tmp_path,
        )
    )
    await pair.start()
    told: list[str] = []
    try:
        assert await run_demo(tmp_path, tell=told.append, talk_s=0.5) == 0
    finally:
        await pair.stop()
    assert "1002 sent 25 packets and received 25, 0 damaged" in told


async def test_planes_that_meet_over_tcp_carry_a_call(tmp_path: Path) -> None:
    target = f"127.0.0.1:{PORTS_OF_THIS_FILE + 10}"
    control, dataplane = {"media": {"target": target}}, {"grpc": {"listen": target}}
    with Pair(tmp_path / "pair", control=control, dataplane=dataplane) as pair:
        pair.description().write()
        told: list[str] = []
        assert await run_demo(pair.folder, tell=told.append, talk_s=0.1) == 0, told


async def test_control_plane_that_is_killed_is_back_at_once_and_answers_what_came_meanwhile(pair: Pair) -> None:
    supervisor, child = planes_of(pair, "control")
    child.send_signal(signal.SIGSTOP)  # what is sent now waits in the socket
    account = Account("1001", USERS["1001"], pair.sip)
    async with Phone(account, bind=(HOST, 0)) as phone:
        registering = asyncio.create_task(phone.register(deadline_s=10))
        await asyncio.sleep(0.1)
        child.kill()
        assert await registering == 300
    assert supervisor.is_running()
    assert child.pid not in pair.pids("control")
    pair.wait_until_ready("control")


async def test_data_plane_that_is_killed_is_back_and_takes_calls_again(pair: Pair) -> None:
    _, child = planes_of(pair, "dataplane")
    child.kill()
    await asyncio.to_thread(pair.wait, lambda: child.pid not in pair.pids("dataplane"), 5, "the old process is gone")
    pair.wait_until_ready("dataplane")
    pair.wait_until_ready("control")
    pair.description().write()
    told: list[str] = []
    assert await run_demo(pair.folder, tell=told.append, talk_s=0.1) == 0, told


def planes_of(pair: Pair, plane: str) -> tuple[psutil.Process, psutil.Process]:
    """A plane's supervisor and the process that it watches."""
    supervisor = psutil.Process(pair.supervisors[plane].pid)
    (child,) = supervisor.children()
    return supervisor, child
