"""What the control plane's settings accept, and what they say of what they do not."""

import hashlib
import re
from ipaddress import ip_network
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from control.pbx.routing import NatHandling, RouteRule
from control.pbx.trunks import Trunk
from control.settings.settings import ENVIRONMENT_PREFIX, Settings, load
from control.sip.address import Address, Flow, Transport
from sippbx.runtime.settings_reader import SettingsError

EXAMPLE = Path(__file__).parents[3] / "deploy" / "config" / "control.yaml"
CARRIER = "trunks: [{name: carrier, destination: 198.51.100.10}]\n"
TLS = "{certificate_path: /c, private_key_path: /k}"
SECURE = f"sip: {{listeners: [{{name: tls, transport: tls, tls: {TLS}}}]}}\n"
BOTH_FAMILIES = "sip: {listeners: [{name: v4}, {name: v6, bind: '::'}]}\nmedia: {addresses: [{}, {bind: '::'}]}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "control.yaml"


def settings(file: Path, text: str) -> Settings:
    file.write_text(text)
    return load(file, {})


def faults(file: Path, text: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        settings(file, text)
    return caught.value.messages


# Defaults and the example


def test_the_defaults_are_valid() -> None:
    defaults = load(None, {})
    assert defaults.metrics.port == 9090
    assert defaults.media.target == "unix:///run/sippbx/media.sock"
    assert (defaults.sip.ring_timeout_s, defaults.sip.max_call_duration_s) == (60, 14_400)
    assert [listener.port for listener in defaults.sip.listeners] == [5060]


def test_the_example_is_valid() -> None:
    example = load(EXAMPLE, {})
    assert [user.name for user in example.users] == ["1001", "1002"]
    assert [route.prefix for route in example.routes] == ["+", "9", "+8225550100"]


def keys_of(model: type[BaseModel], path: str = "") -> set[str]:
    keys = set()
    for name, field in model.model_fields.items():
        key = f"{path}{field.alias or name}"
        keys.add(key)
        for inner in nested_models(field.annotation):
            keys |= keys_of(inner, f"{key}.")
    return keys


def nested_models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in getattr(annotation, "__args__", ()) for model in nested_models(argument)]


def keys_in(value: object, path: str = "") -> set[str]:
    if isinstance(value, dict):
        return {f"{path}{key}" for key in value} | {k for key, v in value.items() for k in keys_in(v, f"{path}{key}.")}
    if isinstance(value, list):
        return {key for element in value for key in keys_in(element, path)}
    return set()


def test_the_example_shows_every_key() -> None:
    assert keys_in(yaml.safe_load(EXAMPLE.read_text())) == keys_of(Settings)


def test_the_example_comments_on_every_key() -> None:
    lines = EXAMPLE.read_text().splitlines()
    # What its section's comment explains.
    self_evident = {"bind", "port", "advertise", "name", "trunk", "user", "md5", "sha256", "format", "level", "mode"}
    explained: set[str] = set(self_evident)
    for before, line in pairwise(lines):
        match = re.match(r"\s*(?:- )?([a-z0-9_]+):", line)
        if match and before.strip().startswith("#"):
            explained.add(match[1])
    sections = {"log", "sip", "registrar", "limits", "media", "ha1", "http", "grpc"}
    named = {key.rpartition(".")[2] for key in keys_of(Settings)}
    assert named - explained - sections - {"realm"} == set()


def test_the_example_s_hashes_are_those_of_its_password() -> None:
    ha1 = load(EXAMPLE, {}).users[1].ha1
    assert ha1 is not None
    assert ha1.md5 is not None
    assert ha1.sha256 is not None
    secret = b"1002:sippbx:change-me-1002"
    assert ha1.md5.get_secret_value() == hashlib.md5(secret, usedforsecurity=False).hexdigest()
    assert ha1.sha256.get_secret_value() == hashlib.sha256(secret).hexdigest()


def test_values_the_example_does_not_mark_as_such_are_the_defaults() -> None:
    example, defaults = load(EXAMPLE, {}), load(None, {})
    for section in ("realm", "log", "registrar", "limits", "store", "cdr", "events", "metrics", "drain"):
        assert getattr(example, section) == getattr(defaults, section)
    assert example.sip.timers == defaults.sip.timers
    assert example.media.addresses[0] == defaults.media.addresses[0]


# Overrides, secrets, immutability


def test_the_environment_wins_over_the_file(file: Path) -> None:
    file.write_text("limits: {max_calls: 5, retry_after_s: 6}")
    loaded = load(file, {f"{ENVIRONMENT_PREFIX}LIMITS__MAX_CALLS": "9", "PATH": "/bin"})
    assert (loaded.limits.max_calls, loaded.limits.retry_after_s) == (9, 6)


def test_an_unknown_variable_of_ours_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"limits\.max_cals: unknown key .*SIPPBX_CONTROL_LIMITS__MAX_CALS"):
        load(None, {"SIPPBX_CONTROL_LIMITS__MAX_CALS": "9"})


def test_credentials_are_in_no_dump(file: Path) -> None:
    digest = "0123456789abcdef" * 2
    loaded = settings(file, f"users: [{{name: 1001, password: hunter2}}, {{name: 1002, ha1: {{md5: {digest}}}}}]")
    for dump in (repr(loaded), str(loaded.model_dump()), loaded.model_dump_json()):
        assert "hunter2" not in dump
        assert digest not in dump


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load(None, {}).limits.max_calls = 3  # type: ignore[misc]


def test_a_dump_can_be_read_again_but_for_its_secrets() -> None:
    example = load(EXAMPLE, {})
    dump = example.model_dump(mode="json", by_alias=True, exclude={"users", "routes", "webhooks", "api"})
    assert Settings.model_validate(dump).trunks == example.trunks


# Refusals


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # single values
        ("realm: 'a\"b'", "realm: 'a\"b' is not a realm"),
        ("node_name: a b", "node_name: 'a b' is not 1 to 64 printable ASCII characters"),
        ("log: {level: loud}", "log.level: 'loud' is not one of 'debug', 'info', 'warning' or 'error'"),
        ("sip: {listeners: []}", "sip.listeners: must have at least 1 entry"),
        ("sip: {listeners: [{name: a, bind: localhost}]}", "sip.listeners[0].bind: 'localhost' is not a numeric"),
        ("sip: {listeners: [{name: a, transport: sctp}]}", "sip.listeners[0].transport: 'SCTP' is not one of 'UDP'"),
        ("sip: {listeners: [{name: a, port: 0}]}", "sip.listeners[0].port: 0 is too little; it must be at least 1"),
        ("sip: {listeners: [{name: a, port: 65536}]}", "sip.listeners[0].port: 65536 is too much"),
        ("sip: {listeners: [{name: a, advertise: 0.0.0.0}]}", "sip.listeners[0].advertise: peers cannot reach 0.0.0.0"),
        ("sip: {listeners: [{name: a, advertise: '::'}]}", "sip.listeners[0].advertise: peers cannot reach ::"),
        ("sip: {listeners: [{name: a, advertise: 224.0.0.1}]}", "sip.listeners[0].advertise: peers cannot reach 224"),
        ('sip: {server_name: "a\\nb"}', "sip.server_name: "),
        ("sip: {ring_timeout_s: 0}", "sip.ring_timeout_s: 0 is too little; it must be at least 1"),
        ("sip: {max_call_duration_s: inf}", "sip.max_call_duration_s: inf is not a finite number"),
        ("sip: {timers: {t1_s: 0}}", "sip.timers.t1_s: 0 is too little; it must be more than 0"),
        ("limits: {max_calls: 0}", "limits.max_calls: 0 is too little"),
        ("limits: {calls_per_second: many}", "limits.calls_per_second: 'many' is not a number"),
        ("limits: {max_message_bytes: 65536}", "limits.max_message_bytes: 65536 is too much; it must be at most 65535"),
        ("registrar: {min_expires_s: 3601}", "registrar.min_expires_s: 3601 is too much"),
        (
            "media: {target: /run/media.sock}",
            "media.target: '/run/media.sock' is not unix:///absolute/path or host:port",
        ),
        ("media: {mode: transcode}", "media.mode: 'transcode' is not one of 'bypass'"),
        ("media: {latch_policy: any}", "media.latch_policy: 'any' is not one of"),
        ("media: {command_timeout_s: 0}", "media.command_timeout_s: 0 is too little"),
        ("users: [{name: 'a@b', password: x}]", "users[0].name: 'a@b' is not a user"),
        ("users: [{name: a, password: x, nat: maybe}]", "users[0].nat: 'maybe' is not one of 'auto' or 'source'"),
        ("trunks: [{name: a}]", "trunks[0].destination: is required"),
        (
            "trunks: [{name: a, destination: sip.example.org}]",
            "trunks[0].destination: 'sip.example.org' is not a numeric",
        ),
        (
            "trunks: [{name: a, destination: '2001:db8::1'}]",
            "trunks[0].destination: '2001:db8::1' is not host:port; IPv6",
        ),
        ("trunks: [{name: a, destination: '192.0.2.1:0'}]", "trunks[0].destination: port 0 is not within 1 to 65535"),
        ("trunks: [{name: a, destination: 0.0.0.0}]", "trunks[0].destination: nothing can be sent to 0.0.0.0"),
        (
            "trunks: [{name: a, destination: 192.0.2.1, trusted: [192.0.2.1/24]}]",
            "trunks[0].trusted[0]: 192.0.2.1/24 has",
        ),
        ("routes: [{prefix: abc, trunk: a}]", "routes[0].prefix: 'abc' is not a prefix"),
        ("routes: [{prefix: '', trunk: a}]", "routes[0].prefix: '' is not a prefix"),
        ("routes: [{prefix: 8+2, trunk: a}]", "routes[0].prefix: '8+2' is not a prefix"),
        ("routes: [{prefix: 9, trunk: a, prepend: x}]", "routes[0].prepend: 'x' is not digits"),
        ("routes: [{prefix: 9, trunk: a, from: []}]", "routes[0].from: must have at least 1 entry"),
        # keys of one section
        (
            "sip: {listeners: [{name: a, advertise: '2001:db8::1'}]}",
            "sip.listeners[0].advertise: 2001:db8::1 is not of the",
        ),
        ("sip: {timers: {t1_s: 5, t2_s: 4}}", "sip.timers.t2_s: 4.0 is less than t1_s, 5.0"),
        (
            "registrar: {min_expires_s: 60, max_expires_s: 30}",
            "registrar.max_expires_s: 30 is less than min_expires_s, 60",
        ),
        ("registrar: {default_expires_s: 30}", "registrar.default_expires_s: 30 is not within min_expires_s, 60"),
        ("users: [{name: a}]", "users[0]: user a has no credential; give password or ha1"),
        ("users: [{name: a, password: ''}]", "users[0].password: is empty"),
        ("users: [{name: a, ha1: {}}]", "users[0].ha1: give md5, sha256 or both"),
        ("users: [{name: a, ha1: {md5: 12}}]", "users[0].ha1.md5: must be 32 hexadecimal digits"),
        ("users: [{name: a, ha1: {sha256: 12}}]", "users[0].ha1.sha256: must be 64 hexadecimal digits"),
        ("trunks: [{name: users, destination: 192.0.2.1}]", "trunks[0].name: 'users' stands for all users in routes"),
        (
            "trunks: [{name: a, destination: 192.0.2.1, trusted: [0.0.0.0/0]}]",
            "trunks[0].trusted[0]: 0.0.0.0/0 trusts everybody",
        ),
        ("routes: [{prefix: 9}]", "routes[0]: route 9 needs exactly one of trunk and user"),
        ("routes: [{prefix: 9, trunk: a, user: b}]", "routes[0]: route 9 needs exactly one of trunk and user"),
        ("routes: [{prefix: 9, trunk: a, strip: 2}]", "routes[0].strip: 2 is more than the prefix 9 has characters, 1"),
        ("routes: [{prefix: 9, user: a, strip: 1}]", "routes[0]: route 9 goes to a user"),
        ("{store: {path: /x}, cdr: {jsonl_path: /x}}", "cdr.jsonl_path: /x is store.path, too"),
        ("{store: {path: /x}, cdr: {csv_path: /x}}", "cdr.csv_path: /x is store.path, too"),
        ("cdr: {jsonl_path: /x, csv_path: /x}", "cdr.csv_path: /x is jsonl_path, too"),
        ("cdr: {keep_files: 3}", "cdr.keep_files: deletes files that were rotated; set rotate_bytes or rotate_every"),
        ("media: {addresses: [{}, {bind: 127.0.0.1}]}", "media.addresses[1].bind: IPv4 is addresses[0], too"),
        ("sip: {listeners: [{name: a}, {name: a, port: 5070}]}", "sip.listeners[1].name: a is listeners[0], too"),
        # between sections
        ("users: [{name: a, password: x}, {name: a, password: y}]", "users[1].name: a is users[0], too"),
        (
            "trunks: [{name: a, destination: 192.0.2.1}, {name: a, destination: 192.0.2.2}]",
            "trunks[1].name: a is trunks[0], too",
        ),
        (
            "trunks: [{name: a, destination: 192.0.2.1}, {name: b, destination: '192.0.2.1:5070'}]",
            "trunks[1].trusted: 192.0.2.1/32 is trusted as trunk a, too",
        ),
        (
            f"{CARRIER}routes: [{{prefix: 9, trunk: carier}}]",
            "routes[0].trunk: there is no trunk 'carier'; did you mean",
        ),
        ("routes: [{prefix: 9, user: a}]", "routes[0].user: there is no user 'a'; there are none"),
        (
            f"{CARRIER}routes: [{{prefix: 9, trunk: carrier, from: [user]}}]",
            "routes[0].from[0]: there is no trunk 'user'",
        ),
        (
            f"{CARRIER}routes: [{{prefix: 9, trunk: carrier}}, {{prefix: 9, trunk: carrier, from: [users, carrier]}}]",
            "routes[1].prefix: 9 is the prefix of routes[0], too, for users",
        ),
        (
            "trunks: [{name: a, destination: '[2001:db8::1]'}]",
            "trunks[0].destination: [2001:db8::1]:5060 needs UDP over IPv6",
        ),
        ("trunks: [{name: a, destination: 192.0.2.1, listener: b}]", "trunks[0].listener: there is no listener 'b'"),
        (
            f"{BOTH_FAMILIES}trunks: [{{name: a, destination: 192.0.2.1, listener: v6}}]",
            "trunks[0].destination: 192.0.2.1:5060 needs UDP over IPv4, which listener 'v6' is not for",
        ),
        ("sip: {listeners: [{name: a, bind: '::'}]}", "media.addresses: has no IPv6 address for listener 'a'; add one"),
        (
            "sip: {listeners: [{name: a}, {name: b, bind: 127.0.0.1}]}",
            "sip.listeners[1].port: UDP port 5060 on 127.0.0.1 is taken by sip.listeners[0].port on 0.0.0.0",
        ),
        (
            "sip: {listeners: [{name: a, bind: 127.0.0.1}, {name: b, bind: 127.0.0.1}]}",
            "sip.listeners[1].port: UDP port 5060 on 127.0.0.1 is taken",
        ),
        (
            "sip: {listeners: [{name: a, transport: tls}]}",
            "sip.listeners[0].tls: listener a needs a certificate; give certificate_path",
        ),
        (
            f"sip: {{listeners: [{{name: a, transport: tcp, tls: {TLS}}}]}}",
            "sip.listeners[0].tls: is for transport tls alone, listener a has tcp",
        ),
        (
            "trunks: [{name: a, destination: 192.0.2.1, tls: {}}]",
            "trunks[0].tls: is for transport tls alone, trunk a has udp",
        ),
        (
            f"{SECURE}trunks: [{{name: a, destination: 192.0.2.1, transport: tls, tls: {{server_name: a b}}}}]",
            "trunks[0].tls.server_name: 'a b' is not a host name",
        ),
        (
            "trunks: [{name: a, destination: 192.0.2.1, transport: tcp}]",
            "trunks[0].destination: 192.0.2.1:5060 needs TCP over IPv4, but no listener is for that",
        ),
        (
            f"sip: {{listeners: [{{name: a, transport: tcp}}, {{name: b, transport: tls, port: 5060, tls: {TLS}}}]}}",
            "sip.listeners[1].port: TCP port 5060 on 0.0.0.0 is taken by sip.listeners[0].port",
        ),
        (
            "sip: {listeners: [{name: a, transport: tcp, port: 9090}]}",
            "metrics.port: TCP port 9090 on 0.0.0.0 is taken",
        ),
        ("sip: {connections: {max_open: 0}}", "sip.connections.max_open: 0 is too little"),
    ],
)
def test_what_cannot_work_is_refused_by_the_path_of_its_key(file: Path, text: str, message: str) -> None:
    found = faults(file, text)
    assert any(fault.startswith(message) for fault in found), found


def test_a_user_with_two_credentials_is_refused(file: Path) -> None:
    (fault,) = faults(file, f"users: [{{name: a, password: x, ha1: {{md5: {'0' * 32}}}}}]")
    assert fault == "users[0]: user a has both password and ha1; remove one of them"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("metrics: {port: 5060}", id="metrics is TCP, SIP is UDP"),
        pytest.param("sip: {listeners: [{name: a}, {name: b, port: 5070}]}", id="other port"),
        pytest.param(BOTH_FAMILIES, id="other family"),
        pytest.param("sip: {listeners: [{name: a, bind: 127.0.0.1}, {name: b, bind: 127.0.0.2}]}", id="other address"),
        pytest.param(
            f"{CARRIER}routes: [{{prefix: 9, trunk: carrier}}, {{prefix: 9, trunk: carrier, from: [carrier]}}]",
            id="one prefix for different callers",
        ),
        pytest.param("media: {target: '[::1]:50052'}", id="media over TCP"),
        pytest.param("cdr: {jsonl_path: null}", id="no JSON lines"),
        pytest.param("sip: {listeners: [{name: a}, {name: b, transport: tcp}]}", id="TCP beside UDP"),
    ],
)
def test_what_looks_like_a_clash_and_is_none_is_accepted(file: Path, text: str) -> None:
    settings(file, text)


# What the rest of the program reads


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("{name: a}", None),
        ("{name: a, bind: 127.0.0.1}", "127.0.0.1"),
        ("{name: a, bind: 127.0.0.1, advertise: 203.0.113.1}", "203.0.113.1"),
        ("{name: a, advertise: 203.0.113.1}", "203.0.113.1"),
    ],
)
def test_the_advertised_address_is_the_given_or_the_bound_one_or_must_be_detected(
    file: Path, text: str, host: str | None
) -> None:
    assert settings(file, f"sip: {{listeners: [{text}]}}").sip.listeners[0].advertised_host == host


def test_tls_has_a_port_of_its_own_unless_given(file: Path) -> None:
    listeners = f"[{{name: a, transport: tls, tls: {TLS}}}, {{name: b, transport: tcp}}, {{name: c, port: 5080}}]"
    loaded = settings(file, f"sip: {{listeners: {listeners}}}")
    assert [listener.port for listener in loaded.sip.listeners] == [5061, 5060, 5080]


def test_trunks_over_tls_are_known_by_their_addresses_with_what_they_must_show(file: Path) -> None:
    trunks = "[{name: a, destination: '192.0.2.1:5061', transport: tls, tls: {server_name: sip.a.example}}, "
    trunks += "{name: b, destination: '192.0.2.2:5061', transport: tls}, {name: c, destination: 192.0.2.3}]"
    loaded = settings(
        file, f"sip: {{listeners: [{{name: u}}, {{name: t, transport: tls, tls: {TLS}}}]}}\ntrunks: {trunks}"
    )
    peers = loaded.tls_peers()
    assert {str(address): tls.server_name for address, tls in peers.items()} == {
        "192.0.2.1:5061": "sip.a.example", "192.0.2.2:5061": None,
    }  # fmt: skip
    assert [trunk.flow.listener for trunk in loaded.trunk_values()] == ["t", "t", "u"]


@pytest.mark.rfc("3261", "18.1.1")
def test_large_requests_to_trunks_over_udp_may_go_over_the_first_tcp_listener_of_their_family(file: Path) -> None:
    listeners = "[{name: u}, {name: t6, transport: tcp, bind: '::'}, {name: t, transport: tcp}, {name: u6, bind: '::'}]"
    trunks = "[{name: a, destination: '192.0.2.1:5070'}, {name: b, destination: 192.0.2.2, transport: tcp}]"
    text = f"sip: {{listeners: {listeners}}}\nmedia: {{addresses: [{{}}, {{bind: '::'}}]}}\ntrunks: {trunks}"
    remote = Address("192.0.2.1", 5070)
    expected = {Flow(Transport.UDP, "u", remote): Flow(Transport.TCP, "t", remote)}
    assert settings(file, text).stream_flows() == expected
    assert settings(file, CARRIER).stream_flows() == {}


def test_the_advertised_port_is_the_bound_one_unless_given(file: Path) -> None:
    loaded = settings(file, "sip: {listeners: [{name: a, port: 5070}, {name: b, port: 5080, advertise_port: 5060}]}")
    assert [listener.advertised_port for listener in loaded.sip.listeners] == [5070, 5060]


def test_addresses_are_written_in_one_way(file: Path) -> None:
    text = "sip: {listeners: [{name: v6, bind: '[2001:DB8:0::1]'}]}\nmedia: {addresses: [{bind: '::0'}]}"
    loaded = settings(file, text)
    assert (loaded.sip.listeners[0].bind, loaded.media.addresses[0].bind) == ("2001:db8::1", "::")


def test_a_trunk_is_reached_through_the_first_listener_of_its_family_and_trusted_by_its_address(file: Path) -> None:
    trunks = "trunks: [{name: a, destination: '[2001:db8::1]'}, {name: b, destination: '192.0.2.1:5070'}]"
    assert settings(file, BOTH_FAMILIES + trunks).trunk_values() == (
        Trunk("a", Flow(Transport.UDP, "v6", Address("2001:db8::1", 5060)), (ip_network("2001:db8::1"),)),
        Trunk("b", Flow(Transport.UDP, "v4", Address("192.0.2.1", 5070)), (ip_network("192.0.2.1"),)),
    )


def test_a_trunk_may_name_its_listener_and_its_networks(file: Path) -> None:
    text = (
        "sip: {listeners: [{name: a}, {name: b, port: 5070}]}\n"
        "trunks: [{name: t, destination: 192.0.2.1, listener: b, trusted: [192.0.2.0/24, 198.51.100.1]}]"
    )
    (trunk,) = settings(file, text).trunk_values()
    assert trunk.flow.listener == "b"
    assert trunk.trusted == (ip_network("192.0.2.0/24"), ip_network("198.51.100.1/32"))


def test_routes_to_trunks_are_for_users_and_routes_to_users_for_everybody_unless_said_otherwise(file: Path) -> None:
    text = (
        f"{CARRIER}users: [{{name: 1001, password: x}}]\n"
        "routes:\n"
        "- {prefix: +82, trunk: carrier, strip: 3, prepend: 0}\n"
        "- {prefix: +8225550100, user: 1001}\n"
        "- {prefix: 7, trunk: carrier, from: [carrier]}\n"
    )
    assert settings(file, text).route_rules() == (
        RouteRule("+82", frozenset({"users"}), trunk="carrier", strip=3, prepend="0"),
        RouteRule("+8225550100", frozenset({"users", "carrier"}), user="1001"),
        RouteRule("7", frozenset({"carrier"}), trunk="carrier"),
    )


def test_users_are_handled_by_nat_as_they_say(file: Path) -> None:
    loaded = settings(file, "users: [{name: a, password: x}, {name: b, password: x, nat: source}]")
    assert [user.nat for user in loaded.users] == [NatHandling.AUTO, NatHandling.SOURCE]
