"""The rules of relaying: whose packets are taken, where they go, what is counted and reported."""

import gc
import weakref
from dataclasses import replace

import pytest

from dataplane.session.relay import (
    MAX_PACKET_BYTES,
    Component,
    DropReason,
    FirstPacket,
    Forward,
    LearnedSource,
    MediaSession,
    Resumed,
    Silence,
    Source,
    SourceLatched,
    StreamEvent,
    StreamSnapshot,
)
from dataplane.session.spec import Address, Direction, LatchPolicy, Leg, PortPlan, RelayPlan
from tests.unit.dataplane.packets import rtcp, rtp

CALLER = ("192.0.2.1", 4000)
CALLEE = ("198.51.100.1", 5000)
SIGNALLING = "203.0.113.1"
STRANGER = ("192.0.2.66", 6666)

CALLER_PLAN = PortPlan(
    leg=Leg.CALLER,
    line=0,
    local_address="127.0.0.1",
    rtp_port=21_000,
    rtcp_port=21_001,
    remote_rtp=CALLER,
    remote_rtcp=(CALLER[0], CALLER[1] + 1),
    signalling_address=SIGNALLING,
    clock_rates=((0, 8000),),
)
CALLEE_PLAN = replace(
    CALLER_PLAN,
    leg=Leg.CALLEE,
    rtp_port=21_004,
    rtcp_port=21_005,
    remote_rtp=CALLEE,
    remote_rtcp=(CALLEE[0], CALLEE[1] + 1),
)


class Bench:
    """A session of one line, and time."""

    def __init__(self, caller: PortPlan = CALLER_PLAN, callee: PortPlan = CALLEE_PLAN) -> None:
        self.events: list[StreamEvent] = []
        self.now = 100.0
        self.generation = 0
        self.session = MediaSession("s", self.events)
        self.sequence = 0
        self.apply(caller, callee)

    def apply(self, caller: PortPlan = CALLER_PLAN, callee: PortPlan = CALLEE_PLAN) -> None:
        self.generation += 1
        self.session.apply(RelayPlan("s", self.generation, (caller, callee)), self.now)

    def receive(
        self,
        packet: bytes | None = None,
        source: Source = CALLER,
        *,
        component: Component = Component.RTP,
        leg: Leg = Leg.CALLER,
    ) -> Forward | None:
        self.now += 0.02
        if packet is None:
            self.sequence += 1
            packet = rtp(self.sequence, timestamp=160 * self.sequence)
        return self.session.ports[leg, 0].receive(component, packet, len(packet), source, self.now)

    def stream(self, leg: Leg = Leg.CALLER) -> StreamSnapshot:
        return next(stream for stream in self.session.snapshot() if stream.leg is leg)

    def drops(self, leg: Leg = Leg.CALLER) -> dict[DropReason, int]:
        return dict(self.stream(leg).drops)


# ------------------------------------------------------------------------------------------------------------- relaying


def test_a_packet_of_the_caller_goes_to_the_callee_and_back() -> None:
    bench = Bench()
    assert bench.receive() == Forward(Component.RTP, CALLEE)
    assert bench.receive(source=CALLEE, leg=Leg.CALLEE) == Forward(Component.RTP, CALLER)
    assert (bench.stream().packets, bench.stream().relayed_rtp, bench.stream().octets) == (1, 1, 172)


def test_rtcp_goes_from_port_to_port() -> None:
    bench = Bench()
    forward = bench.receive(rtcp(), (CALLER[0], CALLER[1] + 1), component=Component.RTCP)
    assert forward == Forward(Component.RTCP, (CALLEE[0], CALLEE[1] + 1))
    assert (bench.stream().rtcp_packets, bench.stream().relayed_rtcp, bench.stream().packets) == (1, 1, 0)


def test_packets_for_a_far_end_that_is_not_known_yet_are_counted_and_dropped() -> None:
    bench = Bench(callee=replace(CALLEE_PLAN, remote_rtp=None, remote_rtcp=None))
    assert bench.receive() is None
    assert bench.receive(rtcp(), (CALLER[0], CALLER[1] + 1), component=Component.RTCP) is None
    assert bench.drops() == {DropReason.NO_PEER: 2}
    assert bench.stream().packets == 1


def test_a_far_end_that_is_not_known_yet_cannot_send() -> None:
    bench = Bench(callee=replace(CALLEE_PLAN, remote_rtp=None, remote_rtcp=None))
    assert bench.receive(source=(SIGNALLING, 9), leg=Leg.CALLEE) is None
    assert bench.drops(Leg.CALLEE) == {DropReason.UNKNOWN_SOURCE: 1}


@pytest.mark.rfc("3264", "5.1")
@pytest.mark.parametrize(
    ("caller", "callee", "caller_is_heard", "callee_is_heard"),
    [
        (Direction.SENDRECV, Direction.SENDRECV, True, True),
        (Direction.SENDONLY, Direction.RECVONLY, True, False),
        (Direction.RECVONLY, Direction.SENDONLY, False, True),
        (Direction.SENDONLY, Direction.SENDRECV, True, False),
        (Direction.INACTIVE, Direction.SENDRECV, False, False),
    ],
)
def test_direction_binds_rtp_and_lets_rtcp_flow(
    caller: Direction, callee: Direction, caller_is_heard: bool, callee_is_heard: bool
) -> None:
    bench = Bench(replace(CALLER_PLAN, direction=caller), replace(CALLEE_PLAN, direction=callee))
    assert (bench.receive() is not None) is caller_is_heard
    assert (bench.receive(source=CALLEE, leg=Leg.CALLEE) is not None) is callee_is_heard
    assert bench.drops() == ({} if caller_is_heard else {DropReason.DIRECTION: 1})
    assert bench.receive(rtcp(), (CALLER[0], CALLER[1] + 1), component=Component.RTCP) is not None


def test_a_payload_type_that_was_not_negotiated_is_dropped() -> None:
    bench = Bench()
    assert bench.receive(rtp(1, payload_type=8)) is None
    assert bench.drops() == {DropReason.PAYLOAD_TYPE: 1}
    assert bench.events == []


def test_the_marker_bit_is_not_part_of_the_payload_type() -> None:
    assert Bench().receive(rtp(1, payload_type=0x80)) is not None


def test_any_payload_type_passes_where_none_was_named() -> None:
    assert Bench(replace(CALLER_PLAN, clock_rates=())).receive(rtp(1, payload_type=99)) is not None


@pytest.mark.parametrize("component", list(Component))
def test_what_is_neither_rtp_nor_rtcp_is_dropped(component: Component) -> None:
    bench = Bench()
    assert bench.receive(b"\x00\x01" + bytes(30), component=component) is None
    assert bench.receive(b"", component=component) is None
    assert bench.drops() == {DropReason.BAD_HEADER: 2}


@pytest.mark.parametrize("component", list(Component))
def test_a_packet_that_was_cut_is_dropped(component: Component) -> None:
    bench = Bench()
    packet = bytes([0x80, 200]) + bytes(MAX_PACKET_BYTES - 1)
    assert bench.receive(packet, component=component) is None
    assert bench.drops() == {DropReason.TOO_BIG: 1}


def test_a_packet_that_the_system_does_not_send_was_not_relayed() -> None:
    bench = Bench()
    bench.receive()
    packet = rtp()
    bench.session.ports[Leg.CALLER, 0].send_failed(Component.RTP, packet, len(packet))
    assert (bench.stream().relayed_rtp, bench.stream().relayed_rtp_octets) == (0, 0)
    assert bench.drops() == {DropReason.SEND_FAILED: 1}


def test_an_rtcp_packet_that_the_system_does_not_send_was_not_relayed() -> None:
    bench = Bench()
    packet = rtcp()
    bench.receive(packet, (CALLER[0], CALLER[1] + 1), component=Component.RTCP)
    bench.session.ports[Leg.CALLER, 0].send_failed(Component.RTCP, packet, len(packet))
    assert (bench.stream().relayed_rtcp, bench.stream().relayed_rtcp_octets) == (0, 0)


# --------------------------------------------------------------------------------------------------------- multiplexing

MUX = replace(CALLER_PLAN, rtcp_mux=True, remote_rtcp=CALLER)
MUX_CALLEE = replace(CALLEE_PLAN, rtcp_mux=True, remote_rtcp=CALLEE)


@pytest.mark.rfc("5761", "4")
def test_rtcp_on_a_shared_port_goes_to_the_rtcp_port_of_who_does_not_share() -> None:
    bench = Bench(MUX)
    bench.receive()
    assert bench.receive(rtcp()) == Forward(Component.RTCP, (CALLEE[0], CALLEE[1] + 1))
    assert (bench.stream().rtcp_packets, bench.stream().packets) == (1, 1)


@pytest.mark.rfc("5761", "4")
def test_rtcp_for_a_far_end_that_shares_goes_to_its_rtp_port() -> None:
    bench = Bench(MUX, MUX_CALLEE)
    assert bench.receive(rtcp()) == Forward(Component.RTP, CALLEE)
    assert bench.receive() == Forward(Component.RTP, CALLEE)
    from_callee = bench.receive(rtcp(), CALLEE, leg=Leg.CALLEE)
    assert from_callee == Forward(Component.RTP, CALLER)


def test_rtcp_on_a_shared_port_is_taken_from_the_source_of_rtp_alone() -> None:
    bench = Bench(MUX)
    for _ in range(3):
        bench.receive(source=(SIGNALLING, 7000))
    assert bench.receive(rtcp(), (SIGNALLING, 7000)) is not None
    assert bench.receive(rtcp(), CALLER) is None
    assert bench.drops() == {DropReason.UNKNOWN_SOURCE: 1}


def test_rtcp_on_a_shared_port_that_is_not_sent_was_not_relayed() -> None:
    bench = Bench(MUX)
    packet = rtcp()
    bench.receive(packet)
    bench.session.ports[Leg.CALLER, 0].send_failed(Component.RTP, packet, len(packet))
    assert bench.stream().relayed_rtcp == 0


# ------------------------------------------------------------------------------------------------------------- latching


def test_the_signalled_address_locks_at_once() -> None:
    bench = Bench()
    bench.receive()
    assert bench.events == [
        FirstPacket("s", bench.now, Leg.CALLER, 0, CALLER),
        SourceLatched("s", bench.now, Leg.CALLER, 0, CALLER, CALLER, None),
    ]
    assert bench.stream().source == CALLER


def test_nobody_else_is_relayed_after_the_lock() -> None:
    bench = Bench()
    bench.receive()
    for source in (STRANGER, (CALLER[0], 4002), (SIGNALLING, 4000)):
        assert bench.receive(source=source) is None
    assert bench.drops() == {DropReason.UNKNOWN_SOURCE: 3}
    assert bench.stream().packets == 1


def test_a_stranger_is_never_relayed_before_the_lock_either() -> None:
    bench = Bench()
    for _ in range(10):
        assert bench.receive(source=STRANGER) is None
    assert bench.stream().source is None
    assert bench.events == []


@pytest.mark.parametrize("source", [(CALLER[0], 4444), (SIGNALLING, 4444)])
def test_an_address_behind_nat_locks_after_three_packets_and_is_then_sent_to(source: Source) -> None:
    bench = Bench()
    for _ in range(2):
        assert bench.receive(source=source) is not None
        assert bench.stream().source is None
    assert bench.receive(source=CALLEE, leg=Leg.CALLEE) == Forward(Component.RTP, CALLER)
    bench.receive(source=source)
    assert bench.stream().source == source
    assert bench.events[-1] == SourceLatched("s", bench.now, Leg.CALLER, 0, CALLER, (source[0], source[1]), None)
    assert bench.receive(source=CALLEE, leg=Leg.CALLEE) == Forward(Component.RTP, source)


def test_packets_of_several_ssrcs_do_not_lock() -> None:
    bench = Bench()
    for ssrc in (1, 2, 1, 2, 1):
        bench.receive(rtp(1, ssrc=ssrc), (SIGNALLING, 4444))
    assert bench.stream().source is None


def test_two_sources_that_alternate_do_not_lock() -> None:
    bench = Bench()
    for port in (1, 2, 1, 2, 1):
        bench.receive(source=(SIGNALLING, port))
    assert bench.stream().source is None


def test_the_signalled_address_wins_over_a_source_that_is_being_learned() -> None:
    bench = Bench()
    bench.receive(source=(SIGNALLING, 4444))
    bench.receive(source=(SIGNALLING, 4444))
    bench.receive(source=CALLER)
    assert bench.stream().source == CALLER


def test_a_worse_source_is_refused_while_a_better_one_is_being_learned() -> None:
    bench = Bench()
    bench.receive(source=(CALLER[0], 4444))
    assert bench.receive(source=(SIGNALLING, 4444)) is None
    assert bench.drops() == {DropReason.UNKNOWN_SOURCE: 1}


def test_a_better_source_that_fell_silent_does_not_shut_out_a_worse_one() -> None:
    bench = Bench()
    bench.receive(source=(CALLER[0], 4444))
    bench.now += 1.0
    for _ in range(3):
        assert bench.receive(source=(SIGNALLING, 4444)) is not None
    assert bench.stream().source == (SIGNALLING, 4444)


def test_a_strict_policy_accepts_the_signalled_address_only() -> None:
    bench = Bench(replace(CALLER_PLAN, latch_policy=LatchPolicy.STRICT))
    for source in ((CALLER[0], 4444), (SIGNALLING, 4000)):
        for _ in range(4):
            assert bench.receive(source=source) is None
    assert bench.receive() is not None


def test_an_update_that_changes_nothing_about_the_far_end_keeps_the_lock() -> None:
    bench = Bench()
    for _ in range(3):
        bench.receive(source=(SIGNALLING, 4444))
    bench.apply(replace(CALLER_PLAN, direction=Direction.SENDONLY))
    assert bench.stream().source == (SIGNALLING, 4444)
    assert bench.receive(source=(SIGNALLING, 4444)) is not None


def test_a_new_signalled_address_opens_learning_again() -> None:
    bench = Bench()
    bench.receive()
    moved = ("192.0.2.9", 4100)
    bench.apply(replace(CALLER_PLAN, remote_rtp=moved))
    assert bench.stream().source is None
    assert bench.receive(source=CALLER) is None
    assert bench.receive(source=CALLEE, leg=Leg.CALLEE) == Forward(Component.RTP, moved)
    assert bench.receive(source=moved) is not None
    assert bench.stream().source == moved


def test_late_packets_of_the_former_source_do_not_take_the_lock_again() -> None:
    bench = Bench()
    bench.receive()
    bench.apply(replace(CALLER_PLAN, remote_rtp=(CALLER[0], 4100)))
    for _ in range(5):
        assert bench.receive(source=CALLER) is None
    assert bench.stream().source is None
    bench.now += 2.0
    for _ in range(3):
        bench.receive(source=CALLER)
    assert bench.stream().source == CALLER, "a far end that never moved is heard again"


def test_selecting_another_branch_opens_learning_again() -> None:
    bench = Bench()
    bench.receive(source=CALLEE, leg=Leg.CALLEE)
    bench.apply(callee=replace(CALLEE_PLAN, branch="other"))
    assert bench.stream(Leg.CALLEE).source is None


def test_rtcp_is_taken_from_the_signalled_address_or_from_the_host_of_rtp() -> None:
    bench = Bench()
    other = (SIGNALLING, 4445)
    assert bench.receive(rtcp(), other, component=Component.RTCP) is None
    for _ in range(3):
        bench.receive(source=(SIGNALLING, 4444))
    assert bench.receive(rtcp(), other, component=Component.RTCP) is not None
    assert bench.receive(rtcp(), (SIGNALLING, 4446), component=Component.RTCP) is None, "locked"
    to_caller = bench.receive(rtcp(), (CALLEE[0], CALLEE[1] + 1), component=Component.RTCP, leg=Leg.CALLEE)
    assert to_caller == Forward(Component.RTCP, other)


def test_rtcp_under_a_strict_policy_comes_from_the_signalled_address_only() -> None:
    bench = Bench(replace(CALLER_PLAN, latch_policy=LatchPolicy.STRICT))
    bench.receive()
    assert bench.receive(rtcp(), (CALLER[0], 9999), component=Component.RTCP) is None
    assert bench.receive(rtcp(), (CALLER[0], CALLER[1] + 1), component=Component.RTCP) is not None


def test_a_new_signalled_rtcp_address_unlocks_rtcp_alone() -> None:
    bench = Bench()
    bench.receive()
    bench.receive(rtcp(), (CALLER[0], CALLER[1] + 1), component=Component.RTCP)
    bench.apply(replace(CALLER_PLAN, remote_rtcp=(CALLER[0], 4999)))
    assert bench.stream().source == CALLER
    assert bench.receive(rtcp(), (CALLER[0], 4999), component=Component.RTCP) is not None


def test_the_source_of_rtcp_is_told_beside_that_of_rtp() -> None:
    bench = Bench()
    rtcp_source = (CALLER[0], CALLER[1] + 1)
    bench.receive(rtcp(), rtcp_source, component=Component.RTCP)
    assert bench.events == [SourceLatched("s", bench.now, Leg.CALLER, 0, CALLER, None, rtcp_source)]
    bench.receive()
    assert bench.events[-1] == SourceLatched("s", bench.now, Leg.CALLER, 0, CALLER, CALLER, rtcp_source)


def test_a_source_of_rtcp_that_is_unlocked_is_told_to_be() -> None:
    bench = Bench()
    bench.receive()
    bench.receive(rtcp(), (CALLER[0], CALLER[1] + 1), component=Component.RTCP)
    bench.apply(replace(CALLER_PLAN, remote_rtcp=(CALLER[0], 4999)))
    assert bench.events[-1] == SourceLatched("s", bench.now, Leg.CALLER, 0, CALLER, CALLER, None)


def test_ipv6_sources_are_compared_by_host_and_port() -> None:
    bench = Bench(replace(CALLER_PLAN, remote_rtp=("2001:db8::1", 4000)))
    assert bench.receive(source=("2001:db8::1", 4000, 0, 0)) is not None
    assert bench.stream().source == ("2001:db8::1", 4000)
    assert bench.receive(source=("2001:db8::1", 4000, 0, 0)) is not None


# -------------------------------------------------------------------------------------------------------------- silence


def silence_check(bench: Bench, passed: float) -> list[StreamEvent]:
    bench.events.clear()
    bench.now += passed
    bench.session.check_silence(bench.now, 30.0)
    return list(bench.events)


def test_a_far_end_that_never_sends_is_reported_silent_once() -> None:
    bench = Bench(callee=replace(CALLEE_PLAN, direction=Direction.RECVONLY))
    assert silence_check(bench, 29.9) == []
    assert silence_check(bench, 0.1) == [Silence("s", bench.now, Leg.CALLER, 0, None)]
    assert silence_check(bench, 60.0) == []


def test_a_far_end_that_comes_back_is_reported_and_may_fall_silent_again() -> None:
    bench = Bench(callee=replace(CALLEE_PLAN, direction=Direction.RECVONLY))
    bench.receive()
    heard_at = bench.now
    assert silence_check(bench, 30.01) == [Silence("s", bench.now, Leg.CALLER, 0, heard_at)]
    bench.receive()
    assert silence_check(bench, 1.0) == [Resumed("s", bench.now - 1.0, Leg.CALLER, 0)]
    assert silence_check(bench, 1.0) == []
    assert len(silence_check(bench, 30.0)) == 1


def test_a_far_end_on_hold_is_not_silent_and_gets_its_time_afterwards() -> None:
    bench = Bench()
    held = replace(CALLER_PLAN, direction=Direction.INACTIVE)
    bench.apply(held)
    assert silence_check(bench, 100.0) == []
    bench.apply()
    assert silence_check(bench, 29.0) == []
    assert len(silence_check(bench, 1.0)) == 2


# -------------------------------------------------------------------------------------------------- lines and restoring


def test_a_line_that_goes_keeps_its_figures_and_goes_on_with_them() -> None:
    bench = Bench()
    bench.receive()
    video = replace(CALLER_PLAN, line=1, rtp_port=21_002), replace(CALLEE_PLAN, line=1, rtp_port=21_006)
    with_video = RelayPlan("s", 2, (CALLER_PLAN, CALLEE_PLAN, *video))
    bench.session.apply(with_video, bench.now)
    packet = rtp()
    bench.session.ports[Leg.CALLER, 1].receive(Component.RTP, packet, len(packet), CALLER, bench.now)
    bench.apply()
    assert [(stream.leg, stream.line, stream.packets) for stream in bench.session.snapshot()] == [
        (Leg.CALLER, 0, 1),
        (Leg.CALLEE, 0, 0),
        (Leg.CALLER, 1, 1),
        (Leg.CALLEE, 1, 0),
    ]
    bench.session.apply(with_video, bench.now)
    bench.session.ports[Leg.CALLER, 1].receive(Component.RTP, packet, len(packet), CALLER, bench.now)
    assert next(s for s in bench.session.snapshot() if (s.leg, s.line) == (Leg.CALLER, 1)).packets == 2


def test_a_session_made_again_goes_on_with_its_sources_and_figures() -> None:
    first = Bench()
    for _ in range(3):
        first.receive(source=(SIGNALLING, 4444))
    carried = first.session.close()
    learned = (LearnedSource(Leg.CALLER, 0, CALLER, (SIGNALLING, 4444), None),)
    again = MediaSession("s", first.events)
    first.events.clear()
    again.apply(RelayPlan("s", 1, (CALLER_PLAN, CALLEE_PLAN)), first.now, learned, carried)
    first.session = again
    assert first.receive(source=CALLER) is None
    assert first.receive(source=(SIGNALLING, 4444)) is not None
    assert first.stream().packets == 4
    assert first.events == []


def made_again(caller: PortPlan, rtp_source: Address | None, rtcp_source: Address | None = None) -> Bench:
    """A session whose caller's sources were locked before."""
    bench = Bench()
    bench.session = MediaSession("s", bench.events)
    learned = (LearnedSource(Leg.CALLER, 0, CALLER, rtp_source, rtcp_source),)
    bench.session.apply(RelayPlan("s", 1, (caller, CALLEE_PLAN)), bench.now, learned)
    return bench


def test_a_source_made_again_is_sent_to_and_nobody_else_is_heard_at_once() -> None:
    bench = made_again(CALLER_PLAN, (SIGNALLING, 4444), (SIGNALLING, 4447))
    to_caller = bench.receive(rtcp(), (CALLEE[0], CALLEE[1] + 1), component=Component.RTCP, leg=Leg.CALLEE)
    assert to_caller == Forward(Component.RTCP, (SIGNALLING, 4447))
    assert bench.receive(source=CALLEE, leg=Leg.CALLEE) == Forward(Component.RTP, (SIGNALLING, 4444))
    assert bench.receive(source=CALLER) is None
    assert bench.receive(rtcp(), (CALLER[0], CALLER[1] + 1), component=Component.RTCP) is None
    assert bench.receive(source=(SIGNALLING, 4444)) is not None
    assert bench.receive(rtcp(), (SIGNALLING, 4447), component=Component.RTCP) is not None


@pytest.mark.parametrize(
    ("plan", "source"),
    [
        (replace(CALLER_PLAN, latch_policy=LatchPolicy.STRICT), (CALLER[0], 4444)),
        (CALLER_PLAN, STRANGER),
        (replace(CALLER_PLAN, signalling_address="2001:db8::1"), ("2001:db8::1", 4444)),
    ],
    ids=["strict", "stranger", "other family"],
)
def test_a_source_that_the_policy_does_not_admit_is_not_taken_over(plan: PortPlan, source: Address) -> None:
    bench = made_again(plan, source)
    assert bench.stream().source is None
    assert bench.receive(source=CALLER) is not None


def test_a_source_of_rtcp_that_the_policy_does_not_admit_is_not_taken_over() -> None:
    bench = made_again(CALLER_PLAN, (SIGNALLING, 4444), STRANGER)
    assert bench.receive(rtcp(), STRANGER, component=Component.RTCP) is None
    assert bench.receive(rtcp(), (SIGNALLING, 4445), component=Component.RTCP) is not None


def test_a_session_made_again_learns_anew_when_its_far_end_moves() -> None:
    bench = made_again(CALLER_PLAN, (SIGNALLING, 4444))
    bench.apply(replace(CALLER_PLAN, remote_rtp=(CALLER[0], 4100)))
    assert bench.stream().source is None
    assert bench.receive(source=(CALLER[0], 4100)) is not None


def test_an_ipv6_source_made_again_is_the_one_that_sockets_give() -> None:
    plan = replace(CALLER_PLAN, remote_rtp=("2001:db8::1", 4000), signalling_address="2001:db8::2")
    session = MediaSession("s", [])
    learned = (LearnedSource(Leg.CALLER, 0, ("2001:db8::1", 4000), ("2001:db8::2", 4444), None),)
    session.apply(RelayPlan("s", 1, (plan, CALLEE_PLAN)), 0.0, learned)
    packet = rtp()
    source = ("2001:db8::2", 4444, 0, 0)
    assert session.ports[Leg.CALLER, 0].receive(Component.RTP, packet, len(packet), source, 1.0) is not None


def test_a_source_learned_for_another_address_is_not_taken_over() -> None:
    session = MediaSession("s", [])
    learned = (LearnedSource(Leg.CALLER, 0, ("192.0.2.77", 1), (CALLER[0], 9), None),)
    session.apply(RelayPlan("s", 1, (CALLER_PLAN, CALLEE_PLAN)), 0.0, learned)
    assert all(stream.source is None for stream in session.snapshot())


def test_sessions_and_lines_that_ended_are_freed_without_the_garbage_collector() -> None:
    bench = Bench()
    bench.receive()
    video = replace(CALLER_PLAN, line=1, rtp_port=21_002), replace(CALLEE_PLAN, line=1, rtp_port=21_006)
    bench.session.apply(RelayPlan("s", 2, (CALLER_PLAN, CALLEE_PLAN, *video)), bench.now)
    gc.disable()
    try:
        ports = [weakref.ref(port) for port in bench.session.ports.values()]
        bench.apply()
        assert [port() is None for port in ports] == [False, False, True, True]
        bench.session.close()
        assert [port() for port in ports] == [None] * 4
    finally:
        gc.enable()
