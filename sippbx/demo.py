"""The demonstration call: two scripted phones register, talk with real RTP, hang up, and the call's record is shown."""

import asyncio
import json
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sippbx.pair import Pair, PairDescription, describe
from sippbx.softphone.call import Call, CallState
from sippbx.softphone.errors import DeadlineError, SoftphoneError
from sippbx.softphone.phone import Account, Phone

TALK_S = 5.0
STEP_DEADLINE_S = 5.0
RECORD_DEADLINE_S = 10.0
FRAME_S = 0.02
LOCAL = "127.0.0.1"
DEMO_RTP_RANGE = (18_000, 18_799)


async def run_demo(data: Path, *, tell: Callable[[str], None] = print, talk_s: float = TALK_S) -> int:
    """Uses the pair that runs from the folder `data`, or one of its own; 0 when the call went well, else 1.

    Raises:
        PairError: when no pair can be started.
    """
    running = PairDescription.read(data)
    if running is not None:
        tell(f"using the pair at {running.sip_host}")
        return await _call(running, tell, talk_s)
    tell("no pair runs here: starting one of our own")
    with TemporaryDirectory(prefix="sippbx-demo-") as folder:
        tcp_port = _free_ports(socket.SOCK_STREAM, 4)
        pair = Pair(
            describe(
                LOCAL,
                sip_port=_free_ports(socket.SOCK_DGRAM, 1),
                metrics_port=tcp_port,
                http_port=tcp_port + 2,
                grpc_port=tcp_port + 3,
                rtp_range=DEMO_RTP_RANGE,
                folder=Path(folder),
            )
        )
        await pair.start()
        try:
            return await _call(pair.description, tell, talk_s)
        finally:
            await pair.stop()


def _free_ports(kind: socket.SocketKind, count: int) -> int:
    """The first of so many consecutive ports that nobody has, below the ephemeral range."""
    for port in range(28_060, 32_000, 10):
        try:
            for candidate in range(port, port + count):
                with socket.socket(socket.AF_INET, kind) as probe:
                    probe.bind((LOCAL, candidate))
        except OSError:
            continue
        return port
    raise OSError("no free port between 28060 and 32000")


async def _call(pair: PairDescription, tell: Callable[[str], None], talk_s: float) -> int:
    record_file = pair.folder / "cdr.jsonl"
    known = len(_records(record_file))
    proxy = (pair.address, pair.sip_port)
    users = sorted(pair.passwords)[:2]
    alice, bob = (Phone(Account(user, pair.passwords[user], proxy), bind=(pair.address, 0)) for user in users)
    try:
        async with alice, bob:
            for phone in (alice, bob):
                lifetime_s = await phone.register(deadline_s=STEP_DEADLINE_S)
                tell(f"{phone.account.user} is registered for {lifetime_s} s")
            well = await _talk(alice, bob, tell, talk_s)
            for phone in (alice, bob):
                await phone.unregister(deadline_s=STEP_DEADLINE_S)
        record = await _new_record(record_file, known)
    except (SoftphoneError, TimeoutError) as error:
        tell(f"the call failed: {error}. The logs are in {pair.folder}")
        return 1
    tell("")
    tell(_table(record))
    return 0 if well else 1


async def _talk(alice: Phone, bob: Phone, tell: Callable[[str], None], talk_s: float) -> bool:
    async with AsyncExitStack() as calls:
        outgoing = Call.place(alice, bob.account.user)
        calls.push_async_callback(outgoing.close)
        try:
            incoming = await Call.take(bob, deadline_s=STEP_DEADLINE_S)
        except DeadlineError:
            await outgoing.wait_for(CallState.RINGING, 0)  # the PBX's refusal says more than the silence at the callee
            raise
        calls.push_async_callback(incoming.close)
        tell(f"{alice.account.user} calls {bob.account.user}, which rings")
        incoming.ring()
        await outgoing.wait_for(CallState.RINGING, STEP_DEADLINE_S)
        await incoming.answer()
        await outgoing.wait_for(CallState.ANSWERED, STEP_DEADLINE_S)
        tell(f"answered; both talk for {talk_s:g} s")
        frames = round(talk_s / FRAME_S)
        talkers = (outgoing.lines[0], incoming.lines[0])
        await asyncio.gather(*(line.send_frames(frames) for line in talkers))
        # What has not come by then is lost, and told as such.
        await asyncio.gather(*(line.wait_for(frames, STEP_DEADLINE_S) for line in talkers), return_exceptions=True)
        await outgoing.hang_up()
        await incoming.wait_for(CallState.ENDED, STEP_DEADLINE_S)
        tell(f"{alice.account.user} hung up")
    reports = [(call.phone.account.user, call.lines[0].report) for call in (outgoing, incoming)]
    for user, report in reports:
        tell(f"{user} sent {report.sent} packets and received {report.received}, {report.damaged} damaged")
    return all(len(report.frames) == frames and not report.damaged for _, report in reports)


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        return []


async def _new_record(path: Path, known: int) -> dict[str, Any]:
    async with asyncio.timeout(RECORD_DEADLINE_S):
        while len(records := _records(path)) <= known:  # noqa: ASYNC110 -- another process writes the file
            await asyncio.sleep(0.1)
    return records[-1]


def _table(record: dict[str, Any]) -> str:
    end = record["termination"]
    lines = [
        (
            f"call {record['call_id']}: {record['caller']} -> {record['callee']}, {end['result']} ({end['reason']}),"
            f" {record['duration_s']:.1f} s"
        ),
        f"{'from':8}{'line':8}{'packets':>9}{'octets':>9}{'lost':>6}{'reordered':>11}{'jitter ms':>11}{'relayed':>9}",
    ]
    for stream in record["streams"]:
        jitter = "-" if stream["jitter_ms"] is None else f"{stream['jitter_ms']:.2f}"
        lines.append(
            f"{stream['leg']:8}{stream['kind']:8}{stream['packets']:>9}{stream['octets']:>9}{stream['lost']:>6}"
            f"{stream['reordered']:>11}{jitter:>11}{stream['relayed_packets']:>9}"
        )
    return "\n".join(lines)
