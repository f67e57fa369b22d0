"""Header values: what is read, what is refused, and that writing and reading are inverse."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.sip.errors import RemoteProtocolError
from control.sip.headers import (
    CSeq,
    NameAddr,
    RAck,
    Uri,
    Via,
    is_token,
    parse_decimal,
    parse_params,
    quote,
    split_commas,
    unquote_string,
)

# ------------------------------------------------------------------------------------------------------------- URIs


@pytest.mark.rfc("3261", "19.1.1")
@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("sip:example.com", Uri("sip", None, "example.com")),
        ("sip:1001@example.com", Uri("sip", "1001", "example.com")),
        ("sips:1001@example.com:5061", Uri("sips", "1001", "example.com", 5061)),
        ("sip:a:secret@h", Uri("sip", "a", "h", password="secret")),
        ("sip:a:@h", Uri("sip", "a", "h", password="")),
        ("sip:a@192.0.2.1;transport=udp;lr", Uri("sip", "a", "192.0.2.1", None, (("transport", "udp"), ("lr", None)))),
        ("sip:a@[2001:db8::1]:5070", Uri("sip", "a", "2001:db8::1", 5070)),
        ("sip:[::1];lr", Uri("sip", None, "::1", None, (("lr", None),))),
        ("sip:a@h?Subject=x&Priority=urgent", Uri("sip", "a", "h", headers="Subject=x&Priority=urgent")),
        ("sip:u;par=x@h", Uri("sip", "u;par=x", "h")),
        ("sip:a?b/c@h;x=y?k=v", Uri("sip", "a?b/c", "h", None, (("x", "y"),), "k=v")),
        ("sip:a@h?Replaces=c%40d%3Bx&r=a@b", Uri("sip", "a", "h", headers="Replaces=c%40d%3Bx&r=a@b")),
        ("tel:+1-201-555-0123;phone-context=x", Uri("tel", None, "", opaque="+1-201-555-0123;phone-context=x")),
        ("urn:service:sos", Uri("urn", None, "", opaque="service:sos")),
    ],
)
def test_uri_is_taken_apart_and_written_as_it_was(text: str, uri: Uri) -> None:
    assert Uri.parse(text) == uri
    assert str(uri) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sip",
        "sip:",
        "1001@example.com",
        "9sip:a@h",
        "sip:@h",
        "sip:a@",
        "sip:a@h:",
        "sip:a@h:65536",
        "sip:a@h:99999999",
        "sip:a@h:5o60",
        "sip:a b@h",
        "sip:a@h h",
        "sip:a@[::1",
        "sip:a@::1",
        "sip:a@[]",
        "sip:a@[example.com]",
        "sip:a@h;=x",
        "sip:a@h>",
        'sip:"a"@h',
        "sip:a@h/path",
        "tel:",
        "tel:1 2",
        " sip:a@h",
        "sip:a@h:\u0665",
    ],
)
def test_text_that_is_no_uri_is_refused(text: str) -> None:
    with pytest.raises(RemoteProtocolError) as refusal:
        Uri.parse(text)
    assert refusal.value.status == 400


def test_scheme_is_case_insensitive() -> None:
    assert Uri.parse("SIP:a@h").scheme == "sip"
    assert Uri.parse("TEL:1").scheme == "tel"


@pytest.mark.rfc("3261", "19.1.2")
def test_username_resolves_escapes_once_and_the_user_part_keeps_them() -> None:
    uri = Uri.parse("sip:null-%00%2541@h")
    assert uri.user == "null-%00%2541"
    assert uri.username == "null-\0%41"
    assert str(uri) == "sip:null-%00%2541@h"
    assert Uri.parse("sip:h").username is None
    assert Uri.parse("sip:%ff@h").username == "\udcff"


def test_uri_parameter_names_are_case_insensitive_and_keep_their_spelling() -> None:
    uri = Uri.parse("sip:a@h;OB;Transport=TCP")
    assert (uri.param("transport"), uri.param("ob"), uri.param("lr")) == ("TCP", "", None)
    assert str(uri) == "sip:a@h;OB;Transport=TCP"


# -------------------------------------------------------------------------------------------------------- addresses


@pytest.mark.rfc("3261", "20.10")
@pytest.mark.parametrize(
    ("text", "display_name", "uri", "params"),
    [
        ("<sip:a@h>", None, "sip:a@h", ()),
        ("sip:a@h", None, "sip:a@h", ()),
        ("sip:a@h;tag=x", None, "sip:a@h", (("tag", "x"),)),
        ("<sip:a@h;lr>;tag=x", None, "sip:a@h;lr", (("tag", "x"),)),
        ("tel:+1201;tag=x", None, "tel:+1201", (("tag", "x"),)),
        ("<tel:+1201;ext=1>;tag=x", None, "tel:+1201;ext=1", (("tag", "x"),)),
        ('"A. Bell" <sip:a@h>', "A. Bell", "sip:a@h", ()),
        (
            '"Bell, \\"Al\\" \\\\ <x>;y" <sip:a@h> ; tag = x ; z',
            'Bell, "Al" \\ <x>;y',
            "sip:a@h",
            (("tag", "x"), ("z", None)),
        ),
        ('""<sip:a@h>', "", "sip:a@h", ()),
        ("Alice<sip:a@h>", "Alice", "sip:a@h", ()),
        ("Alice  B.\t<sip:a@h>", "Alice  B.", "sip:a@h", ()),
        ("Bell, Al <sip:a@h>", "Bell, Al", "sip:a@h", ()),
        ("  <sip:a@h>  ", None, "sip:a@h", ()),
        (
            '<sip:a@h>;+sip.instance="<urn:uuid:0;1,2>";q=1',
            None,
            "sip:a@h",
            (("+sip.instance", '"<urn:uuid:0;1,2>"'), ("q", "1")),
        ),
        ('<sip:a@h>;x="a\\";b";y', None, "sip:a@h", (("x", '"a\\";b"'), ("y", None))),
        ("<sip:a@h>;;;x;", None, "sip:a@h", (("x", None),)),
    ],
)
def test_address_is_taken_apart(
    text: str, display_name: str | None, uri: str, params: tuple[tuple[str, str | None], ...]
) -> None:
    address = NameAddr.parse(text)
    assert address == NameAddr(Uri.parse(uri), display_name, params)
    assert NameAddr.parse(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<>",
        "<sip:a@h",
        "sip:a@h>",
        '"Alice <sip:a@h>',
        '"Alice\\" <sip:a@h>',
        '"Alice" sip:a@h',
        '"A" B <sip:a@h>',
        'A"B" <sip:a@h>',
        "<sip:a@h> tag=x",
        "<sip:a@h>;=x",
        "< sip:a@h >",
        "sip:a@h?Route=x",
        "sip:a,b@h",
        "Alice sip:a@h",
        "*",
    ],
)
def test_text_that_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(RemoteProtocolError) as refusal:
        NameAddr.parse(text)
    assert refusal.value.status == 400


@pytest.mark.rfc("3261", "19.3")
def test_tag_is_read_whatever_its_case_and_replaced_in_place() -> None:
    address = NameAddr.parse("<sip:a@h>;x=1;TAG=old;y")
    assert address.tag == "old"
    assert str(address.with_tag("new")) == "<sip:a@h>;x=1;tag=new;y"
    assert str(NameAddr.parse("<sip:a@h>").with_tag("t")) == "<sip:a@h>;tag=t"
    assert NameAddr.parse("<sip:a@h>;tag=").tag is None
    assert NameAddr.parse("<sip:a@h>").tag is None


def test_header_parameter_is_given_unquoted() -> None:
    address = NameAddr.parse('<sip:a@h>;x="a \\"b\\"";flag')
    assert (address.param("x"), address.param("flag"), address.param("none")) == ('a "b"', "", None)


# -------------------------------------------------------------------------------------------------------------- Via


@pytest.mark.rfc("3261", "20.42")
@pytest.mark.parametrize(
    ("text", "via"),
    [
        ("SIP/2.0/UDP h;branch=z9hG4bKx", Via("UDP", "h", None, (("branch", "z9hG4bKx"),))),
        ("SIP/2.0/UDP 192.0.2.1:5060", Via("UDP", "192.0.2.1", 5060)),
        ("SIP / 2.0 / tcp   h : 5070 ; branch = x", Via("TCP", "h", 5070, (("branch", "x"),))),
        ("sip/2.0/UDP [2001:db8::9]:5060;rport", Via("UDP", "2001:db8::9", 5060, (("rport", None),))),
        ("SIP/2.0/TLS-SCTP h;;,", Via("TLS-SCTP", "h", None, ((",", None),))),
        ('SIP/2.0/UDP h;x="a;b"', Via("UDP", "h", None, (("x", '"a;b"'),))),
        ("SIP/7.0/UDP h", Via("UDP", "h")),
    ],
)
def test_via_is_taken_apart(text: str, via: Via) -> None:
    assert Via.parse(text) == via
    assert Via.parse(str(via)) == via


@pytest.mark.parametrize(
    "text",
    [
        "",
        "SIP/2.0/UDP",
        "SIP/2.0/UDP ",
        "HTTP/1.1/UDP h",
        "SIP/2.0 h",
        "SIP/2.0/UDP h:x",
        "SIP/2.0/UDP h:70000",
        "SIP/2.0/UDP a b",
    ],
)
def test_text_that_is_no_via_is_refused(text: str) -> None:
    with pytest.raises(RemoteProtocolError) as refusal:
        Via.parse(text)
    assert refusal.value.status == 400


@pytest.mark.rfc("3581", "4")
def test_receiver_notes_the_source_in_via() -> None:
    via = Via.parse("SIP/2.0/UDP h;rport;branch=b")
    assert (via.rport, via.received, via.branch) == ("", None, "b")
    noted = via.with_params(rport="5099", received="192.0.2.7")
    assert str(noted) == "SIP/2.0/UDP h;rport=5099;branch=b;received=192.0.2.7"
    assert (noted.rport, noted.received) == ("5099", "192.0.2.7")
    assert Via.parse("SIP/2.0/UDP h").rport is None
    assert str(Via.parse("SIP/2.0/UDP h").with_params(rport="")) == "SIP/2.0/UDP h;rport"


def test_received_is_read_with_brackets_and_without() -> None:
    assert Via.parse("SIP/2.0/UDP h;received=[::1]").received == "::1"
    assert Via.parse("SIP/2.0/UDP h;received=::1").received == "::1"


def test_via_without_a_branch_has_an_empty_one() -> None:
    assert Via.parse("SIP/2.0/UDP h").branch == ""
    assert Via.parse("SIP/2.0/UDP h;maddr=192.0.2.9").param("maddr") == "192.0.2.9"


# -------------------------------------------------------------------------------------------------------- sequences


@pytest.mark.rfc("3261", "20.16")
def test_sequence_number_may_have_leading_zeros_and_methods_keep_their_case() -> None:
    assert CSeq.parse("0009  INVITE") == CSeq(9, "INVITE")
    assert CSeq.parse("1 invite") == CSeq(1, "invite")
    assert str(CSeq(2147483647, "BYE")) == "2147483647 BYE"


@pytest.mark.parametrize(
    "text", ["", "1", "INVITE", "INVITE 1", "-1 INVITE", "2147483648 A", "1 INVITE x", "1 IN/VITE", "\u0661 A"]
)
def test_text_that_is_no_cseq_is_refused(text: str) -> None:
    with pytest.raises(RemoteProtocolError) as refusal:
        CSeq.parse(text)
    assert refusal.value.header == "CSeq"


@pytest.mark.rfc("3262", "7.2")
def test_rack_holds_response_number_and_cseq() -> None:
    assert RAck.parse("776656 1 INVITE") == RAck(776656, 1, "INVITE")
    assert str(RAck(1, 2, "INVITE")) == "1 2 INVITE"
    for text in ("", "1", "0 1 INVITE", "4294967296 1 INVITE", "1 INVITE", "x 1 INVITE"):
        with pytest.raises(RemoteProtocolError):
            RAck.parse(text)


# ------------------------------------------------------------------------------------------------------- lists, text


@pytest.mark.rfc("3261", "7.3.1")
@pytest.mark.parametrize(
    ("text", "elements"),
    [
        ("", []),
        ("a", ["a"]),
        (" a , b,c ", ["a", "b", "c"]),
        ("a,,b,", ["a", "b"]),
        ('"x, y" <sip:a@h>, <sip:b,c@h>;p="q,\\",r"', ['"x, y" <sip:a@h>', '<sip:b,c@h>;p="q,\\",r"']),
        ('"a\\\\", b', ['"a\\\\"', "b"]),
        ('"open, b', ['"open, b']),
        ("<open, b", ["<open, b"]),
        ('<sip:a@h?x="y>, "b"', ['<sip:a@h?x="y>', '"b"']),
        ("a\\, b", ["a\\", "b"]),
    ],
)
def test_commas_inside_quotes_and_brackets_do_not_split(text: str, elements: list[str]) -> None:
    assert split_commas(text) == elements


def test_parameters_may_have_white_space_around_each_part() -> None:
    assert parse_params("; a = 1 ;b;c=") == (("a", "1"), ("b", None), ("c", ""))
    assert parse_params("") == ()


@pytest.mark.parametrize("text", ["", "x", "-1", "+1", "1.0", " 1", "256", "\u00b2", "\u0663", "9" * 5000])
def test_only_plain_digits_in_range_are_a_number(text: str) -> None:
    assert parse_decimal(text, 255) is None


def test_leading_zeros_do_not_change_a_number() -> None:
    assert parse_decimal("0068", 255) == 68


def test_tokens_have_no_separators() -> None:
    assert is_token("z9hG4bK-.!%66*_+`'~")
    assert not any(is_token(text) for text in ("", "a b", "a/b", "a@b", "a:b", "é"))


# --------------------------------------------------------------------------------------------------------- properties

TOKEN = st.text("abcXYZ019-.!%*_+`'~", min_size=1, max_size=12)
HOST = st.sampled_from(["h", "example.com", "192.0.2.1", "::1", "2001:db8::a:1"])
PORT = st.none() | st.integers(0, 65535)
URI_PARAMS = st.lists(st.tuples(TOKEN, st.none() | st.text("ab%20[]/:&+$-_", max_size=6)), max_size=4).map(tuple)
URIS = st.builds(
    Uri,
    st.sampled_from(["sip", "sips"]),
    st.none() | st.text("abc019&=+$,;?/-_.!~*'()%", min_size=1, max_size=12),
    HOST,
    PORT,
    URI_PARAMS,
    st.text("ab=&%40[]/", max_size=8),
    st.none(),
) | st.builds(Uri, st.sampled_from(["tel", "urn"]), st.none(), st.just(""), opaque=st.text("+0123-;=:a", min_size=1))
TEXT = st.text(st.characters(exclude_characters="\r\n", exclude_categories=()), max_size=20)
PARAMS = st.lists(st.tuples(TOKEN, st.none() | TOKEN | TEXT.map(quote)), max_size=4).map(tuple)


@given(URIS)
def test_every_uri_survives_writing_and_reading(uri: Uri) -> None:
    assert Uri.parse(str(uri)) == uri


@given(st.builds(NameAddr, URIS, st.none() | TEXT, PARAMS))
def test_every_address_survives_writing_and_reading(address: NameAddr) -> None:
    assert NameAddr.parse(str(address)) == address


@given(st.builds(Via, TOKEN.map(str.upper), HOST, PORT, PARAMS))
def test_every_via_survives_writing_and_reading(via: Via) -> None:
    assert Via.parse(str(via)) == via


@given(st.lists(st.builds(NameAddr, URIS, st.none() | TEXT, PARAMS), max_size=5))
def test_every_list_of_addresses_survives_joining_and_splitting(addresses: list[NameAddr]) -> None:
    elements = split_commas(", ".join(map(str, addresses)))
    assert [NameAddr.parse(element) for element in elements] == addresses


@given(TEXT)
def test_every_text_survives_quoting(text: str) -> None:
    assert unquote_string(quote(text)) == text


@given(st.text('ab<>",;:=\\@[]*?% \t0', max_size=40))
def test_no_text_makes_a_reader_raise_anything_but_a_protocol_error(text: str) -> None:
    for read in (Uri.parse, NameAddr.parse, Via.parse, CSeq.parse, RAck.parse, parse_params):
        try:
            value = read(text)
        except RemoteProtocolError:
            continue
        if isinstance(value, Uri | NameAddr | Via | CSeq | RAck):
            assert type(value).parse(str(value)) == value


@pytest.mark.parametrize(
    "text", ['"' + '\\"' * 30000, "<" * 60000, '"' * 60001, ";" * 60000, " " * 60000, "a@" * 30000]
)
@pytest.mark.timeout(5)
def test_hostile_text_is_read_in_linear_time(text: str) -> None:
    split_commas(text)
    for read in (Uri.parse, NameAddr.parse, Via.parse):
        with pytest.raises(RemoteProtocolError):
            read(text)
