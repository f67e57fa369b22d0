from dataclasses import replace
from datetime import UTC, datetime

import pytest

from control.media import wire
from control.pbx.media import LatchPolicy, LearnedSource, MediaEndpoint, MediaFailure, MediaKind, MediaMode
from control.pbx.records import LegName
from control.sip.address import Address
from control.sip.sdp import Direction, PayloadType
from sippbx.media.v1 import event_pb2, media_service_pb2, node_pb2, session_pb2
from tests.harness.media_specs import media_spec


def test_a_spec_is_written_whole() -> None:
    endpoint = MediaEndpoint(
        leg=LegName.CALLEE,
        line=1,
        kind=MediaKind.VIDEO,
        local_address="::",
        remote_rtp=Address("2001:db8::7", 4000),
        remote_rtcp=Address("2001:db8::7", 4001),
        rtcp_mux=True,
        direction=Direction.RECVONLY,
        latch_policy=LatchPolicy.STRICT,
        signalling_address="2001:db8::8",
        payload_types=(PayloadType(96, "VP8", 90_000),),
        branch="b1",
    )
    spec = replace(media_spec("s1", 7), endpoints=(endpoint,), selected_branch="b1")
    assert wire.spec_to_wire(spec) == session_pb2.SessionSpec(
        session_id="s1",
        generation=7,
        mode=session_pb2.MEDIA_MODE_BYPASS,
        endpoints=[
            session_pb2.Endpoint(
                leg=session_pb2.LEG_CALLEE,
                line=1,
                branch="b1",
                kind=session_pb2.MEDIA_KIND_VIDEO,
                local_address="::",
                remote_rtp=session_pb2.SocketAddress(address="2001:db8::7", port=4000),
                remote_rtcp=session_pb2.SocketAddress(address="2001:db8::7", port=4001),
                rtcp_mux=True,
                direction=session_pb2.DIRECTION_RECVONLY,
                latch_policy=session_pb2.LATCH_POLICY_STRICT,
                signalling_address="2001:db8::8",
                payload_types=[session_pb2.PayloadType(number=96, encoding_name="VP8", clock_rate=90_000)],
            )
        ],
        selected_branch="b1",
    )


def test_what_is_held_is_compared_by_content_whatever_the_order_and_the_generation() -> None:
    spec = media_spec("s1", 7, remote=Address("192.0.2.1", 4000))
    message = wire.spec_to_wire(replace(spec, generation=9, endpoints=spec.endpoints[::-1]))
    held = wire.held_from_wire(session_pb2.Session(session_id="s1", generation=9, spec=message))
    assert held.generation == 9
    assert wire.is_held(held, spec)
    assert not wire.is_held(held, media_spec("s1", 9, remote=Address("192.0.2.1", 4002)))


def test_a_latched_source_is_read_and_written_back() -> None:
    signalled = session_pb2.SocketAddress(address="192.0.2.1", port=4000)
    locked = session_pb2.SocketAddress(address="192.0.2.1", port=4444)
    event = event_pb2.SourceLatched(leg=session_pb2.LEG_CALLEE, line=1, signalled=signalled, rtcp_source=locked)
    source = LearnedSource(LegName.CALLEE, 1, Address("192.0.2.1", 4000), None, Address("192.0.2.1", 4444))
    assert wire.learned_from_wire(event) == source
    assert wire.learned_to_wire(source) == session_pb2.LearnedSource(
        leg=session_pb2.LEG_CALLEE, line=1, signalled=signalled, rtcp=locked
    )


def test_a_latch_of_an_earlier_version_is_passed_over() -> None:
    source = session_pb2.SocketAddress(address="192.0.2.1", port=4444)
    assert wire.learned_from_wire(event_pb2.SourceLatched(leg=session_pb2.LEG_CALLER, source=source)) is None


def test_remotes_that_are_not_known_are_absent() -> None:
    for endpoint in wire.spec_to_wire(media_spec()).endpoints:
        assert not endpoint.HasField("remote_rtp")
        assert not endpoint.HasField("remote_rtcp")


@pytest.mark.parametrize(
    ("values", "word"),
    [(MediaKind, "MediaKind"), (MediaMode, "MediaMode"), (Direction, "Direction"), (LatchPolicy, "LatchPolicy")],
)
def test_every_value_of_call_logic_has_one_of_the_contract(values: type, word: str) -> None:
    for value in values:  # type: ignore[attr-defined]
        changes = {
            "MediaKind": {"kind": value},
            "Direction": {"direction": value},
            "LatchPolicy": {"latch_policy": value},
        }.get(word, {})
        spec = media_spec()
        spec = replace(
            spec,
            mode=value if word == "MediaMode" else spec.mode,
            endpoints=tuple(replace(endpoint, **changes) for endpoint in spec.endpoints),
        )
        wire.spec_to_wire(spec)


def test_final_statistics_are_read_with_the_kind_of_their_line() -> None:
    first, last = datetime(2026, 3, 1, 9, tzinfo=UTC), datetime(2026, 3, 1, 10, tzinfo=UTC)
    session = session_pb2.Session(session_id="s1", first_port=10_000, spec=wire.spec_to_wire(media_spec()))
    statistics = session.statistics.add(
        leg=session_pb2.LEG_CALLEE,
        packets=100,
        octets=17_200,
        lost=-2,
        reordered=1,
        rtcp_packets=3,
        relayed_packets=99,
        drops=[session_pb2.DropCount(packets=4), session_pb2.DropCount(packets=5)],
    )
    statistics.jitter.FromMicroseconds(1_250)
    statistics.first_packet_time.FromDatetime(first)
    statistics.last_packet_time.FromDatetime(last)
    session.statistics.add(leg=session_pb2.LEG_CALLER)
    state = wire.outcome_from_wire(media_service_pb2.CommandResult(command_id=1, session=session))
    assert isinstance(state, wire.SessionState)
    heard, silent = state.streams
    assert (heard.leg, heard.kind, heard.packets, heard.octets, heard.lost) == (
        LegName.CALLEE,
        "audio",
        100,
        17_200,
        -2,
    )
    assert (heard.reordered, heard.jitter_ms, heard.rtcp_packets, heard.relayed_packets) == (1, 1.25, 3, 99)
    assert (heard.dropped_packets, heard.first_packet_at, heard.last_packet_at) == (9, first, last)
    assert (silent.leg, silent.jitter_ms, silent.first_packet_at, silent.last_packet_at) == (
        LegName.CALLER,
        None,
        None,
        None,
    )


@pytest.mark.parametrize(
    ("reason", "failure"),
    [
        (node_pb2.ERROR_REASON_PORTS_EXHAUSTED, MediaFailure.PORTS_EXHAUSTED),
        (node_pb2.ERROR_REASON_DRAINING, MediaFailure.UNAVAILABLE),
        (node_pb2.ERROR_REASON_ADDRESS_NOT_LOCAL, MediaFailure.REFUSED),
        (999, MediaFailure.REFUSED),
    ],
)
def test_reasons_of_the_contract_become_failures(reason: node_pb2.ErrorReason.ValueType, failure: MediaFailure) -> None:
    assert wire.error_from_wire(node_pb2.Error(reason=reason)).failure is failure


def test_the_word_for_a_reason_is_the_contracts_and_closed() -> None:
    assert wire.reason_name(node_pb2.ERROR_REASON_PORTS_EXHAUSTED) == "ports_exhausted"
    assert wire.reason_name(999) == "other"  # type: ignore[arg-type]
    assert wire.close_reason_name(event_pb2.CLOSE_REASON_WORKER_LOST) == "worker_lost"
    assert wire.close_reason_name(999) == "other"  # type: ignore[arg-type]
    assert wire.leg_name(session_pb2.LEG_CALLER) == "caller"
    assert wire.leg_name(session_pb2.LEG_UNSPECIFIED) == "unspecified"


def test_a_span_that_is_over_is_zero() -> None:
    assert wire.duration_to_wire(-1.0).ToMilliseconds() == 0
    assert wire.duration_to_wire(1.5).ToMilliseconds() == 1_500
