"""B2bua and its journal: what leaves only after it was saved, and calls that are taken up after their process died.

The rig plays far ends, data plane and disk by hand. `killed` gives the rig of the process that comes next: it knows no
more than what was committed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count

import pytest

from control.b2bua import departures
from control.b2bua.b2bua import B2bua
from control.b2bua.saved_calls import Instant, brought_back, offset_s
from control.metrics import ControlMetrics
from control.pbx.admission import Admission
from control.pbx.media import (
    LocalPorts,
    MediaClosed,
    MediaFailure,
    MediaOpened,
    MediaSpec,
    MediaUpdated,
    RestoredSession,
)
from control.pbx.records import CallEvent, CallId, CallRecord, CallState, Event, LegName
from control.pbx.registrar import Registrar
from control.pbx.routing import Router
from control.pbx.trunks import Trunks
from control.settings.settings import Settings
from control.sip.address import Address, Flow
from control.sip.digest import DigestAuthenticator
from control.sip.message import Request, Response, parse_message
from control.sip.snapshot import Plain, SnapshotError
from control.sip.stack import SipStack
from control.sip.transaction import Timers
from tests.harness.messages import flow, request_bytes, response_to, sdp

CALLER, CALLEE = "192.0.2.50", "192.0.2.60"
UTC_NOW = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class Row:
    """A call as the disk has it."""

    record: CallRecord | None
    snapshot: Plain
    now: float


class Disk:
    """A journal that commits when it is told to: rows, and records that were written."""

    def __init__(self) -> None:
        self.rows: dict[CallId, Row] = {}
        self.records: list[CallRecord] = []
        self.waiting: list[Callable[[], None]] = []
        self.prompt = True
        self.commits = 0
        self.now: Callable[[], float] = float
        self._begins: dict[CallId, Row] = {}
        self._ends: dict[CallId, Plain | None] = {}

    def _write(self, work: Callable[[], None]) -> None:
        def commit() -> None:
            self.commits += 1
            work()

        self.waiting.append(commit)
        if self.prompt:
            self.commit()

    def commit(self) -> None:
        while self.waiting:
            self.waiting.pop(0)()

    def begin(self, record: CallRecord, snapshot: Plain) -> None:
        self._begins[record.call_id] = Row(record, snapshot, self.now())

    def save(
        self,
        call_id: CallId,
        record: CallRecord | None,
        snapshot: Plain,
        *,
        committed: Callable[[], None],
        given_up: Callable[[str], None],
    ) -> None:
        row = Row(record, snapshot, self.now())

        def work() -> None:
            self.rows[call_id] = row
            committed()

        self._write(work)

    def end(self, record: CallRecord, snapshot: Plain | None) -> None:
        self._ends[record.call_id] = snapshot

    def forget(self, call_id: CallId) -> None:
        def work() -> None:
            self.rows.pop(call_id, None)

        self._write(work)

    def publish(self, event: Event) -> None:
        if not isinstance(event, CallEvent):
            return
        if (row := self._begins.pop(event.call_id, None)) is not None:
            call_id, begun = event.call_id, row

            def begin() -> None:
                self.rows[call_id] = begun

            self._write(begin)
        if event.record is None:
            return
        record, snapshot, now = event.record, self._ends.pop(event.call_id, None), self.now()

        def work() -> None:
            self.records.append(record)
            self.rows.pop(record.call_id, None)
            if snapshot is not None:
                self.rows[record.call_id] = Row(None, snapshot, now)

        self._write(work)


class DataPlane:
    """What calls wish for; sessions that were opened and not closed."""

    def __init__(self) -> None:
        self.wishes: list[MediaSpec | str] = []

    def open(self, spec: MediaSpec) -> None:
        self.wishes.append(spec)

    def update(self, spec: MediaSpec) -> None:
        self.wishes.append(spec)

    def close(self, session_id: str) -> None:
        self.wishes.append(session_id)

    def unavailable(self) -> MediaFailure | None:
        return None


class Process:
    """A control plane's transaction user between two deaths."""

    def __init__(self, disk: Disk, now: float = 1000.0) -> None:
        self.disk = disk
        self.now = now
        disk.now = lambda: self.now
        self.sent: list[tuple[Request | Response, Flow]] = []
        self.events: list[Event] = []
        self.data_plane = DataPlane()
        self.metrics = ControlMetrics()
        tokens = (f"p{int(now)}t{number}" for number in count(1))
        settings = Settings.model_validate(
            {
                "sip": {"listeners": [{"name": "main", "bind": "198.51.100.1", "advertise": "198.51.100.1"}]},
                "media": {"addresses": [{"bind": "198.51.100.1", "advertise": "198.51.100.1"}]},
                "trunks": [
                    {"name": "near", "destination": f"{CALLER}:5060"},
                    {"name": "far", "destination": f"{CALLEE}:5060"},
                ],
                "routes": [{"prefix": "9", "trunk": "far", "from": ["near"]}],
            }
        )
        registrar = Registrar(
            is_user=lambda _: False, min_expires_s=60, max_expires_s=3600, default_expires_s=600, max_bindings=1
        )
        trunks = Trunks(settings.trunk_values())
        self.new_token = tokens.__next__
        self.b2bua = B2bua(
            settings=settings,
            stack=SipStack(
                advertised=lambda _: Address("198.51.100.1", 5060),
                new_token=self.new_token,
                timers=Timers(),
                server_name="sippbx",
            ),
            registrar=registrar,
            router=Router(users={}, bindings_of=registrar.lookup, trunks=trunks, rules=settings.route_rules()),
            trunks=trunks,
            admission=Admission(max_calls=100, calls_per_second=50, retry_after_s=7),
            authenticator=DigestAuthenticator(settings.realm, b"secret", algorithms=["MD5"]),
            media=self.data_plane,
            transmit=lambda data, flow: self.sent.append((parse_message(data), flow)),
            publish=self._publish,
            metrics=self.metrics,
            new_token=self.new_token,
            clock=lambda: self.now,
            utc_now=lambda: UTC_NOW,
            journal=disk,
        )

    def _publish(self, event: Event) -> None:
        self.events.append(event)
        self.disk.publish(event)

    def take_up(self, *, booted: bool) -> list[RestoredSession]:
        """Reads the disk; the monotonic clock is another's when the machine was booted meanwhile."""
        here = Instant(self.now, "boot-2" if booted else "boot-1", UTC_NOW)
        sessions = []
        for row in list(self.disk.rows.values()):
            then = Instant(row.now, "boot-1", UTC_NOW)
            call = brought_back(row.snapshot, then=then, here=here, new_token=self.new_token, random=lambda: 0.5)
            session = self.b2bua.take_up(call)
            sessions += [] if session is None else [session]
        self.b2bua.resume()
        return sessions

    def killed(self, *, booted: bool = False) -> "Process":
        """The process that comes next."""
        self.stop()
        self.disk.waiting.clear()
        self.disk.prompt = True
        successor = Process(self.disk, now=50.0 if booted else self.now + 1.0)
        successor.restored = successor.take_up(booted=booted)
        return successor

    restored: list[RestoredSession]

    def stop(self) -> None:
        for timer in (self.b2bua._alarm, self.b2bua._keeper._flush):
            if timer is not None:
                timer.cancel()
        for queue in self.b2bua._keeper.departures._queues.values():
            for item in queue:
                if isinstance(item, departures.Barrier) and item.timer is not None:
                    item.timer.cancel()

    # ---- the far ends

    def receive(self, data: bytes, host: str) -> list[Request | Response]:
        before = len(self.sent)
        self.b2bua.receive(data, flow(host))
        return [message for message, _ in self.sent[before:]]

    def answer_media(self) -> list[Request | Response]:
        before = len(self.sent)
        spec = self.data_plane.wishes[-1]
        if isinstance(spec, str):
            self.b2bua.media_input(MediaClosed(spec, ()))
        else:
            ports = tuple(LocalPorts(leg, 0, 10000 + 4 * side, 10001 + 4 * side) for side, leg in enumerate(LegName))
            if spec.generation == 1:
                self.b2bua.media_input(MediaOpened(spec.session_id, ports))
            else:
                self.b2bua.media_input(MediaUpdated(spec.session_id, spec.generation, ports))
        return [message for message, _ in self.sent[before:]]

    def save_what_is_dirty(self) -> None:
        self.b2bua._keeper.save_changes()


CONTACT = ("Contact", f"<sip:x@{CALLEE}:5060>")


def invite_bytes() -> bytes:
    return request_bytes(
        uri="sip:9123@198.51.100.1",
        call_id="near-1",
        from_="<sip:+1555@near.test>;tag=a",
        to="<sip:9123@198.51.100.1>",
        via=f"SIP/2.0/UDP {CALLER}:5060;branch=z9hG4bK-1",
        contact=f"<sip:+1555@{CALLER}:5060>",
        body=sdp(CALLER),
    )


def in_dialog(method: str, cseq: int, to: str, *, body: bytes = b"") -> bytes:
    """A request of the caller in its dialog."""
    return request_bytes(
        method,
        uri="sip:9123@198.51.100.1",
        call_id="near-1",
        from_="<sip:+1555@near.test>;tag=a",
        to=to,
        via=f"SIP/2.0/UDP {CALLER}:5060;branch=z9hG4bK-{method}{cseq}",
        contact=f"<sip:+1555@{CALLER}:5060>",
        cseq=cseq,
        body=body,
    )


def summary(messages: list[Request | Response]) -> list[str]:
    return [message.method if isinstance(message, Request) else str(message.status) for message in messages]


@pytest.fixture
async def disk() -> Disk:
    return Disk()


@pytest.fixture
async def process(disk: Disk) -> Process:
    return Process(disk)


@pytest.fixture(autouse=True)
def stopped(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every process that a test made is stopped: none leaves a timer behind."""
    made: list[Process] = []
    original = Process.__init__

    def remember(self: Process, disk: Disk, now: float = 1000.0) -> None:
        original(self, disk, now)
        made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Process, "__init__", remember)
        yield
    for process in made:
        process.stop()


@dataclass
class Talk:
    """A call that stands, and what the far ends know of it."""

    process: Process
    invite: Request
    ok: Response
    callee_answer: Response

    @property
    def to(self) -> str:
        return str(self.ok.to)

    def bye_of_callee(self, cseq: int = 1) -> bytes:
        answer = self.callee_answer
        return request_bytes(
            "BYE",
            uri=str(self.invite.contact.uri if self.invite.contact else ""),
            call_id=self.invite.call_id,
            from_=str(answer.to),
            to=str(self.invite.from_),
            via=f"SIP/2.0/UDP {CALLEE}:5060;branch=z9hG4bK-bye{cseq}",
            cseq=cseq,
        )


def invited(process: Process) -> Request:
    assert process.receive(invite_bytes(), CALLER) == []
    trying, invite = process.answer_media()
    assert summary([trying]) == ["100"]
    assert isinstance(invite, Request)
    return invite


def ringing(process: Process) -> Request:
    invite = invited(process)
    assert summary(process.receive(response_to(invite, 180, headers=(CONTACT,)).encode(), CALLEE)) == ["180"]
    return invite


def answered(process: Process) -> Talk:
    invite = ringing(process)
    answer = response_to(invite, 200, headers=(CONTACT,), body=sdp(CALLEE))
    assert summary(process.receive(answer.encode(), CALLEE)) == ["ACK"]
    (ok,) = process.answer_media()
    assert isinstance(ok, Response)
    assert ok.status == 200
    return Talk(process, invite, ok, answer)


def talking(process: Process) -> Talk:
    talk = answered(process)
    process.receive(in_dialog("ACK", 1, talk.to), CALLER)
    process.save_what_is_dirty()
    (view,) = process.b2bua.calls()
    assert view.state is CallState.ESTABLISHED
    return talk


def reasons(disk: Disk) -> list[str]:
    return [record.termination.reason.value for record in disk.records]


# What leaves when


async def test_an_invite_leaves_once_the_call_is_on_the_disk(disk: Disk, process: Process) -> None:
    disk.prompt = False
    process.receive(invite_bytes(), CALLER)
    assert process.answer_media() == []
    disk.commit()
    assert summary([message for message, _ in process.sent]) == ["100", "INVITE"]
    assert len(disk.rows) == 1


async def test_ack_and_answer_leave_once_the_answer_is_on_the_disk(disk: Disk, process: Process) -> None:
    invite = ringing(process)
    disk.prompt = False
    answer = response_to(invite, 200, headers=(CONTACT,), body=sdp(CALLEE))
    assert process.receive(answer.encode(), CALLEE) == []
    assert process.answer_media() == []
    before = len(process.sent)
    disk.commit()
    assert summary([message for message, _ in process.sent[before:]]) == ["ACK", "200"]


async def test_a_refusal_is_acknowledged_and_passed_on_once_it_is_on_the_disk(disk: Disk, process: Process) -> None:
    invite = ringing(process)
    disk.prompt = False
    assert process.receive(response_to(invite, 486).encode(), CALLEE) == []
    before = len(process.sent)
    disk.commit()
    assert summary([message for message, _ in process.sent[before:]]) == ["486", "ACK"]


async def test_bye_and_its_answer_leave_once_the_end_is_on_the_disk(disk: Disk, process: Process) -> None:
    talk = talking(process)
    disk.prompt = False
    assert process.receive(in_dialog("BYE", 2, talk.to), CALLER) == []
    before = len(process.sent)
    disk.commit()
    assert summary([message for message, _ in process.sent[before:]]) == ["200", "BYE"]


async def test_ringing_waits_for_no_disk(disk: Disk, process: Process) -> None:
    invite = invited(process)
    disk.prompt = False
    assert summary(process.receive(response_to(invite, 180, headers=(CONTACT,)).encode(), CALLEE)) == ["180"]


async def test_repetitions_wait_behind_what_they_repeat(disk: Disk, process: Process) -> None:
    disk.prompt = False
    process.receive(invite_bytes(), CALLER)
    process.answer_media()
    process.now += 0.6
    process.b2bua._ring(process.now)
    assert process.sent == []
    disk.commit()
    assert summary([message for message, _ in process.sent]) == ["100", "INVITE", "INVITE"]


async def test_nobody_stops_repeating_an_invite_that_is_not_on_the_disk(disk: Disk, process: Process) -> None:
    disk.prompt = False
    assert process.receive(invite_bytes(), CALLER) == []
    process.save_what_is_dirty()
    assert process.sent == []
    disk.commit()
    assert summary([message for message, _ in process.sent]) == ["100"]


async def test_nobody_stops_repeating_a_reinvite_that_is_not_on_the_disk(disk: Disk, process: Process) -> None:
    talk = talking(process)
    disk.prompt = False
    changed = sdp(CALLER).replace(b"s=-", b"s=other")
    assert process.receive(in_dialog("INVITE", 2, talk.to, body=changed), CALLER) == []
    before = len(process.sent)
    disk.commit()
    assert summary([message for message, _ in process.sent[before:]]) == ["INVITE", "100"]


async def test_what_is_answered_at_once_is_not_promised_an_answer(process: Process) -> None:
    talk = talking(process)
    answers = process.receive(in_dialog("INVITE", 2, talk.to, body=sdp(CALLER)), CALLER)
    assert summary(answers) == ["200"]


async def test_the_answer_to_a_request_that_comes_twice_waits_for_the_disk_both_times(
    disk: Disk, process: Process
) -> None:
    talk = talking(process)
    disk.prompt = False
    bye = in_dialog("BYE", 2, talk.to)
    assert process.receive(bye, CALLER) == []
    assert process.receive(bye, CALLER) == []
    before = len(process.sent)
    disk.commit()
    assert summary([message for message, _ in process.sent[before:]]) == ["200", "BYE", "200"]


async def test_a_disk_that_takes_too_long_holds_no_running_call(
    disk: Disk, process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = talking(process)
    disk.prompt = False
    process.receive(in_dialog("BYE", 2, talk.to), CALLER)
    ((call_id, queue),) = process.b2bua._keeper.departures._queues.items()
    barrier = queue[0]
    assert isinstance(barrier, departures.Barrier)
    before = len(process.sent)
    process.b2bua._keeper.departures._give_in(call_id, barrier)
    assert summary([message for message, _ in process.sent[before:]]) == ["200", "BYE"]
    labels = {"component": "store", "kind": "journal-overdue"}
    assert process.metrics.registry.get_sample_value("sip_pbx_errors_total", labels) == 1


async def test_the_row_of_a_call_goes_with_its_record(disk: Disk, process: Process) -> None:
    talk = talking(process)
    _, bye = process.receive(in_dialog("BYE", 2, talk.to), CALLER)
    assert isinstance(bye, Request)
    process.receive(response_to(bye, 200).encode(), CALLEE)
    assert len(disk.rows) == 1
    process.answer_media()
    assert (disk.rows, reasons(disk)) == ({}, ["hangup"])


async def test_a_call_with_its_record_written_stays_until_its_last_bye_is_answered(
    disk: Disk, process: Process
) -> None:
    talk = talking(process)
    _, bye = process.receive(in_dialog("BYE", 2, talk.to), CALLER)
    assert isinstance(bye, Request)
    process.answer_media()
    assert reasons(disk) == ["hangup"]
    assert [row.record for row in disk.rows.values()] == [None]
    process.receive(response_to(bye, 200).encode(), CALLEE)
    assert disk.rows == {}


# After a kill


@pytest.mark.parametrize("booted", [False, True])
async def test_an_established_call_is_back_without_a_message_to_anybody(process: Process, *, booted: bool) -> None:
    talking(process)
    after = process.killed(booted=booted)
    assert after.sent == []
    (view,) = after.b2bua.calls()
    assert view.state is CallState.ESTABLISHED
    (session,) = after.restored
    assert (session.spec.session_id, session.first_port) == (view.call_id, 10000)
    assert {endpoint.remote_rtp for endpoint in session.spec.endpoints} == {
        Address(CALLER, 40000),
        Address(CALLEE, 40000),
    }


@pytest.mark.parametrize("booted", [False, True])
async def test_the_caller_hangs_up_after_a_kill(disk: Disk, process: Process, *, booted: bool) -> None:
    talk = talking(process)
    after = process.killed(booted=booted)
    ok, bye = after.receive(in_dialog("BYE", 2, talk.to), CALLER)
    assert summary([ok, bye]) == ["200", "BYE"]
    assert isinstance(bye, Request)
    assert bye.call_id == talk.invite.call_id
    assert bye.cseq.number > 1
    after.receive(response_to(bye, 200).encode(), CALLEE)
    after.answer_media()
    assert (reasons(disk), disk.rows) == (["hangup"], {})


async def test_a_bye_that_comes_again_after_kills_gets_its_200_again(disk: Disk, process: Process) -> None:
    talk = talking(process)
    bye = in_dialog("BYE", 2, talk.to)
    process.receive(bye, CALLER)
    after = process.killed().killed()
    assert summary(after.receive(bye, CALLER)) == ["200"]


async def test_the_callee_hangs_up_after_a_kill(disk: Disk, process: Process) -> None:
    talk = talking(process)
    after = process.killed()
    assert summary(after.receive(talk.bye_of_callee(), CALLEE)) == ["200", "BYE"]
    after.answer_media()
    assert reasons(disk) == ["hangup"]


async def test_a_reinvite_after_a_kill_goes_through(process: Process) -> None:
    talk = talking(process)
    after = process.killed()
    (forwarded,) = after.receive(in_dialog("INVITE", 2, talk.to, body=sdp(CALLER, version=2)), CALLER)
    assert isinstance(forwarded, Request)
    assert forwarded.method == "INVITE"
    answer = response_to(forwarded, 200, headers=(CONTACT,), body=sdp(CALLEE, version=2))
    assert summary(after.receive(answer.encode(), CALLEE)) == ["ACK", "200"]


async def test_a_kill_between_200_and_ack_repeats_the_200_until_it_is_acknowledged(process: Process) -> None:
    talk = answered(process)
    after = process.killed()
    after.now += 0.6
    after.b2bua._ring(after.now)
    assert summary([message for message, _ in after.sent]) == ["200"]
    assert str(after.sent[0][0].to) == talk.to
    after.receive(in_dialog("ACK", 1, talk.to), CALLER)
    (view,) = after.b2bua.calls()
    assert view.state is CallState.ESTABLISHED


async def test_an_invite_that_comes_again_after_a_kill_makes_no_second_call(process: Process) -> None:
    answered(process)
    after = process.killed()
    assert summary(after.receive(invite_bytes(), CALLER)) == []
    assert len(after.b2bua.calls()) == 1


async def test_an_answer_that_comes_again_after_a_kill_is_acknowledged_again(process: Process) -> None:
    talk = talking(process)
    after = process.killed()
    assert summary(after.receive(talk.callee_answer.encode(), CALLEE)) == ["ACK"]


async def test_a_kill_during_a_reinvite_takes_it_up_where_it_was(process: Process) -> None:
    talk = talking(process)
    (forwarded,) = process.receive(in_dialog("INVITE", 2, talk.to, body=sdp(CALLER, version=2)), CALLER)
    assert isinstance(forwarded, Request)
    after = process.killed()
    answer = response_to(forwarded, 200, headers=(CONTACT,), body=sdp(CALLEE, version=2))
    assert summary(after.receive(answer.encode(), CALLEE)) == ["ACK", "200"]


async def test_a_kill_during_bye_says_bye_again_and_writes_one_record(disk: Disk, process: Process) -> None:
    talk = talking(process)
    process.receive(in_dialog("BYE", 2, talk.to), CALLER)
    after = process.killed()
    assert after.data_plane.wishes == [next(iter(disk.rows))], "its statistics are asked for again"
    after.now += 1.0
    after.b2bua._ring(after.now)
    (bye,) = [message for message, _ in after.sent if isinstance(message, Request)]
    assert bye.method == "BYE"
    after.answer_media()
    after.receive(response_to(bye, 200).encode(), CALLEE)
    assert (reasons(disk), disk.rows) == (["hangup"], {})


async def test_a_call_that_rang_is_ended_on_both_sides_with_a_reason_of_its_own(disk: Disk, process: Process) -> None:
    ringing(process)
    process.save_what_is_dirty()
    after = process.killed()
    assert sorted(summary([message for message, _ in after.sent])) == ["503", "CANCEL"]
    refused = next(message for message, _ in after.sent if isinstance(message, Response))
    assert refused.headers.get("Reason") == 'SIP;cause=503;text="node-restarted"'
    after.answer_media()
    assert reasons(disk) == ["node-restarted"]


async def test_a_kill_while_a_call_that_rang_is_being_ended_leaves_nothing_in_the_data_plane(
    disk: Disk, process: Process
) -> None:
    ringing(process)
    process.save_what_is_dirty()
    after = process.killed().killed()
    assert after.data_plane.wishes == list(disk.rows)
    after.answer_media()
    assert reasons(disk) == ["node-restarted"]


async def test_a_call_whose_ports_had_not_come_yet_is_ended(disk: Disk, process: Process) -> None:
    process.receive(invite_bytes(), CALLER)
    after = process.killed()
    assert summary([message for message, _ in after.sent]) == ["503"]
    after.answer_media()
    assert reasons(disk) == ["node-restarted"]


async def test_a_call_whose_invite_had_no_answer_yet_is_ended_once_it_can_be(disk: Disk, process: Process) -> None:
    invite = invited(process)
    after = process.killed()
    assert summary([message for message, _ in after.sent]) == ["503"]
    assert summary(after.receive(response_to(invite, 180, headers=(CONTACT,)).encode(), CALLEE)) == ["CANCEL"]


async def test_a_callee_that_answers_a_call_that_is_over_gets_its_bye_whatever_is_killed(
    disk: Disk, process: Process
) -> None:
    invite = ringing(process)
    process.save_what_is_dirty()
    after = process.killed()
    after.answer_media()
    assert [row.record for row in disk.rows.values()] == [None]
    answer = response_to(invite, 200, headers=(CONTACT,), body=sdp(CALLEE))
    assert summary(after.receive(answer.encode(), CALLEE)) == ["ACK", "BYE"]
    third = after.killed()
    assert [row.record for row in disk.rows.values()] == [None], "its record is written once"
    third.now += 1.0
    third.b2bua._ring(third.now)
    assert "BYE" in summary([message for message, _ in third.sent])


async def test_what_was_not_committed_had_not_been_said(disk: Disk, process: Process) -> None:
    invite = ringing(process)
    process.save_what_is_dirty()
    disk.prompt = False
    process.receive(response_to(invite, 200, headers=(CONTACT,), body=sdp(CALLEE)).encode(), CALLEE)
    said = summary([message for message, _ in process.sent])
    assert "ACK" not in said
    after = process.killed()
    answer = response_to(invite, 200, headers=(CONTACT,), body=sdp(CALLEE))
    assert summary(after.receive(answer.encode(), CALLEE)) == ["ACK", "BYE"], "the callee answered a call that is over"


async def test_a_call_that_lost_a_leg_on_the_disk_is_not_taken_up(disk: Disk, process: Process) -> None:
    talking(process)
    (row,) = disk.rows.values()
    assert isinstance(row.snapshot, dict)
    call = row.snapshot["call"]
    assert isinstance(call, dict)
    assert isinstance(call["legs"], list)
    call["legs"].pop()
    here = Instant(process.now, "boot-1", UTC_NOW)
    with pytest.raises(SnapshotError, match="two legs"):
        brought_back(row.snapshot, then=here, here=here, new_token=process.new_token, random=lambda: 0.5)


# Clocks


def test_within_a_boot_the_wall_clock_says_nothing() -> None:
    then = Instant(100.0, "boot", datetime(2026, 1, 1, tzinfo=UTC))
    an_hour_back = Instant(105.0, "boot", datetime(2025, 12, 31, 23, tzinfo=UTC))
    assert offset_s(then, an_hour_back) == 0.0


def test_over_a_boot_the_wall_clock_tells_how_much_time_has_passed() -> None:
    then = Instant(100.0, "boot-1", datetime(2026, 1, 1, tzinfo=UTC))
    later = Instant(7.0, "boot-2", datetime(2026, 1, 1, 0, 0, 30, tzinfo=UTC))
    assert 150.0 + offset_s(then, later) == 27.0, "what was due in 50 s is due in 20 s"


def test_a_clock_that_was_set_back_counts_as_no_time() -> None:
    then = Instant(100.0, "boot-1", datetime(2026, 1, 1, tzinfo=UTC))
    earlier = Instant(7.0, "boot-2", datetime(2025, 12, 31, 23, tzinfo=UTC))
    assert 150.0 + offset_s(then, earlier) == 57.0
