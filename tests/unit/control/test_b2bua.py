"""B2bua: what it lets through, what it refuses, and that one bad message costs no more than its own call."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from itertools import count

import pytest

from control.b2bua.b2bua import B2bua
from control.metrics import ControlMetrics
from control.pbx.admission import Admission
from control.pbx.media import LocalPorts, MediaClosed, MediaFailure, MediaOpened, MediaSpec, MediaUpdated
from control.pbx.records import (
    NODE_ERROR,
    CallEvent,
    CallEventKind,
    CallId,
    CallRecord,
    CallState,
    CallView,
    ErrorEvent,
    Event,
    LegName,
    RegistrationEvent,
    RegistrationEventKind,
    UnregisterCause,
)
from control.pbx.registrar import Registrar
from control.pbx.routing import Refusal, Router
from control.pbx.trunks import Trunks
from control.settings.settings import Settings
from control.sip.address import Address, Flow
from control.sip.digest import DigestAuthenticator
from control.sip.message import Request, Response, parse_message
from control.sip.stack import SipStack
from control.sip.transaction import Timers
from sippbx.softphone.digest import authorization
from tests.harness.messages import flow, request_bytes, response_to, sdp

PASSWORD = "opensesame"
TRUNK = "192.0.2.50"
CONTACT = ("Contact", "<sip:x@192.0.2.50:5060>")


class DataPlane:
    """Answers every wish when `deliver` is called."""

    def __init__(self) -> None:
        self.wishes: list[MediaSpec | str] = []
        self.trouble: MediaFailure | None = None

    def open(self, spec: MediaSpec) -> None:
        self.wishes.append(spec)

    def update(self, spec: MediaSpec) -> None:
        self.wishes.append(spec)

    def close(self, session_id: str) -> None:
        self.wishes.append(session_id)

    def unavailable(self) -> MediaFailure | None:
        return self.trouble


class Rig:
    """A B2bua with its surroundings played by hand."""

    def __init__(self, *, calls_per_second: float = 50.0) -> None:
        settings = Settings.model_validate(
            {
                "sip": {"listeners": [{"name": "main", "bind": "198.51.100.1", "port": 5060}]},
                "media": {"addresses": [{"bind": "198.51.100.1"}]},
                "users": [{"name": "1001", "password": PASSWORD}],
                "trunks": [{"name": "carrier", "destination": f"{TRUNK}:5060"}],
                "routes": [{"prefix": "9", "trunk": "carrier", "from": ["users", "carrier"]}],
            }
        )
        settings = settings.model_copy(
            update={
                "sip": settings.sip.model_copy(
                    update={
                        "listeners": tuple(
                            listener.model_copy(update={"advertise": listener.bind})
                            for listener in settings.sip.listeners
                        )
                    }
                ),
                "media": settings.media.model_copy(
                    update={
                        "addresses": tuple(
                            address.model_copy(update={"advertise": address.bind})
                            for address in settings.media.addresses
                        )
                    }
                ),
            }
        )
        tokens = count(1)
        self.sent: list[tuple[Request | Response, Flow]] = []
        self.events: list[Event] = []
        self.data_plane = DataPlane()
        self.metrics = ControlMetrics()
        self.now = 1000.0
        self.admission = Admission(max_calls=100, calls_per_second=calls_per_second, retry_after_s=7)
        registrar = Registrar(
            is_user=lambda user: user == "1001",
            min_expires_s=60,
            max_expires_s=3600,
            default_expires_s=600,
            max_bindings=10,
        )
        trunks = Trunks(settings.trunk_values())
        users = {user.name: user.nat for user in settings.users}
        self.b2bua = B2bua(
            settings=settings,
            stack=SipStack(
                advertised=lambda _: Address("198.51.100.1", 5060),
                new_token=lambda: f"s{next(tokens)}",
                timers=Timers(),
                server_name="sippbx",
            ),
            registrar=registrar,
            router=Router(users=users, bindings_of=registrar.lookup, trunks=trunks, rules=settings.route_rules()),
            trunks=trunks,
            admission=self.admission,
            authenticator=DigestAuthenticator(settings.realm, b"secret", algorithms=["MD5"]),
            media=self.data_plane,
            transmit=lambda data, flow: self.sent.append((parse_message(data), flow)),
            publish=self.events.append,
            metrics=self.metrics,
            new_token=lambda: f"t{next(tokens)}",
            clock=lambda: self.now,
            utc_now=lambda: datetime(2026, 1, 1, tzinfo=UTC),
        )

    @property
    def records(self) -> list[CallRecord]:
        return [event.record for event in self.events if isinstance(event, CallEvent) and event.record is not None]

    def receive(self, data: bytes, host: str = "192.0.2.10") -> list[Request | Response]:
        """What is sent because of a datagram."""
        before = len(self.sent)
        self.b2bua.receive(data, flow(host))
        return [message for message, _ in self.sent[before:]]

    def open_media(self) -> list[Request | Response]:
        before = len(self.sent)
        spec = self.data_plane.wishes[-1]
        assert isinstance(spec, MediaSpec)
        ports = tuple(LocalPorts(leg, 0, 10000 + 4 * side, 10001 + 4 * side) for side, leg in enumerate(LegName))
        if spec.generation == 1:
            self.b2bua.media_input(MediaOpened(spec.session_id, ports))
        else:
            self.b2bua.media_input(MediaUpdated(spec.session_id, spec.generation, ports))
        return [message for message, _ in self.sent[before:]]

    def trunk_call(self, number: int = 1, *, from_: str = "<sip:+1555@carrier.test>;tag=a") -> Request:
        """The INVITE that goes out for one that came in from the trunk."""
        data = request_bytes(
            uri="sip:9123@198.51.100.1",
            branch=f"z9hG4bK-trunk-{number}",
            call_id=f"trunk-{number}",
            from_=from_,
            headers=(),
            body=sdp(TRUNK),
        )
        self.receive(data, TRUNK)
        (invite,) = self.open_media()
        assert isinstance(invite, Request)
        return invite

    def errors(self, kind: str) -> float:
        return self.metrics.registry.get_sample_value("sip_pbx_errors_total", {"component": "sip", "kind": kind}) or 0


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    made = Rig()
    yield made
    await closed(made)


async def closed(rig: Rig) -> None:
    alarm = rig.b2bua._alarm
    if alarm is not None:
        alarm.cancel()


def statuses(messages: list[Request | Response]) -> list[int]:
    return [message.status for message in messages if isinstance(message, Response)]


def invite_with(password: str, challenge: Response, *, branch: str) -> bytes:
    value = authorization(
        challenge.headers.get_all("Proxy-Authenticate"),
        method="INVITE",
        uri="sip:9123@198.51.100.1",
        user="1001",
        password=password,
        algorithms=("MD5",),
    )
    return request_bytes(
        uri="sip:9123@198.51.100.1",
        branch=branch,
        call_id=branch,
        headers=(("Proxy-Authorization", value),),
        body=sdp(),
    )


def challenge_of(rig: Rig, branch: str) -> Response:
    (answer,) = [
        message
        for message in rig.receive(request_bytes(uri="sip:9123@198.51.100.1", branch=branch, call_id=branch))
        if isinstance(message, Response) and message.status == 407
    ]
    return answer


async def test_stranger_is_challenged_and_leaves_no_record(rig: Rig) -> None:
    challenge_of(rig, "z9hG4bK-c")
    assert rig.events == []


async def test_user_with_the_password_calls_out(rig: Rig) -> None:
    challenge = challenge_of(rig, "z9hG4bK-c")
    assert statuses(rig.receive(invite_with(PASSWORD, challenge, branch="z9hG4bK-d"))) == [100]
    (invite,) = rig.open_media()
    assert isinstance(invite, Request)
    assert invite.uri == "sip:9123@192.0.2.50:5060"
    assert "192.0.2.10" not in str(invite.encode())


async def test_guessing_passwords_is_held_to_the_rate_and_cannot_fill_the_disk() -> None:
    rig = Rig(calls_per_second=2)
    answers = []
    for number in range(20):
        challenge = challenge_of(rig, f"z9hG4bK-c{number}")
        answers += statuses(rig.receive(invite_with("guess", challenge, branch=f"z9hG4bK-g{number}")))
    assert answers.count(403) == 2
    assert answers.count(503) == 18
    assert [record.termination.reason.value for record in rig.records] == ["wrong-credentials"] * 2
    await closed(rig)


async def test_trunk_over_the_rate_is_refused_with_a_record() -> None:
    rig = Rig(calls_per_second=1)
    rig.trunk_call()
    data = request_bytes(uri="sip:9123@198.51.100.1", branch="z9hG4bK-2", call_id="second", body=sdp())
    refused = [m for m in rig.receive(data, TRUNK) if isinstance(m, Response) and m.status == 503]
    assert [answer.headers.get("Retry-After") for answer in refused] == ["7"]
    assert [record.termination.reason.value for record in rig.records] == ["rate-limit"]
    await closed(rig)


async def test_call_is_refused_before_anyone_rings_while_the_data_plane_is_away(rig: Rig) -> None:
    rig.data_plane.trouble = MediaFailure.UNAVAILABLE
    data = request_bytes(uri="sip:9123@198.51.100.1", body=sdp())
    assert statuses(rig.receive(data, TRUNK)) == [503]
    assert rig.data_plane.wishes == []


async def test_response_that_cannot_be_used_costs_its_own_call_alone(rig: Rig) -> None:
    first, second = rig.trunk_call(1), rig.trunk_call(2)
    rubbish = response_to(first, 180, headers=(("Contact", "<sip:@:bad>"),))
    assert rig.receive(rubbish.encode(), TRUNK) == []
    assert rig.errors("remote-protocol-error") == 1
    rig.receive(response_to(second, 180, headers=(CONTACT,)).encode(), TRUNK)
    assert [event.kind for event in rig.events if isinstance(event, CallEvent)].count(CallEventKind.RINGING) == 1


async def test_bug_in_a_call_ends_that_call_and_keeps_the_alarm(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    invite = rig.trunk_call()
    (call,) = rig.b2bua._calls.values()

    def fails(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(type(call), "_progressed", fails)
    messages = rig.receive(response_to(invite, 180, headers=(CONTACT,)).encode(), TRUNK)
    assert 500 in statuses(messages)
    rig.b2bua.media_input(MediaClosed(call.call_id, ()))
    assert [record.termination.reason.value for record in rig.records] == ["internal-error"]
    assert rig.b2bua._alarm is not None


async def test_transactions_and_deadlines_of_a_long_call_do_not_pile_up(rig: Rig) -> None:
    invite = rig.trunk_call()
    rig.receive(response_to(invite, 200, headers=(CONTACT,), body=sdp(TRUNK)).encode(), TRUNK)
    (ok,) = rig.open_media()
    assert isinstance(ok, Response)
    dialog = {"call_id": "trunk-1", "from_": "<sip:+1555@carrier.test>;tag=a", "to": str(ok.to)}
    rig.receive(request_bytes("ACK", branch="z9hG4bK-ack", **dialog), TRUNK)  # type: ignore[arg-type]
    for number in range(2, 100):
        data = request_bytes(
            "INVITE",
            branch=f"z9hG4bK-re{number}",
            cseq=number,
            body=sdp(TRUNK, version=number),
            **dialog,  # type: ignore[arg-type]
        )
        forwarded = [m for m in rig.receive(data, TRUNK) if isinstance(m, Request)]
        assert len(forwarded) == 1
        answer = response_to(forwarded[0], 200, headers=(CONTACT,), body=sdp(TRUNK, version=number))
        assert 200 in statuses(rig.receive(answer.encode(), TRUNK))
        rig.receive(
            request_bytes("ACK", branch=f"z9hG4bK-ack{number}", cseq=number, **dialog),  # type: ignore[arg-type]
            TRUNK,
        )
    assert len(rig.b2bua._transactions) == 2, "the caller's first INVITE and its newest request"
    assert len(rig.b2bua._deadlines) < 300


async def test_caller_name_in_any_script_survives_as_a_valid_uri(rig: Rig) -> None:
    invite = rig.trunk_call(from_="<sip:%E4%B8%AD%0D%0A@carrier.test>;tag=a")
    assert invite.from_.uri.user == "%E4%B8%AD%0D%0A"


async def test_options_outside_a_dialog_is_answered_without_a_challenge(rig: Rig) -> None:
    (answer,) = rig.receive(request_bytes("OPTIONS"))
    assert isinstance(answer, Response)
    assert answer.status == 200
    assert "INVITE" in answer.allow


@pytest.mark.parametrize(("method", "status"), [("BYE", 481), ("MESSAGE", 405), ("NONSENSE", 501)])
async def test_other_requests_outside_a_dialog(rig: Rig, method: str, status: int) -> None:
    assert statuses(rig.receive(request_bytes(method))) == [status]


# What programs ask for, and what they hear.


def register(rig: Rig, *, cseq: int = 1, expires: int = 600) -> Response:
    """1001 registers from 192.0.2.10, with the credentials that the challenge asks for."""
    uri = "sip:198.51.100.1"
    party = "<sip:1001@198.51.100.1>"

    def ask(number: int, headers: tuple[tuple[str, str], ...]) -> Response:
        data = request_bytes(
            "REGISTER",
            uri=uri,
            branch=f"z9hG4bK-reg{number}",
            call_id="register-1",
            cseq=number,
            from_=f"{party};tag=r",
            to=party,
            headers=(("Expires", str(expires)), *headers),
        )
        (answer,) = rig.receive(data)
        assert isinstance(answer, Response)
        return answer

    challenges = ask(2 * cseq, ()).headers.get_all("WWW-Authenticate")
    value = authorization(challenges, method="REGISTER", uri=uri, user="1001", password=PASSWORD, algorithms=("MD5",))
    return ask(2 * cseq + 1, (("Authorization", value),))


def types(rig: Rig) -> list[str]:
    return [event.kind.value if not isinstance(event, ErrorEvent) else NODE_ERROR for event in rig.events]


async def test_phone_that_registers_is_an_event_and_its_refresh_is_none(rig: Rig) -> None:
    assert register(rig).status == 200
    assert register(rig, cseq=2).status == 200
    (event,) = rig.events
    assert isinstance(event, RegistrationEvent)
    assert (event.kind, event.registration.user, event.registration.source) == (
        RegistrationEventKind.REGISTERED,
        "1001",
        "192.0.2.10:5060",
    )
    assert event.registration.expires_at == datetime(2026, 1, 1, 0, 10, tzinfo=UTC)
    assert rig.b2bua.registrations() == [event.registration]


async def test_phone_that_goes_is_an_event_that_says_how(rig: Rig) -> None:
    register(rig)
    register(rig, cseq=2, expires=0)
    register(rig, cseq=3)
    rig.now += 601
    rig.b2bua._ring(rig.now)
    gone = [event.cause for event in rig.events if isinstance(event, RegistrationEvent) and event.cause is not None]
    assert gone == [UnregisterCause.REMOVED, UnregisterCause.EXPIRED]
    assert rig.b2bua.registrations() == []


async def test_originated_call_rings_the_caller_and_then_whom_it_would_dial(rig: Rig) -> None:
    register(rig)
    view = rig.b2bua.originate(CallId("orig-1"), "1001", "9123")
    assert isinstance(view, CallView)
    assert (view.call_id, view.state, view.caller, view.callee) == ("orig-1", CallState.RESERVING, "1001", "9123")
    (to_caller,) = rig.open_media()
    assert isinstance(to_caller, Request)
    assert (to_caller.uri, to_caller.from_.uri.user) == ("sip:1001@192.0.2.10:5060", "9123")
    answer = response_to(to_caller, 200, headers=(("Contact", "<sip:1001@192.0.2.10:5060>"),), body=sdp())
    rig.receive(answer.encode())
    ack, to_callee = rig.open_media()
    assert isinstance(ack, Request)
    assert ack.method == "ACK"
    assert isinstance(to_callee, Request)
    assert (to_callee.uri, to_callee.from_.uri.user) == ("sip:9123@192.0.2.50:5060", "1001")
    assert rig.b2bua.call(CallId("orig-1")) == rig.b2bua.calls()[0]


@pytest.mark.parametrize(
    ("caller", "callee", "status", "detail"),
    [
        ("1001", "9123", 480, "the caller: user 1001 has no contact registered"),
        ("9123", "1001", 480, "the callee: user 1001 has no contact registered"),
        ("9123", "4567", 404, "the callee: no route for '4567'"),
    ],
)
async def test_call_that_cannot_be_originated_is_refused_with_the_party_and_leaves_nothing(
    rig: Rig, caller: str, callee: str, status: int, detail: str
) -> None:
    refused = rig.b2bua.originate(CallId("orig-1"), caller, callee)
    assert isinstance(refused, Refusal)
    assert refused.status == status
    assert refused.detail.startswith(detail)
    assert (rig.b2bua.calls(), rig.events, rig.data_plane.wishes) == ([], [], [])


async def test_hang_up_ends_a_call_with_its_reason_and_says_when_there_is_none(rig: Rig) -> None:
    rig.trunk_call()
    (running,) = rig.b2bua.calls()
    view = rig.b2bua.hang_up(running.call_id, "by a test")
    assert view is not None
    assert view.state is CallState.RELEASING
    rig.b2bua.media_input(MediaClosed(running.call_id, ()))
    end = rig.records[0].termination
    assert (end.result.value, end.reason.value, end.detail) == ("cancelled", "api-hangup", "by a test")
    assert rig.b2bua.hang_up(running.call_id, "again") is None


async def test_draining_refuses_what_is_new_and_serves_the_calls_that_run(rig: Rig) -> None:
    invite = rig.trunk_call()
    rig.admission.draining = True
    for method in ("OPTIONS", "REGISTER", "INVITE"):
        data = request_bytes(method, branch=f"z9hG4bK-{method}", call_id=method, uri="sip:9123@198.51.100.1", body=b"")
        answer = rig.receive(data, TRUNK)[-1]
        assert isinstance(answer, Response)
        assert (answer.status, answer.headers.get("Retry-After")) == (503, "7")
    rig.receive(response_to(invite, 200, headers=(CONTACT,), body=sdp(TRUNK)).encode(), TRUNK)
    (ok,) = rig.open_media()
    assert statuses([ok]) == [200]
    assert isinstance(rig.b2bua.originate(CallId("late"), "9123", "9124"), Refusal)


async def test_bug_of_ours_is_an_event_for_the_operator(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(type(rig.b2bua), "_invited", fails)
    rig.receive(request_bytes())
    assert types(rig) == [NODE_ERROR]
