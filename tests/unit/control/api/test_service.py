import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest
from structlog.testing import capture_logs

from control.api.errors import ApiError, ApiErrorKind
from control.pbx.records import CallState, Reason, RegistrationView
from control.pbx.routing import Refusal
from control.store.database import StoreError
from tests.harness.control_node import STARTED_AT, ControlNode, call_view
from tests.harness.records import call_record


@pytest.fixture
async def node() -> ControlNode:
    return ControlNode()


def registration(user: str, contact: str) -> RegistrationView:
    return RegistrationView(user, contact, "127.0.0.2:5060", None, STARTED_AT + timedelta(hours=1))


async def test_originated_call_is_started_once_however_often_it_is_asked_for(node: ControlNode) -> None:
    first = await node.service.originate("c1", "1001", "1002", client="dialler")
    again = await node.service.originate("c1", "1001", "1002", client="dialler")
    assert first == again == node.calls.running["c1"]
    assert node.calls.originated == ["c1"]


async def test_call_that_has_ended_is_not_started_again(node: ControlNode) -> None:
    node.records.kept.append(call_record("c1"))
    call = await node.service.originate("c1", "1001", "1002", client="dialler")
    assert call.state is CallState.ENDED
    assert call.record == call_record("c1")
    assert node.calls.originated == []


@pytest.mark.parametrize(("caller", "callee"), [("1001", "1003"), ("1003", "1002"), ("1002", "1001")])
@pytest.mark.parametrize("ended", [False, True])
async def test_id_of_a_call_between_others_is_refused(node: ControlNode, caller: str, callee: str, ended: bool) -> None:
    if ended:
        node.records.kept.append(call_record("c1"))
    else:
        node.calls.add(call_view("c1"))
    with pytest.raises(ApiError) as refused:
        await node.service.originate("c1", caller, callee, client="dialler")
    assert (refused.value.kind, refused.value.reason) == (ApiErrorKind.ALREADY_EXISTS, "call-id-in-use")
    assert "1001 to 1002" in refused.value.detail
    assert node.calls.originated == []


async def test_call_that_begins_and_ends_while_a_repetition_looks_for_it_is_not_started_again(
    node: ControlNode,
) -> None:
    node.calls.short_lived = node.records.kept
    node.records.readable.clear()
    both = [asyncio.create_task(node.service.originate("c1", "1001", "1002", client="dialler")) for _ in range(2)]
    while not node.records.reads:
        await asyncio.sleep(0)
    node.records.readable.set()
    assert [call.state for call in await asyncio.gather(*both)] == [CallState.CALLING, CallState.ENDED]
    assert node.calls.originated == ["c1"]


async def test_slow_store_holds_up_no_call_of_another_id(node: ControlNode) -> None:
    node.records.readable.clear()
    waiting = asyncio.create_task(node.service.originate("c1", "1001", "1002", client="dialler"))
    while not node.records.reads:
        await asyncio.sleep(0)
    node.calls.add(call_view("c2"))
    assert (await node.service.originate("c2", "1001", "1002", client="dialler")).call_id == "c2"
    assert not waiting.done()
    node.records.readable.set()
    await waiting


@pytest.mark.parametrize("call_id", ["", "a" * 65, "a b", "a.b", "ä", "a\n", "a/b"])
async def test_malformed_id_is_refused_by_every_verb(node: ControlNode, call_id: str) -> None:
    for verb in (
        node.service.originate(call_id, "1001", "1002", client="dialler"),
        node.service.get_call(call_id),
        node.service.hang_up(call_id, client="dialler"),
    ):
        with pytest.raises(ApiError) as refused:
            await verb
        assert (refused.value.kind, refused.value.reason) == (ApiErrorKind.INVALID_ARGUMENT, "bad-call-id")


@pytest.mark.parametrize("party", ["", "1" * 65, "10 01", "10\x0001", "10\u00a001", "\udcff", "1\r\n2"])
async def test_malformed_party_is_refused_by_name(node: ControlNode, party: str) -> None:
    for caller, callee, reason in ((party, "1002", "bad-caller"), ("1001", party, "bad-callee")):
        with pytest.raises(ApiError) as refused:
            await node.service.originate("c1", caller, callee, client="dialler")
        assert (refused.value.kind, refused.value.reason) == (ApiErrorKind.INVALID_ARGUMENT, reason)
    assert node.calls.originated == []


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        (Reason.NOT_REGISTERED, ApiErrorKind.FAILED_PRECONDITION),
        (Reason.UNKNOWN_NUMBER, ApiErrorKind.FAILED_PRECONDITION),
        (Reason.NOT_ALLOWED, ApiErrorKind.FAILED_PRECONDITION),
        (Reason.CALL_LIMIT, ApiErrorKind.RESOURCE_EXHAUSTED),
        (Reason.RATE_LIMIT, ApiErrorKind.RESOURCE_EXHAUSTED),
        (Reason.PORTS_EXHAUSTED, ApiErrorKind.RESOURCE_EXHAUSTED),
        (Reason.DRAINING, ApiErrorKind.UNAVAILABLE),
        (Reason.MEDIA_UNAVAILABLE, ApiErrorKind.UNAVAILABLE),
    ],
)
async def test_refusal_keeps_its_reason_and_says_when_to_come_back(
    node: ControlNode, reason: Reason, kind: ApiErrorKind
) -> None:
    node.calls.refusal = Refusal(503, reason, "this is why", 7)
    with pytest.raises(ApiError) as refused:
        await node.service.originate("c1", "1001", "1002", client="dialler")
    error = refused.value
    assert (error.kind, error.reason, error.detail, error.retry_after_s) == (kind, reason.value, "this is why", 7)


async def test_ended_call_is_given_with_its_record(node: ControlNode) -> None:
    node.records.kept.append(call_record("c1"))
    assert (await node.service.get_call("c1")).record == call_record("c1")


async def test_running_call_is_given_without_the_store(node: ControlNode) -> None:
    node.calls.add(call_view("c1"))
    node.records.failure = StoreError("the disk is gone")
    assert await node.service.get_call("c1") == call_view("c1")


async def test_call_that_never_was_is_not_found(node: ControlNode) -> None:
    for verb in (node.service.get_call("c1"), node.service.hang_up("c1", client="dialler")):
        with pytest.raises(ApiError) as refused:
            await verb
        assert (refused.value.kind, refused.value.reason) == (ApiErrorKind.NOT_FOUND, "no-such-call")


async def test_hanging_up_says_for_whom(node: ControlNode) -> None:
    node.calls.add(call_view("c1"))
    assert await node.service.hang_up("c1", client="dialler") == call_view("c1")
    [(call_id, detail)] = node.calls.hung_up
    assert call_id == "c1"
    assert "dialler" in detail


async def test_hanging_up_a_call_that_has_ended_gives_its_record(node: ControlNode) -> None:
    node.records.kept.append(call_record("c1"))
    assert (await node.service.hang_up("c1", client="dialler")).record == call_record("c1")


async def test_store_that_cannot_be_read_is_unavailable(node: ControlNode) -> None:
    node.records.failure = StoreError("the disk is gone")
    for verb in (
        node.service.get_call("c1"),
        node.service.originate("c1", "1001", "1002", client="dialler"),
        node.service.list_records(0, ""),
    ):
        with pytest.raises(ApiError) as refused:
            await verb
        assert (refused.value.kind, refused.value.reason) == (ApiErrorKind.UNAVAILABLE, "store-unavailable")
    assert node.calls.originated == []


async def test_calls_come_in_pages_with_the_oldest_first(node: ControlNode) -> None:
    node.calls.add(*(call_view(f"c{index}", after_s=9 - index) for index in range(10)))
    first = node.service.list_calls(6, "")
    second = node.service.list_calls(6, first.next_page_token)
    assert [call.call_id for call in first.items + second.items] == [f"c{index}" for index in reversed(range(10))]
    assert second.next_page_token == ""


async def test_call_that_ends_between_two_pages_hides_no_other(node: ControlNode) -> None:
    node.calls.add(*(call_view(f"c{index}", after_s=index) for index in range(4)))
    first = node.service.list_calls(2, "")
    del node.calls.running["c1"]
    assert [call.call_id for call in node.service.list_calls(2, first.next_page_token).items] == ["c2", "c3"]


async def test_registrations_come_by_user_each_exactly_once(node: ControlNode) -> None:
    contacts = [f"sip:{'x' * 5000}{index}@127.0.0.1" for index in range(20)]
    node.calls.bindings = [registration(user, contact) for contact in contacts for user in ("1002", "1001")]
    seen: list[RegistrationView] = []
    token = ""
    while True:
        page = node.service.list_registrations("", 7, token)
        seen += page.items
        if not (token := page.next_page_token):
            break
        assert len(token) < 512
    assert [view.user for view in seen] == ["1001"] * 20 + ["1002"] * 20
    assert {view.contact for view in seen[:20]} == set(contacts)


async def test_registrations_of_one_user(node: ControlNode) -> None:
    node.calls.bindings = [registration(user, "sip:a@b") for user in ("1001", "1002")]
    assert [view.user for view in node.service.list_registrations("1002", 0, "").items] == ["1002"]


async def test_token_of_one_users_registrations_is_refused_for_another(node: ControlNode) -> None:
    node.calls.bindings = [registration("1001", f"sip:{index}@b") for index in range(2)]
    token = node.service.list_registrations("1001", 1, "").next_page_token
    assert len(node.service.list_registrations("1001", 1, token).items) == 1
    with pytest.raises(ApiError, match="bad-page-token"):
        node.service.list_registrations("1002", 1, token)


async def test_records_come_in_pages_with_the_newest_first(node: ControlNode) -> None:
    node.records.kept = [call_record(f"c{index}") for index in range(5)]
    first = await node.service.list_records(3, "")
    second = await node.service.list_records(3, first.next_page_token)
    assert [record.call_id for record in first.items + second.items] == ["c4", "c3", "c2", "c1", "c0"]
    assert second.next_page_token == ""


async def test_drain_tells_how_the_node_is_then(node: ControlNode) -> None:
    assert not node.service.node().draining
    assert node.service.drain(client="dialler").draining
    assert node.service.drain(client="dialler") == node.service.node()


@pytest.mark.parametrize(
    ("prepare", "outcome"),
    [
        (lambda node: None, "started"),
        (lambda node: node.calls.add(call_view("c1")), "repeated"),
        (lambda node: node.calls.add(replace(call_view("c1"), callee="1009")), "call-id-in-use"),
    ],
)
async def test_originated_call_is_logged_with_whose_it_is_and_what_became_of_it(
    node: ControlNode, prepare: Callable[[ControlNode], None], outcome: str
) -> None:
    prepare(node)
    with capture_logs() as logs, contextlib.suppress(ApiError):
        await node.service.originate("c1", "1001", "1002", client="dialler")
    [line] = logs
    assert (line["event"], line["log_level"]) == ("call.originated_by", "info")
    assert (line["client"], line["call_id"], line["outcome"]) == ("dialler", "c1", outcome)


async def test_hanging_up_and_draining_are_logged_with_whose_wish_it_was(node: ControlNode) -> None:
    node.calls.add(call_view("c1"))
    with capture_logs() as logs:
        await node.service.hang_up("c1", client="dialler")
        node.service.drain(client="dialler")
    assert [(line["event"], line["log_level"], line["client"]) for line in logs] == [
        ("call.hung_up_by", "info", "dialler"),
        ("node.drained_by", "info", "dialler"),
    ]
