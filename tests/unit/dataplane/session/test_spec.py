"""Wanted state: validation that names the field, and the plan that comes of it."""

from dataclasses import replace

import pytest

from dataplane.ports import PortBlock
from dataplane.session.spec import (
    Direction,
    Endpoint,
    InvalidSpecError,
    LatchPolicy,
    Leg,
    MediaKind,
    MediaMode,
    PayloadType,
    PortPlan,
    SessionSpec,
    numeric,
    plan,
    validate,
)

BLOCK = PortBlock(21_000, 8)
CALLER = Endpoint(
    leg=Leg.CALLER,
    line=0,
    branch="",
    kind=MediaKind.AUDIO,
    local_address="127.0.0.1",
    remote_rtp=("127.0.0.2", 4000),
    remote_rtcp=None,
    rtcp_mux=False,
    direction=Direction.SENDRECV,
    latch_policy=LatchPolicy.NAT_AWARE,
    signalling_address="127.0.0.3",
    payload_types=(PayloadType(0, "PCMU", 8000), PayloadType(101, "telephone-event", 8000)),
)
CALLEE = replace(CALLER, leg=Leg.CALLEE, local_address="127.0.0.9", remote_rtp=("127.0.0.4", 5000))


def spec(*endpoints: Endpoint, selected_branch: str = "", session_id: str = "s") -> SessionSpec:
    return SessionSpec(session_id, 1, MediaMode.BYPASS, endpoints, selected_branch)


def ports(wanted: SessionSpec) -> dict[tuple[Leg, int], PortPlan]:
    return {(port.leg, port.line): port for port in plan(wanted, BLOCK).ports}


def test_both_legs_get_the_ports_of_their_half() -> None:
    planned = ports(spec(CALLER, CALLEE, replace(CALLEE, line=1)))
    assert {key: (port.rtp_port, port.rtcp_port) for key, port in planned.items()} == {
        (Leg.CALLER, 0): (21_000, 21_001),
        (Leg.CALLEE, 0): (21_004, 21_005),
        (Leg.CALLER, 1): (21_002, 21_003),
        (Leg.CALLEE, 1): (21_006, 21_007),
    }


def test_a_line_known_on_one_leg_is_bound_on_the_other_as_that_legs_lines_are() -> None:
    planned = ports(spec(CALLER, CALLEE, replace(CALLER, line=1)))
    assert planned[Leg.CALLEE, 1].local_address == "127.0.0.9"
    assert planned[Leg.CALLEE, 1].remote_rtp is None


def test_a_leg_without_any_line_is_bound_as_the_other_leg() -> None:
    assert ports(spec(CALLER))[Leg.CALLEE, 0].local_address == "127.0.0.1"


def test_rtcp_goes_one_port_above_rtp_unless_signalled_otherwise() -> None:
    signalled = replace(CALLEE, remote_rtcp=("127.0.0.4", 7777))
    planned = ports(spec(CALLER, signalled))
    assert planned[Leg.CALLER, 0].remote_rtcp == ("127.0.0.2", 4001)
    assert planned[Leg.CALLEE, 0].remote_rtcp == ("127.0.0.4", 7777)


@pytest.mark.rfc("5761", "5.1.1")
def test_rtcp_goes_where_rtp_goes_when_they_share_a_port() -> None:
    assert ports(spec(replace(CALLER, rtcp_mux=True)))[Leg.CALLER, 0].remote_rtcp == ("127.0.0.2", 4000)


def test_rtp_on_the_last_port_has_no_rtcp() -> None:
    assert ports(spec(replace(CALLER, remote_rtp=("127.0.0.2", 65535))))[Leg.CALLER, 0].remote_rtcp is None


@pytest.mark.rfc("4733", "2.2.1")
def test_telephone_events_do_not_count_as_jitter() -> None:
    assert ports(spec(CALLER))[Leg.CALLER, 0].clock_rates == ((0, 8000), (101, 0))


def test_the_selected_branch_is_the_one_that_is_relayed() -> None:
    one = replace(CALLEE, branch="one")
    two = replace(CALLEE, branch="two", remote_rtp=("127.0.0.5", 5002))
    assert ports(spec(CALLER, one, two, selected_branch="two"))[Leg.CALLEE, 0].remote_rtp == ("127.0.0.5", 5002)


def test_an_only_branch_needs_no_selection() -> None:
    assert ports(spec(CALLER, replace(CALLEE, branch="one")))[Leg.CALLEE, 0].remote_rtp == ("127.0.0.4", 5000)


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        (spec(CALLER, session_id=""), "session_id: "),
        (spec(CALLER, session_id="x" * 65), "session_id: "),
        (spec(CALLER, session_id="a b"), "session_id: "),
        (spec(CALLER, session_id="é"), "session_id: "),
        (spec(), "endpoints: at least one"),
        (spec(replace(CALLER, line=2)), r"endpoints\[caller, line 2\].line: must be below 2"),
        (spec(replace(CALLER, branch="x")), "branch: must be empty for the caller"),
        (spec(CALLER, CALLER), "occurs twice"),
        (spec(replace(CALLER, remote_rtp=("::1", 4000))), "remote_rtp: ::1 is not of the family"),
        (spec(replace(CALLER, remote_rtcp=("::1", 4000))), "remote_rtcp: ::1 is not of the family"),
        (spec(replace(CALLER, remote_rtp=("127.0.0.1", 0))), "remote_rtp.port: 0 is not between"),
        (spec(replace(CALLER, remote_rtp=("127.0.0.1", 65536))), "remote_rtp.port: 65536 is not between"),
        (
            spec(CALLER, replace(CALLEE, branch="a"), replace(CALLEE, branch="b", local_address="127.0.0.8")),
            "local_address: must be the same",
        ),
        (spec(CALLER, replace(CALLEE, branch="a"), replace(CALLEE, branch="b")), "selected_branch: required"),
        (spec(CALLER, CALLEE, selected_branch="c"), "selected_branch: no endpoint has branch 'c'"),
    ],
)
def test_what_is_wrong_is_told_by_the_name_of_its_field(wanted: SessionSpec, problem: str) -> None:
    with pytest.raises(InvalidSpecError, match=problem):
        validate(wanted, BLOCK.lines)


def test_a_good_spec_is_valid() -> None:
    validate(spec(CALLER, CALLEE, replace(CALLER, line=1)), BLOCK.lines)


def test_addresses_are_spelt_as_the_system_spells_them() -> None:
    assert numeric("f", "2001:DB8:0::1") == "2001:db8::1"


@pytest.mark.parametrize("text", ["host.example.org", "", "127.0.0.1:80", "[::1]", "fe80::1%eth0", "::ffff:127.0.0.1"])
def test_what_is_not_a_plain_numeric_address_is_refused(text: str) -> None:
    with pytest.raises(InvalidSpecError, match=r"^f: "):
        numeric("f", text)


def test_directions_know_who_sends_and_who_receives() -> None:
    assert [(d.sends, d.receives) for d in Direction] == [(True, True), (True, False), (False, True), (False, False)]
