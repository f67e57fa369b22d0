"""The registrar, in the order of RFC 3261 section 10.3."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.b2bua.registration import restored_bindings, saved_bindings
from control.pbx.registrar import Binding, Registrar, RegistrarResult, same_contact
from control.sip.address import Address, Flow, Transport
from control.sip.headers import Uri
from control.sip.message import Request, parse_message

FLOW = Flow(Transport.UDP, "udp", Address("203.0.113.9", 40_000))
NOW = 1000.0
PHONE = "<sip:1001@192.0.2.1:5060>"
MOBILE = "<sip:1001@192.0.2.2:5060>"


def registrar(*, max_bindings: int = 3) -> Registrar:
    return Registrar(
        is_user={"1001", "1002"}.__contains__,
        min_expires_s=60,
        max_expires_s=3600,
        default_expires_s=600,
        max_bindings=max_bindings,
    )


def register(
    *contacts: str, expires: str | None = None, cseq: int = 1, call_id: str = "a@phone", to: str = "<sip:1001@pbx>"
) -> Request:
    lines = [
        "REGISTER sip:pbx SIP/2.0",
        "Via: SIP/2.0/UDP 192.0.2.1:5060;branch=z9hG4bK1",
        "Max-Forwards: 70",
        "From: <sip:1001@pbx>;tag=1",
        f"To: {to}",
        f"Call-ID: {call_id}",
        f"CSeq: {cseq} REGISTER",
        "User-Agent: phone/1",
        *(f"Contact: {contact}" for contact in contacts),
    ]
    if expires is not None:
        lines.append(f"Expires: {expires}")
    message = parse_message("\r\n".join([*lines, "Content-Length: 0", "", ""]).encode())
    assert isinstance(message, Request)
    return message


def hosts(bindings: list[Binding] | tuple[Binding, ...]) -> list[str]:
    return [binding.contact.host for binding in bindings]


def contacts(result: RegistrarResult) -> list[str]:
    return result.response.headers.get_all("Contact")


@pytest.mark.rfc("3261", "10.3")
def test_a_user_may_not_register_somebody_else_s_address_of_record() -> None:
    subject = registrar()
    result = subject.receive(register(PHONE, to="<sip:1002@pbx>"), FLOW, "1001", NOW)
    assert result.response.status == 403
    assert len(subject) == 0


@pytest.mark.rfc("3261", "10.3")
def test_users_are_compared_exactly_but_for_escapes() -> None:
    assert registrar().receive(register(PHONE, to="<sip:%31001@pbx>"), FLOW, "1001", NOW).response.status == 200
    subject = Registrar(
        is_user={"bob"}.__contains__, min_expires_s=60, max_expires_s=3600, default_expires_s=600, max_bindings=1
    )
    assert subject.receive(register(PHONE, to="<sip:Bob@pbx>"), FLOW, "bob", NOW).response.status == 403


@pytest.mark.rfc("3261", "10.3")
def test_an_address_of_record_that_is_no_user_s_is_not_found() -> None:
    assert registrar().receive(register(PHONE, to="<sip:1009@pbx>"), FLOW, "1009", NOW).response.status == 404


@pytest.mark.rfc("3261", "10.3")
def test_a_registration_binds_the_contact_to_the_flow_it_came_along() -> None:
    subject = registrar()
    contact = '<sip:1001@192.0.2.1:5060;ob>;q=0.5;+sip.instance="<urn:uuid:1>"'
    result = subject.receive(register(contact, cseq=7), FLOW, "1001", NOW)
    (binding,) = subject.lookup("1001", NOW)
    assert binding == Binding(
        aor="1001",
        contact=Uri.parse("sip:1001@192.0.2.1:5060;ob"),
        flow=FLOW,
        sip_call_id="a@phone",
        cseq=7,
        expires_at=NOW + 600,
        q=0.5,
        user_agent="phone/1",
        instance="<urn:uuid:1>",
    )
    assert result.added == (binding,)
    assert result.removed == ()


@pytest.mark.rfc("3261", "10.3")
def test_the_answer_lists_all_contacts_with_what_is_left_of_their_time() -> None:
    subject = registrar()
    subject.receive(register(f"{PHONE};q=0.25", expires="100"), FLOW, "1001", NOW)
    result = subject.receive(register(MOBILE, call_id="b@mobile", expires="200"), FLOW, "1001", NOW + 40)
    assert result.response.status == 200
    assert contacts(result) == [f"{MOBILE};expires=200", f"{PHONE};q=0.25;expires=60"]
    assert hosts(result.added) == ["192.0.2.2"]


@pytest.mark.rfc("3261", "8.2.6.2")
def test_the_answer_has_no_to_tag_yet() -> None:
    assert registrar().receive(register(PHONE), FLOW, "1001", NOW).response.to.tag is None


@pytest.mark.rfc("3261", "10.2.3")
def test_a_request_without_contact_fetches_and_changes_nothing() -> None:
    subject = registrar()
    subject.receive(register(PHONE, cseq=5), FLOW, "1001", NOW)
    before = subject.lookup("1001", NOW)
    result = subject.receive(register(cseq=5), FLOW, "1001", NOW + 1)
    assert contacts(result) == [f"{PHONE};expires=599"]
    assert (result.added, result.removed) == ((), ())
    assert subject.lookup("1001", NOW) == before


@pytest.mark.rfc("3261", "10.2.1.1")
@pytest.mark.parametrize(
    ("parameter", "header", "granted"),
    [
        (None, None, 600),
        (None, "120", 120),
        ("90", "120", 90),
        ("7200", None, 3600),
        (None, "4294967296", 3600),
        ("99999999999999999999999999", None, 3600),
        ("soon", None, 3600),
        (None, "soon", 3600),
        ("60", None, 60),
    ],
)
def test_the_contact_s_own_interval_counts_before_the_header_s_within_the_bounds(
    parameter: str | None, header: str | None, granted: int
) -> None:
    subject = registrar()
    contact = PHONE if parameter is None else f"{PHONE};expires={parameter}"
    subject.receive(register(contact, expires=header), FLOW, "1001", NOW)
    assert [binding.expires_at for binding in subject.lookup("1001", NOW)] == [NOW + granted]


@pytest.mark.rfc("3261", "10.3")
def test_too_short_an_interval_is_refused_with_the_shortest_that_is_granted() -> None:
    subject = registrar()
    result = subject.receive(register(f"{MOBILE};expires=600", f"{PHONE};expires=59"), FLOW, "1001", NOW)
    assert result.response.status == 423
    assert result.response.headers.get("Min-Expires") == "60"
    assert len(subject) == 0


@pytest.mark.rfc("3261", "10.2.2")
def test_an_interval_of_zero_removes_the_contact_and_leaves_the_others() -> None:
    subject = registrar()
    subject.receive(register(PHONE, MOBILE), FLOW, "1001", NOW)
    result = subject.receive(register(f"{PHONE};expires=0", cseq=2), FLOW, "1001", NOW)
    assert hosts(result.removed) == ["192.0.2.1"]
    assert result.added == ()
    assert hosts(subject.lookup("1001", NOW)) == ["192.0.2.2"]
    assert len(subject) == 1


@pytest.mark.rfc("3261", "10.2.2")
def test_removing_what_is_not_there_is_no_error() -> None:
    result = registrar().receive(register(PHONE, expires="0"), FLOW, "1001", NOW)
    assert (result.response.status, result.added, result.removed) == (200, (), ())


@pytest.mark.rfc("3261", "10.2.2")
def test_the_wildcard_removes_everything_whoever_registered_it() -> None:
    subject = registrar()
    subject.receive(register(PHONE), FLOW, "1001", NOW)
    subject.receive(register(MOBILE, call_id="b@mobile"), FLOW, "1001", NOW)
    subject.receive(register("<sip:1002@192.0.2.3>", to="<sip:1002@pbx>"), FLOW, "1002", NOW)
    result = subject.receive(register("*", expires="0", cseq=2), FLOW, "1001", NOW)
    assert result.response.status == 200
    assert contacts(result) == []
    assert len(result.removed) == 2
    assert subject.lookup("1001", NOW) == []
    assert len(subject) == 1


@pytest.mark.rfc("3261", "10.3")
@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(register("*"), id="without Expires"),
        pytest.param(register("*", expires="60"), id="with another Expires"),
        pytest.param(register("*", PHONE, expires="0"), id="beside another contact"),
        pytest.param(register(PHONE, "*", expires="0"), id="behind another contact"),
        pytest.param(register("<sip:1001@192.0.2.1", expires="60"), id="unterminated address"),
        pytest.param(register(f"{PHONE};q=1.5"), id="q above 1"),
        pytest.param(register(f"{PHONE};q=much"), id="q not a number"),
        pytest.param(register("<tel:+8225551234>"), id="contact that cannot be reached"),
    ],
)
def test_what_is_malformed_is_refused_and_changes_nothing(request_: Request) -> None:
    subject = registrar()
    subject.receive(register(PHONE, call_id="first"), FLOW, "1001", NOW)
    before = subject.lookup("1001", NOW)
    result = subject.receive(request_, FLOW, "1001", NOW)
    assert result.response.status == 400
    assert subject.lookup("1001", NOW) == before


@pytest.mark.rfc("3261", "10.3")
def test_a_refresh_replaces_its_binding_and_moves_it_to_the_new_flow() -> None:
    subject = registrar()
    subject.receive(register(PHONE), FLOW, "1001", NOW)
    moved = Flow(Transport.UDP, "udp", Address("203.0.113.9", 41_000))
    result = subject.receive(register(PHONE, cseq=2), moved, "1001", NOW + 100)
    (binding,) = subject.lookup("1001", NOW + 100)
    assert (binding.flow, binding.cseq, binding.expires_at) == (moved, 2, NOW + 700)
    assert (result.added, result.refreshed) == ((), (binding,))
    assert result.removed == ()
    assert len(subject) == 1


@pytest.mark.rfc("3261", "10.3")
@pytest.mark.parametrize("cseq", [4, 5])
@pytest.mark.parametrize("contact", [PHONE, f"{PHONE};expires=0", "*"])
def test_a_request_that_was_overtaken_by_a_later_one_of_its_call_id_fails(contact: str, cseq: int) -> None:
    subject = registrar()
    subject.receive(register(PHONE, cseq=5), FLOW, "1001", NOW)
    before = subject.lookup("1001", NOW)
    result = subject.receive(register(contact, cseq=cseq, expires="0" if contact == "*" else None), FLOW, "1001", NOW)
    assert result.response.status == 500
    assert subject.lookup("1001", NOW) == before


@pytest.mark.rfc("3261", "10.3")
def test_one_overtaken_contact_fails_the_request_as_a_whole() -> None:
    subject = registrar()
    subject.receive(register(PHONE, cseq=5), FLOW, "1001", NOW)
    assert subject.receive(register(MOBILE, PHONE, cseq=5), FLOW, "1001", NOW).response.status == 500
    assert hosts(subject.lookup("1001", NOW)) == ["192.0.2.1"]


@pytest.mark.rfc("3261", "10.3")
def test_a_phone_that_restarted_with_another_call_id_may_begin_with_a_low_cseq() -> None:
    subject = registrar()
    subject.receive(register(PHONE, cseq=500), FLOW, "1001", NOW)
    assert subject.receive(register(PHONE, cseq=1, call_id="new"), FLOW, "1001", NOW).response.status == 200
    assert len(subject) == 1


def test_a_contact_given_twice_in_one_request_is_bound_once_and_the_last_counts() -> None:
    subject = registrar()
    result = subject.receive(register(f"{PHONE};expires=100", f"{PHONE};expires=200"), FLOW, "1001", NOW)
    assert contacts(result) == [f"{PHONE};expires=200"]


def test_more_contacts_than_allowed_are_refused_as_a_whole() -> None:
    subject = registrar(max_bindings=2)
    subject.receive(register(PHONE), FLOW, "1001", NOW)
    result = subject.receive(register(MOBILE, "<sip:1001@192.0.2.3>", call_id="b"), FLOW, "1001", NOW)
    assert result.response.status == 403
    assert hosts(subject.lookup("1001", NOW)) == ["192.0.2.1"]
    assert subject.receive(register(MOBILE, call_id="b"), FLOW, "1001", NOW).response.status == 200


def test_contacts_whose_time_is_over_make_room_for_new_ones() -> None:
    subject = registrar(max_bindings=1)
    subject.receive(register(PHONE, expires="60"), FLOW, "1001", NOW)
    result = subject.receive(register(MOBILE, call_id="b"), FLOW, "1001", NOW + 60)
    assert result.response.status == 200
    assert hosts(result.removed) == ["192.0.2.1"]
    assert len(subject) == 1


def test_the_best_binding_has_the_highest_q_and_then_was_registered_last() -> None:
    subject = registrar()
    subject.receive(register("<sip:1001@192.0.2.1>;q=0.9", call_id="a"), FLOW, "1001", NOW)
    subject.receive(register("<sip:1001@192.0.2.2>;q=0.1", call_id="b"), FLOW, "1001", NOW)
    subject.receive(register("<sip:1001@192.0.2.3>;q=0.9", call_id="c"), FLOW, "1001", NOW)
    assert hosts(subject.lookup("1001", NOW)) == ["192.0.2.3", "192.0.2.1", "192.0.2.2"]
    subject.receive(register("<sip:1001@192.0.2.1>;q=0.9", call_id="a", cseq=2), FLOW, "1001", NOW)
    assert hosts(subject.lookup("1001", NOW)) == ["192.0.2.1", "192.0.2.3", "192.0.2.2"]


def test_a_binding_is_not_found_once_its_time_is_over_even_before_it_is_removed() -> None:
    subject = registrar()
    subject.receive(register(PHONE, expires="60"), FLOW, "1001", NOW)
    assert hosts(subject.lookup("1001", NOW + 59.9)) == ["192.0.2.1"]
    assert subject.lookup("1001", NOW + 60) == []
    assert len(subject) == 1


def test_expired_bindings_are_removed_and_returned_once() -> None:
    subject = registrar()
    subject.receive(register(f"{PHONE};expires=60", f"{MOBILE};expires=120"), FLOW, "1001", NOW)
    assert subject.next_deadline() == NOW + 60
    assert subject.expire(NOW + 59) == []
    assert hosts(subject.expire(NOW + 60)) == ["192.0.2.1"]
    assert subject.expire(NOW + 60) == []
    assert subject.next_deadline() == NOW + 120
    assert hosts(subject.expire(NOW + 500)) == ["192.0.2.2"]
    assert subject.next_deadline() is None
    assert len(subject) == 0


def test_a_refreshed_binding_outlives_its_first_deadline() -> None:
    subject = registrar()
    subject.receive(register(PHONE, expires="60"), FLOW, "1001", NOW)
    subject.receive(register(PHONE, expires="60", cseq=2), FLOW, "1001", NOW + 30)
    assert subject.expire(NOW + 60) == []
    assert hosts(subject.expire(NOW + 90)) == ["192.0.2.1"]


def test_refreshing_often_leaves_no_pile_of_deadlines() -> None:
    subject = registrar()
    for number in range(1, 1000):
        subject.receive(register(PHONE, cseq=number), FLOW, "1001", NOW + number)
    assert len(subject._deadlines) < 100
    assert hosts(subject.expire(NOW + 999 + 600)) == ["192.0.2.1"]


@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.sampled_from([0, 60, 90, 300]), st.integers(0, 100)), min_size=1, max_size=30
    )
)
def test_the_count_is_always_that_of_the_bindings_and_no_deadline_is_missed(steps: list[tuple[int, int, int]]) -> None:
    subject, now = registrar(max_bindings=3), NOW
    for cseq, (host, expires, wait) in enumerate(steps, start=1):
        now += wait
        subject.expire(now)
        contact = f"<sip:1001@192.0.2.{host}>;expires={expires}"
        subject.receive(register(contact, cseq=cseq), FLOW, "1001", now)
        live = subject.lookup("1001", now)
        assert len(subject) == len(live) <= 3
        deadline = subject.next_deadline()
        assert not live or (deadline is not None and deadline <= min(binding.expires_at for binding in live))
    subject.expire(now + 3600)
    assert (len(subject), subject.next_deadline()) == (0, None)


@pytest.mark.rfc("3261", "19.1.4")
@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("sip:%61lice@pbx;transport=UDP", "sip:alice@PBX;Transport=udp", True),
        ("sip:alice@pbx;newparam=5", "sip:alice@pbx", True),
        ("sip:[2001:db8::1]", "sip:[2001:DB8:0::1]", True),
        ("sip:alice@pbx;a=1;b=2", "sip:alice@pbx;b=2;a=1", True),
        ("sip:ALICE@pbx", "sip:alice@pbx", False),
        ("sip:alice@pbx", "sip:alice@pbx:5060", False),
        ("sip:alice@pbx", "sip:alice@pbx;transport=udp", False),
        ("sip:alice@pbx;line=1", "sip:alice@pbx;line=2", False),
        ("sip:alice@pbx", "sips:alice@pbx", False),
        ("sip:alice@pbx?subject=1", "sip:alice@pbx", False),
        ("sip:alice@pbx", "sip:alice@pbx2", False),
    ],
)
def test_contacts_are_compared_as_uris(one: str, other: str, equal: bool) -> None:
    assert same_contact(Uri.parse(one), Uri.parse(other)) is equal
    assert same_contact(Uri.parse(other), Uri.parse(one)) is equal


def test_bindings_of_an_earlier_process_are_taken_up_by_its_successor_s_clock() -> None:
    before = registrar()
    before.receive(register(f"{PHONE};q=0.5"), FLOW, "1001", NOW)
    before.receive(register(MOBILE, cseq=2, expires="60"), FLOW, "1001", NOW)
    plain = saved_bindings(tuple(before.lookup("1001", NOW)))
    after = registrar()
    after.restore(restored_bindings(plain, offset_s=-900.0))
    assert hosts(after.lookup("1001", 100.0)) == ["192.0.2.2", "192.0.2.1"], "best first, as before"
    assert hosts(after.expire(161.0)) == ["192.0.2.2"]
    assert hosts(after.lookup("1001", 161.0)) == ["192.0.2.1"]
    assert len(after) == 1


def test_bindings_of_somebody_who_is_no_user_any_more_are_not_taken_up() -> None:
    before = registrar()
    before.receive(register(PHONE), FLOW, "1001", NOW)
    after = Registrar(
        is_user=lambda _: False, min_expires_s=60, max_expires_s=3600, default_expires_s=600, max_bindings=1
    )
    after.restore(before.bindings(NOW))
    assert len(after) == 0
