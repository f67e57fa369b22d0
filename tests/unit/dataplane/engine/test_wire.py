"""Frames between the userspace engine and its worker."""

import pytest

from dataplane.engine.wire import (
    MAX_FRAME_BYTES,
    Applied,
    Apply,
    Collect,
    Collected,
    FrameBuffer,
    Message,
    Refused,
    Remove,
    Removed,
    SessionStreams,
    decode,
    encode,
)
from dataplane.session.relay import (
    DropReason,
    FirstPacket,
    LearnedSource,
    Resumed,
    Silence,
    SourceLatched,
    StreamSnapshot,
)
from dataplane.session.spec import Direction, LatchPolicy, Leg, PortPlan, RelayPlan

PORT = PortPlan(
    leg=Leg.CALLEE,
    line=1,
    local_address="::1",
    rtp_port=21_006,
    rtcp_port=21_007,
    branch="b",
    remote_rtp=("::2", 4000),
    remote_rtcp=None,
    rtcp_mux=True,
    direction=Direction.SENDONLY,
    latch_policy=LatchPolicy.STRICT,
    signalling_address="::3",
    clock_rates=((0, 8000), (101, 0)),
)
STREAM = StreamSnapshot(
    Leg.CALLER, 0, 5, 860, -1, 2, 0.0125, 3, 84, 4, 700, 3, 84, 1.5, 2.5, 7, ((DropReason.TOO_BIG, 2),), ("::2", 1)
)


@pytest.mark.parametrize(
    "message",
    [
        Apply(1, RelayPlan("s", 2, (PORT,)), (LearnedSource(Leg.CALLER, 0, ("::2", 8), ("::2", 9), None),), (STREAM,)),
        Remove(2, "s"),
        Collect(3, None),
        Collect(4, ("a", "b")),
        Applied(5),
        Refused(6, "::1", 21_006, 98),
        Removed(7, (STREAM, StreamSnapshot(Leg.CALLEE, 1))),
        Collected(8, (SessionStreams("s", (STREAM,)),), last=True),
        FirstPacket("s", 1.5, Leg.CALLER, 0, ("::2", 1)),
        SourceLatched("s", 1.5, Leg.CALLER, 0, ("::2", 2), ("::2", 1), None),
        Silence("s", 1.5, Leg.CALLER, 0, None),
        Resumed("s", 1.5, Leg.CALLER, 0),
    ],
    ids=lambda message: type(message).__name__,
)
def test_every_message_arrives_as_it_was_sent(message: Message) -> None:
    (body,) = FrameBuffer().feed(encode(message))
    arrived = decode(body)
    assert arrived == message
    assert repr(arrived) == repr(message), "enums and tuples are restored, not only what equals them"


def test_frames_are_cut_wherever_the_stream_is() -> None:
    frames = FrameBuffer()
    data = encode(Remove(1, "a")) + encode(Remove(2, "b"))
    bodies = [body for i in range(len(data)) for body in frames.feed(data[i : i + 1])]
    assert [decode(body) for body in bodies] == [Remove(1, "a"), Remove(2, "b")]


def test_a_frame_beyond_all_measure_is_refused() -> None:
    with pytest.raises(ValueError, match="octets"):
        list(FrameBuffer().feed((MAX_FRAME_BYTES + 1).to_bytes(4, "big")))


def test_a_message_of_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="no message is called 'Nonsense'"):
        decode(b'["Nonsense",[]]')
