"""Between the node's values and the contract: sources and interruptions."""

from datetime import UTC, datetime

import pytest

from dataplane.service import wire
from dataplane.service.events import Record, RelayInterrupted
from dataplane.service.node import Refusal, RefusedError
from dataplane.session.relay import LearnedSource, SourceLatched
from dataplane.session.spec import Address, Leg
from sippbx.media.v1 import event_pb2, session_pb2

AT = datetime(2030, 1, 1, tzinfo=UTC)


def address(host: str, port: int) -> session_pb2.SocketAddress:
    return session_pb2.SocketAddress(address=host, port=port)


def test_learned_sources_are_read_in_the_systems_spelling() -> None:
    source = session_pb2.LearnedSource(
        leg=session_pb2.LEG_CALLEE, line=1, signalled=address("2001:DB8::1", 1), rtcp=address("2001:db8:0::2", 2)
    )
    assert wire.learned_from_wire([source]) == (
        LearnedSource(Leg.CALLEE, 1, ("2001:db8::1", 1), None, ("2001:db8::2", 2)),
    )


@pytest.mark.parametrize(
    ("source", "field"),
    [
        (session_pb2.LearnedSource(signalled=address("192.0.2.1", 1)), "learned_sources[0].leg"),
        (session_pb2.LearnedSource(leg=session_pb2.LEG_CALLER), "learned_sources[0].signalled.port"),
        (
            session_pb2.LearnedSource(
                leg=session_pb2.LEG_CALLER, signalled=address("192.0.2.1", 1), rtp=address("192.0.2.1", 70_000)
            ),
            "learned_sources[0].rtp.port",
        ),
        (
            session_pb2.LearnedSource(
                leg=session_pb2.LEG_CALLER, signalled=address("192.0.2.1", 1), rtcp=address("host.example", 1)
            ),
            "learned_sources[0].rtcp.address",
        ),
    ],
)
def test_a_learned_source_that_cannot_be_is_refused_by_the_name_of_its_field(
    source: session_pb2.LearnedSource, field: str
) -> None:
    with pytest.raises(RefusedError) as caught:
        wire.learned_from_wire([source])
    assert caught.value.refusal is Refusal.INVALID_ARGUMENT
    assert caught.value.message.startswith(f"{field}: ")


@pytest.mark.parametrize(("rtp", "differs"), [(("192.0.2.1", 4000), False), (("192.0.2.1", 4444), True), (None, False)])
def test_a_latch_is_told_with_all_that_is_locked(rtp: Address | None, differs: bool) -> None:
    latched = SourceLatched("s", 1.0, Leg.CALLER, 0, ("192.0.2.1", 4000), rtp, ("192.0.2.1", 4001))
    event = wire.Translator(1.0, AT).event(Record(7, AT, latched))
    expected = event_pb2.SourceLatched(
        leg=session_pb2.LEG_CALLER,
        differs_from_signalled=differs,
        rtcp_source=address("192.0.2.1", 4001),
        signalled=address("192.0.2.1", 4000),
    )
    if rtp is not None:
        expected.source.CopyFrom(address(*rtp))
    assert (event.sequence, event.session_id, event.source_latched) == (7, "s", expected)


def test_an_interruption_is_told_as_an_event_of_the_data_plane_itself() -> None:
    event = wire.Translator(1.0, AT).event(Record(8, AT, RelayInterrupted(0.25)))
    assert event.session_id == ""
    assert event.relay_interrupted.gap.ToMilliseconds() == 250
