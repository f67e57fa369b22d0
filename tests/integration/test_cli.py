"""The `sippbx` command as a process of its own, against the gRPC API of a service over tables of this file."""

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme

from control.api.auth import ApiKeys
from control.api.grpc_api import GrpcApi
from control.api.service import ControlService, NodeView
from control.events.cdr import cdr_line
from control.metrics import ControlMetrics
from control.pbx.records import CallEventKind, LegName, Reason
from control.pbx.routing import Refusal
from control.settings.sections import ApiSettings
from sippbx.pair import describe
from tests.harness.node import Calls, Events, Records, phone, running_call
from tests.harness.records import INVITED_AT, call_event, call_record

pytestmark = pytest.mark.integration

ADDRESS = "127.0.0.54"
PORT = 27350
TARGET = f"{ADDRESS}:{PORT}"
KEY = "a-key-of-sixteen-characters-or-more"
DEADLINE_S = 30.0


@dataclass
class Ended:
    """What a command left behind."""

    code: int
    output: str
    errors: str

    @property
    def document(self) -> Any:
        assert self.code == 0, self.errors
        return json.loads(self.output)

    @property
    def rows(self) -> list[list[str]]:
        assert self.code == 0, self.errors
        return [line.split() for line in self.output.splitlines()]


class Node:
    """A gRPC API."""

    def __init__(self, **api: Any) -> None:
        self.calls = Calls()
        self.records = Records()
        self.events = Events()
        settings = ApiSettings.model_validate(
            {"keys": [{"name": "cli", "key": KEY}], "grpc": {"bind": ADDRESS, "port": PORT}, **api}
        )
        service = ControlService(
            calls=self.calls, records=self.records, events=self.events, node=_view, drain=lambda: None
        )
        self.api = GrpcApi(settings, service, ApiKeys(settings.keys), ControlMetrics())


def _view() -> NodeView:
    return NodeView("test", "1.2.3", INVITED_AT, True, (), False, 0, 1000, 0)


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    node = Node()
    await node.api.start()
    yield node
    await node.api.stop(0)


async def start(
    *arguments: str, folder: Path | None = None, output: int = PIPE, environment: Mapping[str, str] | None = None
) -> Process:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SIPPBX_")}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sippbx", *arguments),
        cwd=folder,
        env={**clean, "PYTHONPATH": os.pathsep.join(sys.path), **(environment or {})},
        stdin=DEVNULL,
        stdout=output,
        stderr=PIPE,
    )


async def run(*arguments: str, folder: Path | None = None, **environment: str) -> Ended:
    """Run it without any word on where the node is."""
    process = await start(*arguments, folder=folder, environment=environment)
    output, errors = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    assert process.returncode is not None
    assert b"Traceback" not in errors, errors.decode()
    return Ended(process.returncode, output.decode(), errors.decode())


async def sippbx(*arguments: str) -> Ended:
    return await run(*arguments, "--target", TARGET, "--key", KEY)


# What is asked


async def test_running_calls_are_listed_for_people_and_for_programs(node: Node) -> None:
    node.calls.running = {"call-1": running_call()}
    people, programs = await sippbx("calls"), await sippbx("calls", "-o", "json")
    assert people.rows[1][:5] == ["call-1", "established", "internal", "1001", "1002"]
    (call,) = programs.document["calls"]
    assert (call["call_id"], call["state"], call["ringing_at"]) == (
        "call-1",
        "established",
        "2026-03-01T09:30:00.250000Z",
    )


async def test_one_call_is_shown_with_its_record_when_it_has_ended(node: Node) -> None:
    record = call_record("call-9")
    node.records.kept = [record]
    assert ["reason", "hangup"] in (await sippbx("calls", "call-9")).rows
    assert (await sippbx("calls", "call-9", "-o", "json")).document["record"] == json.loads(cdr_line(record))


async def test_call_is_originated_under_an_id_and_hung_up(node: Node) -> None:
    call = (await sippbx("originate", "1001", "1002", "--call-id", "mine", "-o", "json")).document
    assert (call["call_id"], call["caller"], call["callee"], call["state"]) == ("mine", "1001", "1002", "calling")
    assert (await sippbx("hangup", "mine", "-o", "json")).document["state"] == "releasing"
    assert node.calls.hung_up == ["mine"]


async def test_calls_that_are_originated_without_an_id_are_others_each_time(node: Node) -> None:
    for _ in range(2):
        assert (await sippbx("originate", "1001", "1002")).code == 0
    assert len(node.calls.running) == 2


async def test_registrations_are_listed_for_all_and_for_one_user(node: Node) -> None:
    node.calls.phones = [phone("1001"), phone("1002")]
    assert [row[0] for row in (await sippbx("registrations")).rows] == ["user", "1001", "1002"]
    (found,) = (await sippbx("registrations", "1002", "-o", "json")).document["registrations"]
    assert (found["user"], found["contact"]) == ("1002", "sip:1002@127.0.0.2")


async def test_records_are_those_of_the_cdr_file_and_so_many_as_were_asked_for(node: Node) -> None:
    node.records.kept = [call_record(name) for name in ("c", "b", "a")]
    found = (await sippbx("cdr", "--limit", "2", "-o", "json")).document["cdrs"]
    assert found == [json.loads(cdr_line(record)) for record in node.records.kept[:2]]
    assert [row[0] for row in (await sippbx("cdr")).rows] == ["call", "c", "b", "a"]


# Events


async def lines_of(process: Process, count: int) -> list[str]:
    assert process.stdout is not None
    async with asyncio.timeout(DEADLINE_S):
        return [(await process.stdout.readline()).decode().rstrip("\n") for _ in range(count)]


async def interrupted(process: Process) -> bytes:
    """Ctrl-C; what it had to complain of."""
    process.send_signal(signal.SIGINT)
    _, errors = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    assert process.returncode == 0, errors
    return errors


async def test_events_are_told_as_they_happen_until_ctrl_c(node: Node) -> None:
    node.calls.running = {"call-1": running_call()}
    process = await start("events", "-o", "json", "--target", TARGET, "--key", KEY)
    (snapshot,) = await lines_of(process, 1)
    assert json.loads(snapshot)["type"] == "snapshot"
    assert [call["call_id"] for call in json.loads(snapshot)["calls"]] == ["call-1"]
    for sequence, kind in enumerate((CallEventKind.RINGING, CallEventKind.ENDED), start=1):
        await node.events.append(call_event(kind, leg=LegName.CALLEE))
        (told,) = map(json.loads, await lines_of(process, 1))
        assert (told["sequence"], told["type"], told["data"]["call_id"]) == (sequence, kind.value, "call-1")
    assert await interrupted(process) == b""


async def test_events_begin_where_they_are_told_to_and_of_the_types_that_are_wanted(node: Node) -> None:
    for kind in (CallEventKind.ENDED, CallEventKind.STARTED, CallEventKind.ANSWERED, CallEventKind.ENDED):
        await node.events.append(call_event(kind))
    wanted = ("--resume-after", "1", "--type", "call.answered", "--type", "call.ended")
    process = await start("events", *wanted, "--target", TARGET, "--key", KEY)
    answered, ended = (line.split() for line in await lines_of(process, 2))
    assert answered[2:] == ["call.answered", "call-1", "1001", "->", "1002"]
    assert ended[2:7] == ["call.ended", "call-1", "1001", "->", "1002"]
    await interrupted(process)


async def test_reader_that_goes_away_ends_it_without_a_word(node: Node) -> None:
    read_end, write_end = os.pipe()
    process = await start("events", "-o", "json", "--target", TARGET, "--key", KEY, output=write_end)
    os.close(write_end)
    os.close(read_end)
    _, errors = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    assert errors == b""


# Which node, and what it refuses


async def test_pair_that_runs_from_the_folder_is_asked_with_its_key(node: Node, tmp_path: Path) -> None:
    ports = {"sip_port": 5060, "metrics_port": 9090, "http_port": 8080, "grpc_port": PORT}
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "api-key").write_text(KEY)
    describe(ADDRESS, **ports, rtp_range=(10000, 20000), folder=folder).write()
    assert (await run("calls", "-o", "json", folder=tmp_path)).document == {"calls": []}
    assert (await run("calls", "-o", "json", "--data", str(folder))).document == {"calls": []}


async def test_environment_names_the_node_and_the_key(node: Node) -> None:
    assert (await run("calls", "-o", "json", SIPPBX_TARGET=TARGET, SIPPBX_API_KEY=KEY)).document == {"calls": []}


async def test_refusal_is_told_with_its_reason(node: Node) -> None:
    node.calls.refusal = Refusal(480, Reason.NOT_REGISTERED, "1001 has no phone registered")
    for ended, reason in (
        (await sippbx("originate", "1001", "1002"), "not-registered: 1001 has no phone registered"),
        (await sippbx("hangup", "nobody"), "no-such-call"),
        (await run("calls", "--target", TARGET, "--key", "guessed"), "wrong-api-key"),
        (await sippbx("events", "--type", "call.missed"), "call.missed"),
    ):
        assert (ended.code, ended.output) == (5, "")
        assert reason in ended.errors


async def test_node_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    for ended, told in (
        (await run("calls", "--target", f"{ADDRESS}:{PORT + 1}", "--key", KEY), f"{ADDRESS}:{PORT + 1}"),
        (await run("events", "--target", f"{ADDRESS}:{PORT + 1}", "--key", KEY), f"{ADDRESS}:{PORT + 1}"),
        (await run("calls", folder=tmp_path), "sippbx run"),
    ):
        assert (ended.code, ended.output) == (4, "")
        assert told in ended.errors


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("calls", "--target", TARGET), "--key"),
        (("calls", "--target", TARGET, "--key", KEY, "--ca", "no-such-file"), "no-such-file"),
        (("originate", "1001"), "CALLEE"),
        (("cdr", "--limit", "0"), "--limit"),
        (("calls", "-o", "xml"), "xml"),
    ],
)
async def test_wrong_usage_is_told_apart_from_failure(arguments: tuple[str, ...], told: str) -> None:
    ended = await run(*arguments)
    assert ended.code == 2
    assert told in ended.errors


@pytest.mark.parametrize("text", [b"\xff", "\N{SNOWMAN}".encode(), b"a\nb"])
async def test_argument_that_cannot_be_sent_is_told_plainly(node: Node, text: bytes) -> None:
    odd = os.fsdecode(text)
    assert (await sippbx("calls", odd)).code in {2, 5}
    assert (await run("calls", "--target", TARGET, "--key", odd)).code in {2, 5}


async def test_certificate_is_checked_where_an_authority_is_given(tmp_path: Path) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    certificate = authority.issue_cert(ADDRESS)
    chain, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    chain.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    key.write_bytes(certificate.private_key_pem.bytes())
    authority.cert_pem.write_to_path(tmp_path / "ours.pem")
    stranger.cert_pem.write_to_path(tmp_path / "theirs.pem")
    node = Node(tls={"certificate_path": chain, "private_key_path": key})
    await node.api.start()
    try:
        ask = ("calls", "-o", "json", "--target", TARGET, "--key", KEY, "--ca")
        assert (await run(*ask, str(tmp_path / "ours.pem"))).document == {"calls": []}
        assert (await run(*ask, str(tmp_path / "theirs.pem"))).code == 4
    finally:
        await node.api.stop(0)
