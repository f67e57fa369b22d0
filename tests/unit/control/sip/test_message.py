"""Messages: framing, the header index, typed values, and what is refused with which status."""

import contextlib
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control.sip.errors import LocalProtocolError, RemoteProtocolError
from control.sip.headers import CSeq, NameAddr
from control.sip.message import (
    MAX_HEADERS,
    MAX_MESSAGE_BYTES,
    REASON_PHRASES,
    Headers,
    Request,
    Response,
    build_request,
    build_response,
    parse_message,
)
from tests.harness.messages import request_bytes, sdp


def parse_request(data: bytes) -> Request:
    message = parse_message(data)
    assert isinstance(message, Request)
    return message


def refusal_of(data: bytes) -> RemoteProtocolError:
    with pytest.raises(RemoteProtocolError) as refusal:
        parse_message(data)
    return refusal.value


def replace_line(data: bytes, name: bytes, *lines: bytes) -> bytes:
    """`data` with the line of a header replaced by others."""
    changed, count = re.subn(
        rb"\r\n" + name + rb": [^\r]*", lambda _: b"".join(b"\r\n" + line for line in lines), data, count=1
    )
    assert count == 1
    return changed


# ----------------------------------------------------------------------------------------------------------- framing


def test_request_is_taken_apart() -> None:
    body = sdp()
    request = parse_request(request_bytes(body=body))
    assert (request.method, request.uri, request.body) == ("INVITE", "sip:1002@example.test", body)
    assert request.via.branch == "z9hG4bK-1"
    assert request.from_.tag == "from-1"
    assert request.to.tag is None
    assert request.call_id == "call-1@192.0.2.10"
    assert request.cseq == CSeq(1, "INVITE")
    assert request.max_forwards == 70
    assert request.content_type == "application/sdp"
    assert str(request.contact) == "<sip:1001@192.0.2.10:5060>"


@pytest.mark.rfc("3261", "7.2")
def test_response_is_taken_apart() -> None:
    data = build_response(parse_request(request_bytes()), 200, to_tag="t").encode()
    response = parse_message(data)
    assert isinstance(response, Response)
    assert (response.status, response.reason, response.to.tag) == (200, "OK", "t")
    bare = parse_message(data.replace(b"SIP/2.0 200 OK", b"SIP/2.0 200"))
    assert isinstance(bare, Response)
    assert bare.reason == ""


@pytest.mark.rfc("3261", "18.3")
def test_octets_after_the_content_length_are_cut_off() -> None:
    assert parse_message(request_bytes(body=b"v=0\r\n") + b"garbage").body == b"v=0\r\n"


@pytest.mark.rfc("3261", "18.3")
def test_body_without_content_length_reaches_to_the_end_of_the_datagram() -> None:
    data = replace_line(request_bytes(), b"Content-Length")
    assert parse_message(data + b"rest").body == b"rest"


@pytest.mark.rfc("3261", "18.3")
@pytest.mark.parametrize("value", [b"1", b"-1", b"x", b"", b"1e3", b"65536", b"9" * 5000, b"0, 0"])
def test_content_length_that_cannot_be_is_answered_with_400(value: bytes) -> None:
    refusal = refusal_of(replace_line(request_bytes(), b"Content-Length", b"Content-Length: " + value))
    assert (refusal.status, refusal.header) == (400, "Content-Length")
    assert refusal.request is not None


def test_content_lengths_that_contradict_each_other_are_refused() -> None:
    data = request_bytes(body=b"12345")
    assert parse_message(replace_line(data, b"Content-Length", b"l: 5", b"Content-Length: 5")).body == b"12345"
    assert refusal_of(replace_line(data, b"Content-Length", b"l: 5", b"Content-Length: 4")).header == "Content-Length"


def test_bare_line_feeds_frame_as_well() -> None:
    data = request_bytes(body=b"v=0\r\n\r\nx")
    head, _, body = data.partition(b"\r\n\r\n")
    bare = head.replace(b"\r\n", b"\n")
    for end in (b"\n\n", b"\n\r\n", b"\r\n\n"):
        assert parse_message(bare + end + body).encode() == parse_message(data).encode()


@pytest.mark.rfc("3261", "7.5")
def test_empty_lines_before_the_start_line_are_skipped() -> None:
    assert parse_request(b"\r\n\r\n" + request_bytes()).method == "INVITE"


@pytest.mark.parametrize(
    "data", [b"", b"\r\n\r\n", b"\0", b"hello", b"\xff" * 100, b"INVITE sip:a@h SIP/2.0\r\n", b"\r\n\r\n\r\n\r\n"]
)
def test_what_is_no_message_at_all_cannot_be_answered(data: bytes) -> None:
    refusal = refusal_of(data)
    assert (refusal.status, refusal.request) == (400, None)


def test_message_without_its_empty_line_is_refused() -> None:
    assert refusal_of(request_bytes().removesuffix(b"\r\n")).status == 400


def test_lone_carriage_return_is_refused_because_others_may_see_a_line_end_in_it() -> None:
    assert (
        refusal_of(replace_line(request_bytes(), b"Max-Forwards", b"Max-Forwards: 7", b"Subject: a\rVia: b")).status
        == 400
    )


def test_limits_are_refused_when_they_are_passed_and_not_before() -> None:
    padding = MAX_MESSAGE_BYTES - len(request_bytes(headers=[("X", "")]))
    assert parse_message(request_bytes(headers=[("X", "y" * padding)])).headers.get("X") == "y" * padding
    assert refusal_of(request_bytes(headers=[("X", "y" * (padding + 1))])).status == 513
    fields = len(parse_message(request_bytes()).headers)
    assert len(parse_message(request_bytes(headers=[("X", "y")] * (MAX_HEADERS - fields))).headers) == MAX_HEADERS
    refusal = refusal_of(request_bytes(headers=[("X", "y")] * (MAX_HEADERS + 1 - fields)))
    assert refusal.status == 400
    assert refusal.request is not None
    response = build_response(parse_request(request_bytes()), 200)
    for _ in range(MAX_HEADERS):
        response.headers.add("X", "y")
    assert refusal_of(response.encode()).status == 400


# -------------------------------------------------------------------------------------------------------- start lines


@pytest.mark.rfc("3261", "7.1")
@pytest.mark.parametrize(
    "line",
    [
        b"INVITE sip:a@h",
        b"INVITE  sip:a@h SIP/2.0",
        b"INVITE sip:a@h  SIP/2.0",
        b"INVITE sip:a@h SIP/2.0 ",
        b"INVITE <sip:a@h> SIP/2.0",
        b"INVITE sip:a@h; lr SIP/2.0",
        b"INVITE sip:a@h HTTP/1.1",
        b"INVITE SIP/2.0",
        b"IN(VITE sip:a@h SIP/2.0",
        b"INVITE\tsip:a@h SIP/2.0",
    ],
)
def test_malformed_request_line_is_answered_with_400(line: bytes) -> None:
    assert refusal_of(request_bytes().replace(b"INVITE sip:1002@example.test SIP/2.0", line, 1)).status == 400


@pytest.mark.rfc("3261", "21.5.6")
def test_request_of_another_version_is_answered_with_505() -> None:
    refusal = refusal_of(request_bytes().replace(b" SIP/2.0\r\n", b" SIP/3.0\r\n", 1))
    assert refusal.status == 505
    assert refusal.request is not None
    assert build_response(refusal.request, refusal.status).encode().startswith(b"SIP/2.0 505 Version Not Supported\r\n")


@pytest.mark.rfc("3261", "7.1")
def test_version_is_case_insensitive() -> None:
    assert parse_request(request_bytes().replace(b" SIP/2.0\r\n", b" sip/2.0\r\n", 1)).uri == "sip:1002@example.test"
    response = parse_message(build_response(parse_request(request_bytes()), 200).encode().replace(b"SIP/", b"Sip/", 1))
    assert isinstance(response, Response)


@pytest.mark.parametrize(
    "line",
    [
        b"SIP/2.0",
        b"SIP/2.0 ",
        b"SIP/2.0 20 OK",
        b"SIP/2.0 099 x",
        b"SIP/2.0 700 x",
        b"SIP/2.0 4294967301 x",
        b"SIP/1.0 200 OK",
    ],
)
def test_malformed_status_line_is_refused(line: bytes) -> None:
    data = build_response(parse_request(request_bytes()), 200).encode()
    assert refusal_of(data.replace(b"SIP/2.0 200 OK", line)).request is None


@pytest.mark.rfc("3261", "7.1")
def test_methods_are_case_sensitive() -> None:
    assert parse_request(request_bytes("invite")).method == "invite"
    assert refusal_of(request_bytes().replace(b"1 INVITE", b"1 invite")).header == "CSeq"


# ------------------------------------------------------------------------------------------------------ header fields


@pytest.mark.rfc("3261", "8.2.2.1")
@pytest.mark.parametrize("name", [b"Via", b"From", b"To", b"Call-ID", b"CSeq"])
def test_request_that_lacks_a_field_needed_for_its_response_cannot_be_answered(name: bytes) -> None:
    refusal = refusal_of(replace_line(request_bytes(), name))
    assert (refusal.status, refusal.header, refusal.request) == (400, name.decode(), None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("From", b'"open <sip:a@h>'),
        ("To", b"nobody"),
        ("CSeq", b"x INVITE"),
        ("Max-Forwards", b"300"),
        ("Max-Forwards", b""),
    ],
)
def test_request_with_an_unreadable_field_is_answered_with_400(name: str, value: bytes) -> None:
    refusal = refusal_of(replace_line(request_bytes(), name.encode(), name.encode() + b": " + value))
    assert (refusal.status, refusal.header) == (400, name)
    assert refusal.request is not None
    response = build_response(refusal.request, refusal.status, to_tag="t")
    assert response.headers.get(name) == (None if name == "Max-Forwards" else value.decode())


def test_request_with_an_empty_call_id_is_refused() -> None:
    assert refusal_of(replace_line(request_bytes(), b"Call-ID", b"Call-ID:")).header == "Call-ID"


def test_request_with_an_unreadable_via_cannot_be_answered() -> None:
    refusal = refusal_of(request_bytes(via="nowhere"))
    assert (refusal.header, refusal.request) == ("Via", None)
    assert refusal_of(request_bytes(via=",")).header == "Via"


@pytest.mark.rfc("3261", "17.1.1.3")
def test_malformed_ack_is_never_answered() -> None:
    refusal = refusal_of(request_bytes("ACK").replace(b"1 ACK", b"x ACK"))
    assert refusal.request is None


@pytest.mark.parametrize("name", ["From", "To", "Call-ID", "CSeq"])
def test_field_that_must_be_single_is_refused_when_repeated(name: str) -> None:
    assert refusal_of(request_bytes(headers=[(name, "x")])).header == name


@pytest.mark.parametrize(
    "line",
    [
        "Date: yesterday",
        "Contact: <",
        "Route: ,;<",
        "no colon at all",
        ": no name",
        "X-Y",
        "Expires: soon",
        "Require",
        "Retry-After: \x00",
    ],
)
def test_unknown_or_malformed_field_that_routing_does_not_need_fails_nobody(line: str) -> None:
    data = request_bytes(contact=None).replace(b"\r\nFrom:", b"\r\n" + line.encode() + b"\r\nFrom:")
    assert parse_request(data).method == "INVITE"


@pytest.mark.rfc("3261", "7.3.1")
def test_folded_lines_are_joined_by_one_space() -> None:
    data = replace_line(
        request_bytes(), b"To", b"To:", b"\t<sip:a@h>  ", b"   ;tag=x", b"Subject: a", b"  b\t c ", b" ", b" d"
    )
    request = parse_request(data)
    assert request.to.tag == "x"
    assert request.headers.get("Subject") == "a b\t c d"


def test_continuation_of_nothing_is_dropped() -> None:
    head = b"INVITE sip:1002@example.test SIP/2.0\r\n"
    assert parse_request(request_bytes().replace(head, head + b" x: y\r\n")).headers.get("x") is None
    assert (
        parse_request(request_bytes().replace(b"\r\nFrom", b"\r\nbroken\r\n Via: x\r\nFrom")).via.branch == "z9hG4bK-1"
    )


@pytest.mark.rfc("3261", "7.3.3")
@pytest.mark.parametrize("spelling", [b"t", b"T", b"TO", b"to", b"To  ", b"t\t"])
def test_names_are_read_in_any_spelling(spelling: bytes) -> None:
    data = replace_line(request_bytes(), b"To", spelling + b": <sip:a@h>")
    assert parse_request(data).headers.get("To") == "<sip:a@h>"


def test_headers_are_an_ordered_multimap_without_case() -> None:
    headers = Headers([("Via", "1"), ("x-Own", "a"), ("v", "2, 3"), ("X-OWN", "b")])
    assert list(headers.items()) == [("Via", "1"), ("Via", "2, 3"), ("x-Own", "a"), ("x-Own", "b")]
    assert headers.get("VIA") == "1"
    assert headers.get_all("via") == ["1", "2, 3"]
    assert headers.get_list("via") == ["1", "2", "3"]
    assert "v" in headers
    assert "Route" not in headers
    assert 1 not in headers
    assert (headers.get("Route"), headers.get_all("Route"), headers.get_list("Route")) == (None, [], [])
    assert len(headers) == 4
    assert repr(Headers([("v", "1")])) == "Headers([('Via', '1')])"
    assert headers != {"via": ["1"]}


def test_headers_are_changed_in_place() -> None:
    headers = Headers([("From", "f"), ("Via", "1")])
    headers.insert("Via", "0")
    headers.insert("Route", "r")
    headers.set("From", "g")
    headers.remove("Subject")
    assert list(headers.items()) == [("Route", "r"), ("From", "g"), ("Via", "0"), ("Via", "1")]
    headers.set_all("Via", ["2", "3"])
    headers.set_all("Route", [])
    assert list(headers.items()) == [("From", "g"), ("Via", "2"), ("Via", "3")]


def test_copy_of_headers_is_independent() -> None:
    headers = Headers([("Via", "1")])
    copy = headers.copy()
    copy.add("Via", "2")
    copy.add("Own", "y")
    assert headers == Headers([("Via", "1")])
    assert list(copy.items()) == [("Via", "1"), ("Via", "2"), ("Own", "y")]


def test_values_handed_out_do_not_change_the_headers() -> None:
    request = parse_request(request_bytes())
    request.headers.get_all("Via").clear()
    request.contacts.clear()
    assert request.contact is not None
    assert request.headers.get("Via") is not None


def test_typed_value_follows_a_change_of_its_field() -> None:
    request = parse_request(request_bytes())
    assert request.from_.tag == "from-1"
    via = request.via
    request.headers.set("f", "<sip:a@h>;tag=new")
    assert request.from_.tag == "new"
    assert request.via is via
    request.headers.insert("v", "SIP/2.0/UDP other")
    assert request.via.host == "other"
    assert [via.host for via in request.vias] == ["other", "192.0.2.10"]
    copy = request.headers.copy()
    copy.set("From", "<sip:b@h>;tag=copy")
    assert request.from_.tag == "new"
    assert request.contact is not None
    request.headers.remove("Contact")
    assert request.contact is None


def test_topmost_via_is_the_first_element_of_the_first_line() -> None:
    request = parse_request(request_bytes(via="SIP/2.0/UDP a;branch=1, SIP/2.0/UDP b;branch=2"))
    assert request.via.host == "a"
    assert [via.host for via in request.vias] == ["a", "b"]


@pytest.mark.rfc("3261", "20")
def test_lists_and_numbers_are_read_from_their_fields() -> None:
    request = parse_request(
        request_bytes(
            headers=[
                ("Supported", "100rel,timer"),
                ("k", "replaces"),
                ("Require", "100rel"),
                ("Allow", "INVITE, ACK"),
                ("Expires", "60"),
                ("Route", "<sip:p1;lr>, <sip:p2;lr>"),
                ("Record-Route", "<sip:p3;lr>"),
                ("User-Agent", "phone"),
                ("Content-Type", "Application/SDP ; charset=utf-8"),
            ]
        )
    )
    assert request.supported == {"100rel", "timer", "replaces"}
    assert request.require == {"100rel"}
    assert request.allow == {"INVITE", "ACK"}
    assert request.expires == 60
    assert [route.uri.host for route in request.route] == ["p1", "p2"]
    assert [route.uri.host for route in request.record_route] == ["p3"]
    assert request.user_agent == "phone"
    assert request.content_type == "application/sdp"


def test_fields_that_are_absent_have_neutral_values() -> None:
    request = parse_request(request_bytes(contact=None, max_forwards=None))
    assert (request.max_forwards, request.expires, request.user_agent, request.content_type) == (None, None, None, "")
    assert (request.contact, request.contacts, request.route, request.supported) == (None, [], [], frozenset())


@pytest.mark.rfc("3261", "20.19")
@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("-1", None), ("", None), ("x", None), ("4294967296", 2**32 - 1), ("9" * 5000, 2**32 - 1)],
)
def test_expires_is_clamped_and_ignored_when_malformed(text: str, seconds: int | None) -> None:
    assert parse_message(request_bytes(headers=[("Expires", text)])).expires == seconds


@pytest.mark.rfc("3261", "10.2.2")
def test_wildcard_contact_is_no_address() -> None:
    request = parse_request(request_bytes("REGISTER", contact="*"))
    assert request.is_wildcard_contact
    assert request.contacts == []


def test_contacts_are_read_when_asked_for_and_only_then_refused() -> None:
    request = parse_request(request_bytes(contact='"a, b" <sip:a@h>, sip:b@h;q=0.5'))
    assert request.contacts == [NameAddr.parse('"a, b" <sip:a@h>'), NameAddr.parse("sip:b@h;q=0.5")]
    broken = parse_request(request_bytes(contact="sip:a@h?Route=x"))
    with pytest.raises(RemoteProtocolError) as refusal:
        broken.contacts  # noqa: B018
    assert (refusal.value.status, refusal.value.header) == (400, "Contact")


# ----------------------------------------------------------------------------------------------------------- building


def test_encoding_sets_the_content_length_and_keeps_every_octet() -> None:
    data = replace_line(
        request_bytes(body=b"\xff\0body"), b"Max-Forwards", b"Max-Forwards: 1", b"Subject: \xfc\xe2\x82\xac\xff"
    )
    request = parse_request(data)
    request.headers.set("Content-Length", "999")
    encoded = request.encode()
    assert b"\r\nSubject: \xfc\xe2\x82\xac\xff\r\n" in encoded
    assert encoded.endswith(b"\r\nContent-Length: 6\r\n\r\n\xff\0body")
    assert encoded.count(b"Content-Length") == 1
    assert parse_request(encoded).encode() == encoded


@pytest.mark.parametrize("value", ["a\r\nVia: b", "a\nVia: b", "a\rVia: b", "\r\n"])
def test_line_break_in_a_field_is_never_written(value: str) -> None:
    request = parse_request(request_bytes(headers=[("Subject", "x")]))
    request.headers.set("Subject", value)
    with pytest.raises(LocalProtocolError):
        request.encode()
    with pytest.raises(LocalProtocolError):
        Response(200, value, Headers()).encode()


@pytest.mark.rfc("3261", "8.2.6.2")
def test_response_copies_what_it_must_and_nothing_else() -> None:
    request = parse_request(
        request_bytes(headers=[("Via", "SIP/2.0/UDP b"), ("Record-Route", "<sip:p>"), ("Timestamp", "54")])
    )
    response = build_response(request, 180, to_tag="t")
    assert list(response.headers.items()) == [
        ("Via", "SIP/2.0/UDP 192.0.2.10:5060;branch=z9hG4bK-1"),
        ("Via", "SIP/2.0/UDP b"),
        ("From", "<sip:1001@example.test>;tag=from-1"),
        ("To", "<sip:1002@example.test>;tag=t"),
        ("Call-ID", "call-1@192.0.2.10"),
        ("CSeq", "1 INVITE"),
    ]
    assert response.to.tag == "t"
    assert request.to.tag is None


@pytest.mark.rfc("3261", "8.2.6.1")
def test_100_carries_the_timestamp_back() -> None:
    request = parse_request(request_bytes(headers=[("Timestamp", "54")]))
    assert build_response(request, 100).headers.get("Timestamp") == "54"
    assert build_response(request, 200).headers.get("Timestamp") is None


def test_response_keeps_the_tag_of_a_request_inside_a_dialog() -> None:
    request = parse_request(request_bytes(to="<sip:a@h>;tag=theirs"))
    assert build_response(request, 200, to_tag="ours").headers.get("To") == "<sip:a@h>;tag=theirs"
    assert build_response(parse_request(request_bytes()), 200).to.tag is None


def test_reason_phrase_is_the_registered_one_or_that_of_the_class() -> None:
    request = parse_request(request_bytes())
    assert build_response(request, 486).reason == "Busy Here" == REASON_PHRASES[486]
    assert build_response(request, 499).reason == "Client Error"
    assert build_response(request, 486, "Engaged").reason == "Engaged"


@pytest.mark.rfc("3261", "8.1.1")
def test_built_request_has_the_mandatory_fields() -> None:
    request = build_request("BYE", "sip:a@h", from_="<sip:b@h>;tag=1", to="<sip:a@h>;tag=2", call_id="c", cseq=7)
    request.headers.insert("Via", "SIP/2.0/UDP h;branch=z9hG4bKx")
    again = parse_request(request.encode())
    assert (again.method, again.cseq, again.call_id, again.max_forwards) == ("BYE", CSeq(7, "BYE"), "c", 70)
    assert next(again.headers.items())[0] == "Via"


def test_errors_tell_status_field_and_what_is_wrong() -> None:
    assert str(RemoteProtocolError(400, "malformed", "Via")) == "400 Via: malformed"
    assert str(RemoteProtocolError(513, "too long")) == "513 too long"


# ----------------------------------------------------------------------------------------------------------- torture

TORTURE = Path(__file__).parents[3] / "data" / "rfc4475.txt"


def _torture_messages() -> dict[str, tuple[str, str, bytes]]:
    """Section, verdict and octets of each message, by name."""

    def expand(match: re.Match[bytes]) -> bytes:
        return bytes.fromhex(match[1].decode()) if match[1] else match[3] * int(match[2])

    messages = {}
    for part in re.split(rb"^=== ", TORTURE.read_bytes(), flags=re.MULTILINE)[1:]:
        title, _, text = part.partition(b"\n")
        name, section, verdict = title.decode().split()
        octets = re.sub(
            rb"<hex>([0-9A-F]+)</hex>|<repeat count=([0-9]+)>(.*?)</repeat>", expand, text.replace(b"\n", b"\r\n")
        )
        messages[name] = (section, verdict, octets)
    return messages


MESSAGES = _torture_messages()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.rfc("4475", section)) for name, (section, _, _) in MESSAGES.items()]
)
def test_torture_message_gets_its_verdict(name: str) -> None:
    _, verdict, data = MESSAGES[name]
    if verdict == "ok":
        encoded = parse_message(data).encode()
        assert parse_message(encoded).encode() == encoded
        return
    refusal = refusal_of(data)
    assert str(refusal.status) == verdict
    assert (refusal.request is None) == (data.startswith(b"SIP/") or name == "insuf")


def test_torture_file_is_read_whole() -> None:
    assert len(MESSAGES) == 36


@pytest.mark.rfc("4475", "3.1.1.1")
def test_tortuous_invite_is_understood() -> None:
    request = parse_request(MESSAGES["wsinv"][2])
    assert request.from_.display_name == 'J Rosenberg \\"'
    assert (request.from_.tag, request.to.tag) == ("98asjd8", "1918181833n")
    assert (request.max_forwards, request.cseq) == (68, CSeq(9, "INVITE"))
    assert [(via.transport, via.host, via.branch) for via in request.vias] == [
        ("UDP", "192.0.2.2", "390skdjuw"),
        ("TCP", "spindle.example.com", "z9hG4bK9ikj8"),
        ("UDP", "192.168.255.111", "z9hG4bK30239"),
    ]
    assert request.headers.get("Subject") == ""
    assert request.headers.get("NewFangledHeader") == "newfangled value continued newfangled value"
    assert request.headers.get("UnknownHeaderWithUnusualValue") == ";;,,;;,;"
    assert request.contact is not None
    assert (request.contact.display_name, request.contact.param("q")) == ('Quoted string ""', "0.33")
    assert request.contact.param("newparam") == "newvalue"
    assert request.route[0].uri.param("unknown-no-value") == ""
    assert len(request.body) == 150


@pytest.mark.rfc("4475", "3.1.1.2")
def test_unusual_characters_are_kept() -> None:
    request = parse_request(MESSAGES["intmeth"][2])
    assert request.to.display_name == "BEL:\x07 NUL:\x00 DEL:\x7f"
    assert request.from_.tag == "_token~1'+`*%!-."
    assert request.from_.param("fromparam''~+*_!.-%") == "работающий"
    assert request.headers.get("extensionHeader-!.%*+_`'~") == "\ufeff大停電"


@pytest.mark.rfc("4475", "3.1.1.5")
def test_percent_is_no_escape_in_names_and_methods() -> None:
    request = parse_request(MESSAGES["esc02"][2])
    assert request.method == "RE%47IST%45R"
    assert request.from_.display_name == "%Z%45"
    assert len(request.contacts) == 2


@pytest.mark.rfc("4475", "3.1.1.8")
def test_second_message_in_a_datagram_is_cut_off() -> None:
    request = parse_request(MESSAGES["dblreq"][2])
    assert (request.method, request.body) == ("REGISTER", b"")


@pytest.mark.rfc("4475", "3.1.2.13")
def test_contact_with_headers_needs_angle_brackets() -> None:
    with pytest.raises(RemoteProtocolError):
        parse_request(MESSAGES["regbadct"][2]).contacts  # noqa: B018


@pytest.mark.rfc("4475", "3.3.12")
def test_parameter_behind_a_bare_address_belongs_to_the_field() -> None:
    bare, bracketed = (parse_request(MESSAGES[name][2]).contact for name in ("cparam01", "cparam02"))
    assert bare is not None
    assert bracketed is not None
    assert (bare.param("unknownparam"), bare.uri.param("unknownparam")) == ("", None)
    assert (bracketed.param("unknownparam"), bracketed.uri.param("unknownparam")) == (None, "")


# -------------------------------------------------------------------------------------------------------- properties

SEEDS = [data for _, _, data in MESSAGES.values()] + [request_bytes(body=sdp())]


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A seed with some octets replaced, removed, repeated or moved."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 12)))
        junk = draw(
            st.binary(max_size=6)
            | st.sampled_from([b"\r\n", b"\n", b"\r", b" ", b'"', b"<", b">", b",", b";", b":", b"\\", b"\0"])
        )
        data[at:end] = draw(st.sampled_from([junk, b"", bytes(data[at:end]) * 2, junk + bytes(data[at:end])]))
    return bytes(data)


@settings(max_examples=400)
@given(mutated(SEEDS) | st.binary(max_size=200))
def test_no_datagram_makes_the_parser_raise_anything_but_a_protocol_error(data: bytes) -> None:
    try:
        message = parse_message(data)
    except RemoteProtocolError as error:
        if error.request is not None:
            response = build_response(error.request, error.status, to_tag="t")
            assert response.encode().startswith(b"SIP/2.0 ")
        return
    encoded = message.encode()
    assert parse_message(encoded).encode() == encoded
    for name in ("vias", "contacts", "route", "record_route", "expires", "supported", "content_type"):
        with contextlib.suppress(RemoteProtocolError):
            getattr(message, name)
