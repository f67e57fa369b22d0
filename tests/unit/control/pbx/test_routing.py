"""Where numbers lead."""

from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.pbx.records import CallDirection, Reason
from control.pbx.registrar import Binding
from control.pbx.routing import USERS, Caller, NatHandling, Refusal, Route, Router, RouteRule, Target
from control.pbx.trunks import Trunk, Trunks
from control.sip.address import Address, Flow, Transport
from control.sip.headers import Uri

NOW = 1000.0
ALICE = Caller(user="1001")
CARRIER = Flow(Transport.UDP, "udp", Address("198.51.100.10", 5080))
BACKUP = Flow(Transport.UDP, "udp6", Address("2001:db8::10", 5060))
EVERYBODY = frozenset({USERS, "carrier", "backup"})


def binding(user: str, contact: str, source: Address | None = None) -> Binding:
    flow = Flow(Transport.UDP, "udp", source or Address("203.0.113.9", 40_000))
    return Binding(user, Uri.parse(contact), flow, "call-id", 1, NOW + 600)


def router(
    *rules: RouteRule,
    bindings: tuple[Binding, ...] = (),
    nat: NatHandling = NatHandling.AUTO,
    users: tuple[str, ...] = ("1001", "1002"),
) -> Router:
    return Router(
        users=dict.fromkeys(users, nat),
        bindings_of=lambda user, now: [each for each in bindings if each.aor == user and each.expires_at > now],
        trunks=Trunks(
            [
                Trunk("carrier", CARRIER, (ip_network("198.51.100.10"),)),
                Trunk("backup", BACKUP, (ip_network("2001:db8::10"),)),
            ]
        ),
        rules=rules,
    )


def rule(
    prefix: str, trunk: str = "carrier", *, callers: frozenset[str] = frozenset({USERS}), **more: object
) -> RouteRule:
    return RouteRule(prefix, callers, trunk=trunk, **more)  # type: ignore[arg-type]


def routed(subject: Router, uri: str, caller: Caller = ALICE) -> Route:
    outcome = subject.route(caller, Uri.parse(uri), NOW)
    assert isinstance(outcome, Route), outcome
    return outcome


def refused(subject: Router, uri: str, caller: Caller = ALICE) -> Refusal:
    outcome = subject.route(caller, Uri.parse(uri), NOW)
    assert isinstance(outcome, Refusal), outcome
    return outcome


def sent_to(route: Route) -> Address:
    return route.targets[0].flow.remote


# Users


def test_a_user_is_reached_at_its_contact_along_the_flow_it_registered_on() -> None:
    bob = binding("1002", "sip:1002@10.0.0.5:5060;ob")
    route = routed(router(bindings=(bob,)), "sip:1002@pbx")
    assert route == Route((Target(bob.contact, bob.flow, user="1002"),), CallDirection.INTERNAL, "1002")


def test_all_bindings_are_targets_in_the_registrar_s_order() -> None:
    first, second = binding("1002", "sip:a@10.0.0.5"), binding("1002", "sip:b@10.0.0.6")
    route = routed(router(bindings=(first, second)), "sip:1002@pbx")
    assert [target.uri.user for target in route.targets] == ["a", "b"]


def test_a_call_from_a_trunk_to_a_user_is_inbound() -> None:
    subject = router(bindings=(binding("1002", "sip:1002@10.0.0.5"),))
    assert routed(subject, "sip:1002@pbx", Caller(trunk="carrier")).direction is CallDirection.INBOUND


def test_a_known_user_without_contact_is_not_registered() -> None:
    refusal = refused(router(), "sip:1002@pbx")
    assert (refusal.status, refusal.reason) == (480, Reason.NOT_REGISTERED)
    assert "1002" in refusal.detail


def test_a_user_is_found_by_the_unescaped_name_and_whatever_the_host() -> None:
    subject = router(bindings=(binding("1002", "sip:1002@10.0.0.5"),))
    assert routed(subject, "sip:%31002@whatever.example:9999;user=phone").number == "1002"


def test_users_are_case_sensitive() -> None:
    subject = router(users=("bob",), bindings=(binding("bob", "sip:bob@10.0.0.5"),))
    assert refused(subject, "sip:Bob@pbx").reason is Reason.UNKNOWN_NUMBER


def test_separators_are_part_of_a_user_s_name() -> None:
    subject = router(users=("front.desk",), bindings=(binding("front.desk", "sip:x@10.0.0.5"),))
    assert routed(subject, "sip:front.desk@pbx").targets[0].user == "front.desk"
    assert refused(subject, "sip:frontdesk@pbx").status == 404


def test_a_user_comes_before_any_prefix() -> None:
    subject = router(rule("1002"), bindings=(binding("1002", "sip:1002@10.0.0.5"),))
    assert routed(subject, "sip:1002@pbx").targets[0].user == "1002"


def test_a_user_that_is_not_registered_is_not_looked_for_behind_a_trunk() -> None:
    assert refused(router(rule("100")), "sip:1002@pbx").reason is Reason.NOT_REGISTERED


@pytest.mark.rfc("3261", "19.1.1")
def test_a_contact_becomes_a_request_uri_without_headers_and_method() -> None:
    subject = router(bindings=(binding("1002", "sip:1002@10.0.0.5;method=BYE;line=7?Subject=x"),))
    assert str(routed(subject, "sip:1002@pbx").targets[0].uri) == "sip:1002@10.0.0.5;line=7"


@pytest.mark.parametrize(
    ("contact", "nat", "expected"),
    [
        ("sip:1002@10.0.0.5:5070", NatHandling.AUTO, Address("203.0.113.9", 40_000)),
        ("sip:1002@203.0.113.9:5070", NatHandling.AUTO, Address("203.0.113.9", 5070)),
        ("sip:1002@203.0.113.9", NatHandling.AUTO, Address("203.0.113.9", 5060)),
        ("sip:1002@203.0.113.9:5070", NatHandling.SOURCE, Address("203.0.113.9", 40_000)),
        ("sip:1002@203.0.113.9:5070;transport=udp", NatHandling.AUTO, Address("203.0.113.9", 5070)),
        ("sip:1002@203.0.113.9:5070;transport=tcp", NatHandling.AUTO, Address("203.0.113.9", 40_000)),
        ("sip:1002@phone.example:5070", NatHandling.AUTO, Address("203.0.113.9", 40_000)),
    ],
)
def test_the_contact_s_port_is_used_only_where_nothing_translates_addresses(
    contact: str, nat: NatHandling, expected: Address
) -> None:
    assert sent_to(routed(router(bindings=(binding("1002", contact),), nat=nat), "sip:1002@pbx")) == expected


@pytest.mark.parametrize("transport", [Transport.TCP, Transport.TLS])
@pytest.mark.parametrize("contact", ["sip:1002@203.0.113.9:5070", "sip:1002@203.0.113.9:5070;transport=tcp"])
def test_a_user_who_registered_over_a_connection_is_reached_over_it(contact: str, transport: Transport) -> None:
    flow = Flow(transport, "stream", Address("203.0.113.9", 40_000))
    bob = Binding("1002", Uri.parse(contact), flow, "call-id", 1, NOW + 600)
    assert routed(router(bindings=(bob,)), "sip:1002@pbx").targets[0].flow == flow


def test_ipv6_contacts_are_compared_with_their_source_by_value() -> None:
    bob = binding("1002", "sip:1002@[2001:DB8:0::5]:5070", Address("2001:db8::5", 6000))
    assert sent_to(routed(router(bindings=(bob,)), "sip:1002@pbx")) == Address("2001:db8::5", 5070)


# Prefixes


def test_a_number_with_a_prefix_goes_to_its_trunk() -> None:
    route = routed(router(rule("+82")), "sip:+82255501@pbx")
    target = Target(Uri.parse("sip:+82255501@198.51.100.10:5080"), CARRIER, trunk="carrier")
    assert route == Route((target,), CallDirection.OUTBOUND, "+82255501")


def test_a_trunk_of_ipv6_is_written_in_brackets_and_reached_through_its_listener() -> None:
    target = routed(router(rule("+82", "backup")), "sip:+8225@pbx").targets[0]
    assert str(target.uri) == "sip:+8225@[2001:db8::10]:5060"
    assert target.flow == BACKUP


def test_the_longest_prefix_wins_in_whatever_order_rules_come() -> None:
    rules = (rule("+8"), rule("+8225", "backup"), rule("+82"))
    for subject in (router(*rules), router(*reversed(rules))):
        assert routed(subject, "sip:+82255@pbx").targets[0].trunk == "backup"
        assert routed(subject, "sip:+82355@pbx").targets[0].trunk == "carrier"


def test_a_number_that_is_its_prefix_matches() -> None:
    assert routed(router(rule("112")), "sip:112@pbx").number == "112"


@pytest.mark.parametrize(
    ("strip", "prepend", "sent"),
    [(0, "", "9025550"), (1, "", "025550"), (1, "+82", "+82025550"), (0, "00", "009025550")],
)
def test_digits_are_cut_and_put_in_front(strip: int, prepend: str, sent: str) -> None:
    route = routed(router(rule("9", strip=strip, prepend=prepend)), "sip:9025550@pbx")
    assert route.targets[0].uri.user == sent
    assert route.number == "9025550"


def test_a_number_of_which_nothing_is_left_is_unknown() -> None:
    refusal = refused(router(rule("9", strip=1)), "sip:9@pbx")
    assert (refusal.status, refusal.reason) == (404, Reason.UNKNOWN_NUMBER)
    assert "nothing is left" in refusal.detail


@pytest.mark.rfc("3261", "19.1.6")
@pytest.mark.parametrize(
    "uri",
    [
        "sip:+82-2-555-01@pbx",
        "sip:+82(2)555.01@pbx",
        "sip:%2B8225550%31@pbx",
        "sip:+82255501;postd=7@pbx;user=phone",
        "tel:+82-2-555-01",
        "tel:+82255501;phone-context=example.org",
    ],
)
def test_visual_separators_escapes_and_telephone_parameters_are_not_part_of_a_number(uri: str) -> None:
    assert routed(router(rule("+82")), uri).number == "+82255501"


@pytest.mark.rfc("3261", "25.1")
def test_a_hash_is_escaped_towards_a_trunk() -> None:
    assert routed(router(rule("*21")), "sip:*21%23@pbx").targets[0].uri.user == "*21%23"


def test_a_prefix_may_lead_to_a_user() -> None:
    did = RouteRule("+8225550", frozenset({"carrier"}), user="1002")
    subject = router(did, bindings=(binding("1002", "sip:1002@10.0.0.5"),))
    route = routed(subject, "sip:+82-2-5550@pbx", Caller(trunk="carrier"))
    assert (route.targets[0].user, route.direction, route.number) == ("1002", CallDirection.INBOUND, "+8225550")


def test_a_prefix_that_leads_to_a_user_without_contact_is_not_registered() -> None:
    subject = router(RouteRule("+8225550", EVERYBODY, user="1002"))
    assert refused(subject, "sip:+8225550@pbx").reason is Reason.NOT_REGISTERED


# Who may


def test_a_trunk_is_not_relayed_to_a_trunk_unless_a_rule_names_it() -> None:
    refusal = refused(router(rule("+82")), "sip:+8225550@pbx", Caller(trunk="backup"))
    assert (refusal.status, refusal.reason) == (403, Reason.NOT_ALLOWED)
    assert "'+82' of trunk carrier" in refusal.detail
    assert "trunk backup" in refusal.detail


def test_a_rule_that_names_a_trunk_relays_it() -> None:
    subject = router(rule("+82", callers=frozenset({"backup"})))
    assert routed(subject, "sip:+8225550@pbx", Caller(trunk="backup")).direction is CallDirection.OUTBOUND
    assert refused(subject, "sip:+8225550@pbx").reason is Reason.NOT_ALLOWED


def test_a_longer_prefix_for_others_does_not_hide_a_shorter_one() -> None:
    subject = router(rule("+8225", callers=frozenset({"backup"})), rule("+82", "backup"))
    assert routed(subject, "sip:+8225550@pbx").targets[0].trunk == "backup"


def test_one_prefix_may_lead_different_callers_to_different_trunks() -> None:
    subject = router(rule("+82", "backup", callers=frozenset({"carrier"})), rule("+82"))
    assert routed(subject, "sip:+82@pbx").targets[0].trunk == "carrier"
    assert routed(subject, "sip:+82@pbx", Caller(trunk="carrier")).targets[0].trunk == "backup"


def test_a_caller_that_is_neither_user_nor_trunk_reaches_nobody() -> None:
    subject = router(bindings=(binding("1002", "sip:1002@10.0.0.5"),))
    assert refused(subject, "sip:1002@pbx", Caller()).reason is Reason.NOT_ALLOWED


# What is unknown


@pytest.mark.parametrize(
    ("uri", "detail"),
    [
        ("sip:8225550@pbx", "nearly matched is '+82' of trunk carrier, the number lacks '+'"),
        ("sip:008225550@pbx", "nearly matched is '+82' of trunk carrier, the number has 00 for '+'"),
        ("sip:+025550@pbx", "nearly matched is '02' of trunk backup, the number has a '+' too many"),
        ("sip:+8@pbx", "nearly matched is '+82' of trunk carrier, the number is too short"),
        ("sip:+8125550@pbx", "nearly matched is '+82' of trunk carrier, the number differs after '+8'"),
        ("sip:777@pbx", "no prefix comes near"),
        ("sip:1003@pbx", "user '1003' is not configured; similar: 1001, 1002"),
        ("sip:alicia@pbx", "user 'alicia' is not configured; similar: alice"),
        ("sip:zoe@pbx", "user 'zoe' is not configured"),
        ("sip:pbx.example.org", "the Request-URI has no user part"),
    ],
)
def test_an_unknown_number_is_told_what_nearly_matched(uri: str, detail: str) -> None:
    subject = router(rule("+82"), rule("02", "backup"), users=("1001", "1002", "alice"))
    refusal = refused(subject, uri)
    assert (refusal.status, refusal.reason) == (404, Reason.UNKNOWN_NUMBER)
    assert detail in refusal.detail


def test_an_endless_number_is_not_repeated_in_full() -> None:
    assert len(refused(router(rule("+82")), f"sip:{'7' * 50_000}@pbx").detail) < 300


@pytest.mark.rfc("3261", "8.2.2.1")
def test_a_scheme_without_numbers_is_not_supported() -> None:
    refusal = refused(router(), "urn:service:sos")
    assert (refusal.status, refusal.reason) == (416, Reason.BAD_REQUEST)


def test_a_rule_to_a_trunk_that_there_is_not_is_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        router(rule("+82", "nowhere"))


@given(
    st.text(st.sampled_from("+0129*#-.();%ab\udcff@"), max_size=12), st.sampled_from([ALICE, Caller(trunk="carrier")])
)
def test_routing_never_raises_and_never_sends_a_trunk_back_out(user: str, caller: Caller) -> None:
    subject = router(rule("+"), rule("0", strip=1), rule("9", prepend="+82"), RouteRule("1", EVERYBODY, user="1001"))
    outcome = subject.route(caller, Uri("sip", user, "pbx"), NOW)
    if isinstance(outcome, Route):
        assert outcome.targets
        assert caller == ALICE
        assert Uri.parse(str(outcome.targets[0].uri)) == outcome.targets[0].uri
    else:
        assert outcome.detail.isprintable()
