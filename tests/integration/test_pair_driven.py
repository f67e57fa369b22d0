"""The real pair, driven by the HTTP API and the `sippbx` command while phones call."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest

from sippbx.softphone.call import Call, CallState
from sippbx.softphone.phone import Account, Phone
from tests.harness.pair import HOST, USERS, Pair

pytestmark = pytest.mark.integration

DEADLINE_S = 10.0


@pytest.fixture
async def phones(pair: Pair) -> AsyncIterator[tuple[Phone, Phone]]:
    """1001 and 1002, registered."""
    async with AsyncExitStack() as stack:
        made = [
            await stack.enter_async_context(Phone(Account(user, USERS[user], pair.sip), bind=(HOST, 0)))
            for user in ("1001", "1002")
        ]
        for phone in made:
            await phone.register(deadline_s=DEADLINE_S)
        yield made[0], made[1]
        for phone in made:
            await phone.unregister(deadline_s=DEADLINE_S)


async def http(pair: Pair, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {pair.api_key}"}) as client,
        client.request(
            method, f"{pair.http_url}{path}", json=body, timeout=aiohttp.ClientTimeout(total=DEADLINE_S)
        ) as response,
    ):
        return response.status, await response.json()


async def sippbx(pair: Pair, *arguments: str) -> Any:
    """A command's document."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sippbx", *arguments, "-o", "json"),
        env={**os.environ, "SIPPBX_TARGET": pair.grpc_target, "SIPPBX_API_KEY": pair.api_key},
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 3 * DEADLINE_S)
    assert process.returncode == 0
    return json.loads(output)


async def test_call_between_phones_is_seen_and_hung_up_by_http(pair: Pair, phones: tuple[Phone, Phone]) -> None:
    caller, callee = phones
    outgoing = Call.place(caller, "1002")
    incoming = await Call.take(callee, deadline_s=DEADLINE_S)
    incoming.ring()
    await outgoing.wait_for(CallState.RINGING, DEADLINE_S)
    _, listed = await http(pair, "GET", "/v1/calls")
    (call,) = listed["calls"]
    assert (call["state"], call["caller"], call["callee"]) == ("ringing", "1001", "1002")
    await incoming.answer()
    await outgoing.wait_for(CallState.ANSWERED, DEADLINE_S)
    path = f"/v1/calls/{call['call_id']}"
    assert (await http(pair, "POST", f"{path}/hangup"))[0] == 200
    for side in (outgoing, incoming):
        await side.wait_for(CallState.ENDED, DEADLINE_S)
        await side.close()
    async with asyncio.timeout(DEADLINE_S):
        while (ended := (await http(pair, "GET", path))[1])["state"] != "ended":
            await asyncio.sleep(0.05)
    assert ended["record"]["termination"]["reason"] == "api-hangup"
    # The list has what is on the disk, a moment later.
    async with asyncio.timeout(DEADLINE_S):
        while (await http(pair, "GET", "/v1/cdrs?page_size=1"))[1]["cdrs"] != [ended["record"]]:
            await asyncio.sleep(0.05)
    assert (await http(pair, "GET", "/v1/calls"))[1]["calls"] == []


async def test_call_is_made_seen_and_ended_from_the_command_line(pair: Pair, phones: tuple[Phone, Phone]) -> None:
    caller, _ = phones
    registered = (await sippbx(pair, "registrations"))["registrations"]
    assert [phone["user"] for phone in registered] == ["1001", "1002"]
    made = await sippbx(pair, "originate", "1001", "1002", "--call-id", "by-command")
    assert (made["call_id"], made["caller"], made["callee"]) == ("by-command", "1001", "1002")
    leg = await Call.take(caller, deadline_s=DEADLINE_S)
    leg.ring()
    assert (await sippbx(pair, "originate", "1001", "1002", "--call-id", "by-command"))["state"] == "calling"
    assert [call["call_id"] for call in (await sippbx(pair, "calls"))["calls"]] == ["by-command"]
    await sippbx(pair, "hangup", "by-command")
    await leg.wait_for(CallState.ENDED, DEADLINE_S)
    await leg.close()
    async with asyncio.timeout(3 * DEADLINE_S):
        while (ended := await sippbx(pair, "calls", "by-command"))["state"] != "ended":
            pass
    assert ended["record"]["termination"]["reason"] == "api-hangup"
    async with asyncio.timeout(3 * DEADLINE_S):
        while (await sippbx(pair, "cdr", "--limit", "1"))["cdrs"] != [ended["record"]]:
            pass
