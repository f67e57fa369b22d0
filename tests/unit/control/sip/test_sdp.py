"""Session descriptions: what is read, what is refused, and what is left of a far end after anchoring."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control.sip.address import Address
from control.sip.errors import RemoteProtocolError
from control.sip.sdp import (
    MAX_MEDIA_LINES,
    Direction,
    MediaDescription,
    Origin,
    PayloadType,
    SessionDescription,
    anchor,
)
from tests.unit.control.sip.test_message import mutated

OURS = Origin("-", "77", 3, "198.51.100.1")

OFFER = """v=0
o=alice 2890844526 2890844527 IN IP4 192.0.2.10
s=Call
i=About us
u=http://192.0.2.10/
e=alice@192.0.2.10
p=+1 617 555-6011
c=IN IP4 192.0.2.10
b=AS:384
t=0 0
k=prompt
a=tool:phone on 192.0.2.10
a=ice-lite
a=group:BUNDLE audio
a=X-unknown:kept
m=audio 49170 RTP/AVP 0 96 101
i=speech
c=IN IP4 192.0.2.11
b=AS:64
a=rtpmap:96 opus/48000/2
a=rtpmap:101 telephone-event/8000
a=fmtp:101 0-15
a=rtcp:53020 IN IP4 192.0.2.12
a=ice-ufrag:F7gI
a=ice-pwd:x9cml
a=ice-options:trickle
a=candidate:1 1 UDP 2130706431 192.0.2.13 8998 typ host
a=remote-candidates:1 192.0.2.14 5000
a=end-of-candidates
a=source-filter: incl IN IP4 * 192.0.2.15
a=crypto:1 AES_CM_128_HMAC_SHA1_80 inline:WVNfX19zZW1jdGwgKCkgewkyMjA7fQp9CnVubGVz
a=mid:audio
a=sendonly
m=video 51372 RTP/AVP 31 97
a=rtpmap:97 H264/90000
a=rtcp-mux
"""


def text_of(*media: str, session: tuple[str, ...] = ("c=IN IP4 192.0.2.10", "t=0 0")) -> bytes:
    """A small description."""
    lines = ("v=0", "o=- 1 2 IN IP4 192.0.2.10", "s=-", *session, *media)
    return "".join(f"{line}\r\n" for line in lines).encode()


def parse(*media: str, session: tuple[str, ...] = ("c=IN IP4 192.0.2.10", "t=0 0")) -> SessionDescription:
    return SessionDescription.parse(text_of(*media, session=session))


def anchored(sdp: SessionDescription, *ports: tuple[int, int] | None) -> list[str]:
    """The lines of the anchored description."""
    text = anchor(sdp, origin=OURS, address="198.51.100.1", ports=ports).encode().decode()
    return text.removesuffix("\r\n").split("\r\n")


# ----------------------------------------------------------------------------------------------------------- reading


@pytest.mark.rfc("8866", "5")
def test_description_is_taken_apart() -> None:
    sdp = SessionDescription.parse(OFFER.encode())
    assert sdp.origin == Origin("alice", "2890844526", 2890844527, "192.0.2.10")
    assert (sdp.session_name, sdp.address) == ("Call", "192.0.2.10")
    audio, video = sdp.media
    assert (audio.kind, audio.port, audio.protocol, audio.formats) == ("audio", 49170, "RTP/AVP", ("0", "96", "101"))
    assert (audio.address, audio.port_count) == ("192.0.2.11", 1)
    assert audio.lines[0] == "i=speech"
    assert audio.attribute("mid") == "audio"
    assert audio.attribute("rtcp-mux") is None
    assert video.attribute("rtcp-mux") == ""
    assert (video.address, video.rtcp_mux, audio.rtcp_mux) == (None, True, False)
    assert sdp.address_of(0) == "192.0.2.11"
    assert sdp.address_of(1) == "192.0.2.10"


@pytest.mark.rfc("8866", "5")
def test_description_is_written_in_the_order_of_the_grammar_with_nothing_lost() -> None:
    encoded = SessionDescription.parse(OFFER.encode()).encode()
    assert encoded == OFFER.replace("\n", "\r\n").encode()


@pytest.mark.parametrize(
    "body",
    [
        text_of("m=audio 4000 RTP/AVP 0"),
        text_of("m=audio 4000 RTP/AVP 0").replace(b"\r\n", b"\n"),
        text_of("m=audio 4000 RTP/AVP 0").removesuffix(b"\r\n"),
        text_of("m=audio 4000 RTP/AVP 0") + b"\r\n\r\n",
        text_of("m=audio 4000 RTP/AVP 0").replace(b"t=0 0\r\n", b""),
        text_of("m=audio 4000 RTP/AVP 0").replace(b"s=-\r\n", b""),
        text_of("m=audio 4000 RTP/AVP 0").replace(b"s=-\r\n", b"s=\r\n"),
    ],
)
def test_sloppy_line_ends_and_missing_formalities_are_mended(body: bytes) -> None:
    assert SessionDescription.parse(body).encode() == text_of("m=audio 4000 RTP/AVP 0")


def test_missing_time_is_written_at_its_place() -> None:
    sdp = parse(session=("i=x", "c=IN IP4 192.0.2.10", "b=AS:1", "a=x"))
    assert sdp.lines == ("i=x", "b=AS:1", "t=0 0", "a=x")
    assert parse(session=()).lines == ("t=0 0",)


def test_octets_that_are_no_utf8_are_kept() -> None:
    body = text_of("m=audio 4000 RTP/AVP 0", "a=x:\xff").replace("\xff".encode(), b"\xff")
    assert SessionDescription.parse(body).encode() == body


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\r\n",
        b"v=1\r\n",
        b"hello",
        b"v=0\r\n",
        text_of().replace(b"o=- 1 2 IN IP4 192.0.2.10", b"o=- 1 2 IN IP4"),
        text_of().replace(b"o=- 1 2 IN", b"o=- 1 2 XX"),
        text_of().replace(b"o=", b"x="),
        text_of().replace(b"c=IN IP4 192.0.2.10", b"c=IN IP4"),
        text_of().replace(b"c=IN IP4 192.0.2.10", b"c=ATM IP4 192.0.2.10"),
        text_of().replace(b"c=IN IP4 192.0.2.10", b"c=IN IP4 /127"),
        text_of("m="),
        text_of("m= "),
        text_of("m=audio"),
        text_of("m=audio 4000"),
        text_of("m=audio 4000 RTP/AVP"),
        text_of("m=audio 65536 RTP/AVP 0"),
        text_of("m=audio -1 RTP/AVP 0"),
        text_of("m=audio 4000/0 RTP/AVP 0"),
        text_of("m=audio 4000/x RTP/AVP 0"),
        text_of("m=audio 4000 RTP/AVP 0", session=("t=0 0",)),
        text_of("m=audio 4000 RTP/AVP 0", "nonsense"),
        text_of("m=audio 4000 RTP/AVP 0", "a=x\ry"),
        text_of("m=audio 4000 RTP/AVP 0", "a=x\0"),
        text_of(*["m=audio 4000 RTP/AVP 0"] * (MAX_MEDIA_LINES + 1)),
    ],
)
def test_what_is_no_description_is_refused_with_400(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as refusal:
        SessionDescription.parse(body)
    assert refusal.value.status == 400
    assert "SDP" in refusal.value.message


def test_line_that_is_not_in_use_needs_neither_address_nor_formats() -> None:
    sdp = parse("m=video 0 RTP/AVP", session=("t=0 0",))
    assert sdp.address_of(0) is None
    assert sdp.rtp_address_of(0) is None
    assert sdp.encode() == text_of("m=video 0 RTP/AVP", session=("t=0 0",))


def test_as_many_lines_as_the_limit_are_read() -> None:
    assert len(parse(*["m=audio 4000 RTP/AVP 0"] * MAX_MEDIA_LINES).media) == MAX_MEDIA_LINES


def test_multicast_scope_and_port_count_are_read() -> None:
    sdp = parse("m=audio 4000/2 RTP/AVP 0", session=("c=IN IP4 233.252.0.1/127", "t=0 0"))
    assert (sdp.address, sdp.media[0].port_count) == ("233.252.0.1", 2)
    assert b"m=audio 4000/2 RTP/AVP 0\r\n" in sdp.encode()


def test_version_that_is_no_number_is_kept() -> None:
    origin = Origin.parse("- x 1.5 IN IP6 2001:db8::1")
    assert origin == Origin("-", "x", "1.5", "2001:db8::1")
    assert str(origin) == "- x 1.5 IN IP6 2001:db8::1"


# --------------------------------------------------------------------------------------------------------- direction


@pytest.mark.rfc("3264", "6.1")
@pytest.mark.parametrize(
    ("direction", "sends", "receives", "reverse"),
    [
        ("sendrecv", True, True, "sendrecv"),
        ("sendonly", True, False, "recvonly"),
        ("recvonly", False, True, "sendonly"),
        ("inactive", False, False, "inactive"),
    ],
)
def test_directions_are_seen_from_both_ends(direction: str, sends: bool, receives: bool, reverse: str) -> None:
    value = Direction(direction)
    assert (value.sends, value.receives, value.reversed) == (sends, receives, Direction(reverse))


@pytest.mark.rfc("8866", "6.7")
@pytest.mark.parametrize(
    ("session", "line", "direction"),
    [
        (None, None, "sendrecv"),
        ("sendonly", None, "sendonly"),
        ("sendonly", "recvonly", "recvonly"),
        (None, "inactive", "inactive"),
    ],
)
def test_direction_of_a_line_goes_before_that_of_the_session(
    session: str | None, line: str | None, direction: str
) -> None:
    sdp = parse(
        "m=audio 4000 RTP/AVP 0",
        *([f"a={line}"] if line else []),
        session=("c=IN IP4 192.0.2.10", "t=0 0", *([f"a={session}"] if session else [])),
    )
    assert sdp.direction_of(0) is Direction(direction)
    assert sdp.media[0].direction == (Direction(line) if line else None)


@pytest.mark.rfc("3264", "8.4")
@pytest.mark.parametrize(
    ("attribute", "direction"),
    [
        (None, "sendonly"),
        ("sendrecv", "sendonly"),
        ("sendonly", "sendonly"),
        ("recvonly", "inactive"),
        ("inactive", "inactive"),
    ],
)
@pytest.mark.parametrize("null", ["IP4 0.0.0.0", "IP6 ::"])
def test_null_address_is_a_hold_and_is_spelt_out_when_anchored(
    attribute: str | None, direction: str, null: str
) -> None:
    sdp = parse("m=audio 4000 RTP/AVP 0", f"c=IN {null}", *([f"a={attribute}"] if attribute else []), "a=x")
    assert sdp.direction_of(0) is Direction(direction)
    assert sdp.rtp_address_of(0) is None
    assert sdp.rtcp_address_of(0) is None
    assert anchored(sdp, (10000, 10001))[-2:] == ["a=x", f"a={direction}"]


# ------------------------------------------------------------------------------------------------- addresses, formats


@pytest.mark.rfc("3605", "2.1")
@pytest.mark.parametrize(
    ("lines", "rtcp"),
    [
        ((), Address("192.0.2.10", 4001)),
        (("a=rtcp:5000",), Address("192.0.2.10", 5000)),
        (("a=rtcp:5000 IN IP4 192.0.2.12",), Address("192.0.2.12", 5000)),
        (("a=rtcp-mux",), Address("192.0.2.10", 4000)),
        (("a=rtcp:x",), Address("192.0.2.10", 4001)),
        (("a=rtcp:0",), Address("192.0.2.10", 4001)),
        (("a=rtcp",), Address("192.0.2.10", 4001)),
        (("a=rtcp:5000 IN IP4",), Address("192.0.2.10", 4001)),
    ],
)
def test_rtcp_goes_where_the_line_says(lines: tuple[str, ...], rtcp: Address) -> None:
    sdp = parse("m=audio 4000 RTP/AVP 0", *lines)
    assert sdp.rtp_address_of(0) == Address("192.0.2.10", 4000)
    assert sdp.rtcp_address_of(0) == rtcp


@pytest.mark.rfc("5761", "5.1.1")
def test_agreement_on_mux_decides_where_it_is_known() -> None:
    sdp = parse("m=audio 4000 RTP/AVP 0", "a=rtcp:5000", "a=rtcp-mux")
    assert sdp.rtcp_address_of(0, mux=False) == Address("192.0.2.10", 5000)
    assert sdp.rtcp_address_of(0, mux=True) == Address("192.0.2.10", 4000)


def test_there_is_no_port_above_the_last_one() -> None:
    assert parse("m=audio 65535 RTP/AVP 0").rtcp_address_of(0) is None


@pytest.mark.parametrize("host", ["phone.example.com", "192.0.2.300", "fe80::1%eth0"])
def test_host_that_is_no_plain_address_is_not_sent_to(host: str) -> None:
    sdp = parse("m=audio 4000 RTP/AVP 0", session=(f"c=IN IP4 {host}",))
    assert sdp.address_of(0) == host
    assert sdp.rtp_address_of(0) is None


def test_ipv6_addresses_are_read_and_written() -> None:
    sdp = parse("m=audio 4000 RTP/AVP 0", session=("c=IN IP6 2001:db8::1", "t=0 0"))
    assert sdp.rtp_address_of(0) == Address("2001:db8::1", 4000)
    ours = anchor(sdp, origin=OURS, address="2001:db8::99", ports=[(10000, 10001)])
    assert b"\r\nc=IN IP6 2001:db8::99\r\n" in ours.encode()


@pytest.mark.rfc("3551", "6")
def test_payload_types_come_from_the_map_and_else_from_the_static_table() -> None:
    audio, video = SessionDescription.parse(OFFER.encode()).media
    assert audio.payload_types == (
        PayloadType(0, "PCMU", 8000),
        PayloadType(96, "opus", 48000),
        PayloadType(101, "telephone-event", 8000),
    )
    assert video.payload_types == (PayloadType(31, "H261", 90000), PayloadType(97, "H264", 90000))


def test_payload_type_that_nothing_explains_is_still_one() -> None:
    line = MediaDescription(
        "audio",
        4000,
        "RTP/SAVPF",
        ("96", "128", "x", "97", "97", "0"),
        lines=("a=rtpmap:97 opus", "a=rtpmap:0 L8/11025"),
    )
    assert line.payload_types == (PayloadType(96, "", 8000), PayloadType(97, "", 8000), PayloadType(0, "L8", 11025))
    assert MediaDescription("video", 4000, "RTP/AVP", ("99",)).payload_types == (PayloadType(99, "", 90000),)


def test_line_that_is_not_rtp_has_no_payload_types() -> None:
    assert MediaDescription("application", 9, "TCP/BFCP", ("0",)).payload_types == ()


# --------------------------------------------------------------------------------------------------------- anchoring


def test_anchored_description_is_ours_and_tells_nothing_of_the_far_end() -> None:
    lines = anchored(SessionDescription.parse(OFFER.encode()), (10000, 10001), (10002, 10003))
    assert lines == [
        "v=0",
        "o=- 77 3 IN IP4 198.51.100.1",
        "s=Call",
        "i=About us",
        "c=IN IP4 198.51.100.1",
        "b=AS:384",
        "t=0 0",
        "a=group:BUNDLE audio",
        "a=X-unknown:kept",
        "m=audio 10000 RTP/AVP 0 96 101",
        "i=speech",
        "b=AS:64",
        "a=rtpmap:96 opus/48000/2",
        "a=rtpmap:101 telephone-event/8000",
        "a=fmtp:101 0-15",
        "a=rtcp:10001",
        "a=crypto:1 AES_CM_128_HMAC_SHA1_80 inline:WVNfX19zZW1jdGwgKCkgewkyMjA7fQp9CnVubGVz",
        "a=mid:audio",
        "a=sendonly",
        "m=video 10002 RTP/AVP 31 97",
        "a=rtpmap:97 H264/90000",
        "a=rtcp-mux",
    ]
    assert not re.search(r"192\.0\.2\.|alice", "\n".join(lines))


@pytest.mark.rfc("3264", "6")
def test_rejected_line_keeps_its_place_on_port_0() -> None:
    sdp = parse(
        "m=audio 4000 RTP/AVP 0", "m=video 4002/2 RTP/AVP 31", "c=IN IP4 192.0.2.99", "a=rtcp:4009 IN IP4 192.0.2.99"
    )
    assert anchored(sdp, (10000, 10001), None)[5:] == ["m=audio 10000 RTP/AVP 0", "m=video 0 RTP/AVP 31"]


def test_line_that_the_far_end_rejected_stays_rejected() -> None:
    assert anchored(parse("m=audio 0 RTP/AVP 0"), (10000, 10001))[-1] == "m=audio 0 RTP/AVP 0"


@pytest.mark.rfc("3605", "2")
@pytest.mark.parametrize(
    ("lines", "ports", "written"),
    [
        ((), (10000, 10001), []),
        ((), (10000, 10005), ["a=rtcp:10005"]),
        (("a=rtcp-mux",), (10000, 10000), ["a=rtcp-mux"]),
        (("a=rtcp:1 IN IP4 192.0.2.9", "a=x"), (10000, 10001), ["a=rtcp:10001", "a=x"]),
        (("a=rtcp:broken 192.0.2.9", "a=x", "a=rtcp:2"), (10000, 10001), ["a=rtcp:10001", "a=x"]),
    ],
)
def test_rtcp_port_is_stated_where_it_has_to_be(
    lines: tuple[str, ...], ports: tuple[int, int], written: list[str]
) -> None:
    assert anchored(parse("m=audio 4000 RTP/AVP 0", *lines), ports)[6:] == written


def test_ports_must_be_given_for_each_line() -> None:
    with pytest.raises(ValueError, match="zip"):
        anchor(parse("m=audio 4000 RTP/AVP 0"), origin=OURS, address="198.51.100.1", ports=[])


# -------------------------------------------------------------------------------------------------------- properties

SEEDS = [OFFER.encode(), OFFER.replace("\n", "\r\n").encode(), text_of("m=audio 4000 RTP/AVP 0", "a=sendonly")]


@settings(max_examples=300)
@given(mutated(SEEDS) | st.binary(max_size=100))
def test_no_body_makes_the_reader_raise_anything_but_a_protocol_error(body: bytes) -> None:
    try:
        sdp = SessionDescription.parse(body)
    except RemoteProtocolError:
        return
    assert SessionDescription.parse(sdp.encode()) == sdp
    for i, line in enumerate(sdp.media):
        assert isinstance(sdp.direction_of(i), Direction)
        assert all(payload_type.clock_rate > 0 for payload_type in line.payload_types)
        for address in (sdp.rtp_address_of(i), sdp.rtcp_address_of(i)):
            assert address is None or 0 < address.port <= 65535
    ours = anchor(sdp, origin=OURS, address="198.51.100.1", ports=[(10000, 10001)] * len(sdp.media))
    again = SessionDescription.parse(ours.encode())
    assert again == ours
    for i, line in enumerate(sdp.media):
        assert again.rtp_address_of(i) == (Address("198.51.100.1", 10000) if line.port else None)
        assert again.direction_of(i) is sdp.direction_of(i)
