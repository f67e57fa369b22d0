"""Messages out of streams: cut anywhere, glued together, too long, without length."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.sip.errors import RemoteProtocolError
from control.sip.framing import MAX_HEAD_BYTES, Framer, KeepAlive
from control.sip.message import MAX_MESSAGE_BYTES, parse_message
from tests.harness.messages import request_bytes, sdp

INVITE = request_bytes("INVITE", body=sdp())
BYE = request_bytes("BYE")
PING = b"\r\n\r\n"


def frames(framer: Framer) -> list[bytes | KeepAlive]:
    return list(iter(framer.next, None))


def fed(*chunks: bytes) -> tuple[Framer, list[bytes | KeepAlive]]:
    framer, found = Framer(), []
    for chunk in chunks:
        framer.feed(chunk)
        found += frames(framer)
    return framer, found


def test_a_message_ends_where_its_content_length_says() -> None:
    framer, found = fed(INVITE + BYE + INVITE[:40])
    assert found == [INVITE, BYE]
    assert framer.started


@given(st.lists(st.sampled_from([INVITE, BYE, PING + INVITE]), max_size=4), st.lists(st.integers(0, 3000), max_size=12))
def test_messages_may_be_split_and_glued_at_any_octet(messages: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(messages)
    edges = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    framer, found = fed(*(stream[start:end] for start, end in pairwise(edges)))
    expected: list[bytes | KeepAlive] = []
    for message in messages:
        expected += [KeepAlive.PING, INVITE] if message.startswith(PING) else [message]
    assert found == expected
    assert not framer.started
    assert framer.broken is None


def test_a_message_that_comes_octet_by_octet_is_found() -> None:
    _, found = fed(*(bytes([octet]) for octet in INVITE))
    assert found == [INVITE]


@pytest.mark.parametrize(
    "line",
    ["Content-Length: 4", "l:4", "CONTENT-LENGTH \t:  4  ", "Content-Length:\r\n 4", "Content-Length: 4\r\nl: 4"],
)
def test_content_length_is_found_in_all_its_spellings(line: str) -> None:
    message = f"OPTIONS sip:a SIP/2.0\r\n{line}\r\nX: content-length: 9\r\n\r\nbody".encode()
    assert fed(message + BYE)[1] == [message, BYE]


def test_bare_line_feeds_end_lines_as_they_do_in_datagrams() -> None:
    message = INVITE.replace(b"\r\n", b"\n", INVITE.count(b"\r\n") - sdp().count(b"\r\n"))
    assert fed(message + BYE)[1] == [message, BYE]


@pytest.mark.rfc("3261", "18.3")
@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ("", "without Content-Length"),
        ("Content-Length: four\r\n", "not one number"),
        ("Content-Length: -4\r\n", "not one number"),
        ("Content-Length: 4\r\nl: 5\r\n", "not one number"),
        ("Content-Length: \r\n", "not one number"),
        (f"Content-Length: {MAX_MESSAGE_BYTES}\r\n", "more than 65535"),
        ("Content-Length: 99999999999999999999\r\n", "not one number"),
    ],
)
def test_a_message_whose_end_nobody_knows_is_the_last_thing_that_is_read(lines: str, why: str) -> None:
    head = f"OPTIONS sip:a SIP/2.0\r\n{lines}\r\n".encode()
    framer, found = fed(BYE + head + BYE, BYE)
    assert found == [BYE, head]
    assert framer.broken is not None
    assert why in framer.broken
    assert not framer.started


def test_a_body_that_is_too_long_is_refused_before_any_of_it_is_kept() -> None:
    head = f"OPTIONS sip:a SIP/2.0\r\nl: {MAX_MESSAGE_BYTES}\r\n\r\n".encode()
    framer, found = fed(head)
    assert found == [head]
    framer.feed(bytes(100_000))
    assert frames(framer) == []
    assert not framer._buffer


def test_the_largest_message_is_taken() -> None:
    head = b"OPTIONS sip:a SIP/2.0\r\nl: 65500\r\n\r\n"
    assert len(head) + 65_500 == MAX_MESSAGE_BYTES
    assert fed(head, bytes(65_500), BYE)[1] == [head + bytes(65_500), BYE]


@pytest.mark.parametrize("ended", [b"", b"\r\nl: 0\r\n\r\n"])
def test_a_header_that_is_too_long_is_refused_whether_or_not_its_end_is_there(ended: bytes) -> None:
    framer, found = fed(b"OPTIONS sip:a SIP/2.0\r\nX: " + b"a" * MAX_HEAD_BYTES + ended)
    assert found == []
    assert framer.broken == f"a header of more than {MAX_HEAD_BYTES} octets"


@pytest.mark.parametrize("garbage", [b"\x16\x03\x01\x02\x00", b"\0\0\0\0", b" OPTIONS", b"\xff", b"\n\n\n"])
def test_what_cannot_begin_a_message_breaks_the_stream_at_once(garbage: bytes) -> None:
    framer, found = fed(garbage + BYE)
    assert found == []
    assert framer.broken == "it is not SIP"


@pytest.mark.rfc("5626", "4.4.1")
@pytest.mark.parametrize(
    ("chunks", "pings"),
    [
        ([PING], 1),
        ([b"\r", b"\n", b"\r", b"\n"], 1),
        ([PING + PING], 2),
        ([PING, BYE], 1),
        ([b"\r\n"], 0),
        ([b"\r\n" + BYE], 0),
        ([b"\r\n", BYE], 0),
        ([PING + b"\r\n" + BYE], 1),
    ],
)
def test_two_line_breaks_between_messages_are_a_ping_and_one_is_nothing(chunks: list[bytes], pings: int) -> None:
    framer, found = fed(BYE, *chunks)
    assert found.count(KeepAlive.PING) == pings
    assert [each for each in found if each != KeepAlive.PING] == [BYE] * b"".join([BYE, *chunks]).count(BYE)
    assert not framer.started


@given(
    st.lists(st.one_of(st.binary(max_size=200), st.sampled_from([INVITE, BYE, b"\r\n", b"l: 5\r\n\r\n"])), max_size=20)
)
def test_arbitrary_octets_raise_nothing_and_what_comes_out_has_the_length_that_the_parser_finds(
    chunks: list[bytes],
) -> None:
    framer, found = fed(*chunks)
    messages = [frame for frame in found if isinstance(frame, bytes)]
    assert sum(map(len, messages)) + len(framer._buffer) <= sum(map(len, chunks))
    for data in messages[:-1] if framer.broken else messages:
        try:
            message = parse_message(data)
        except RemoteProtocolError:
            continue
        assert data.endswith(message.body)
        assert len(message.body) == int(message.headers.get("Content-Length") or -1)
