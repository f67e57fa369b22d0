"""What a pair needs before it is started."""

import stat
from pathlib import Path

import pytest
import yaml

from control.settings.settings import load
from sippbx.pair import STOP_TIMEOUT_S, PairDescription, PairError, api_key_in, describe, own_address, passwords_in


def described(folder: Path, address: str = "127.0.0.1", sip_port: int = 24060) -> PairDescription:
    return describe(
        address,
        sip_port=sip_port,
        metrics_port=24090,
        http_port=24092,
        grpc_port=24093,
        rtp_range=(24200, 24399),
        folder=folder,
    )


@pytest.fixture
def pair(tmp_path: Path) -> PairDescription:
    return described(tmp_path / "run")


def test_passwords_are_made_once_and_kept(tmp_path: Path) -> None:
    first = passwords_in(tmp_path / "run")
    assert set(first) == {"1001", "1002"}
    assert first["1001"] != first["1002"]
    assert passwords_in(tmp_path / "run") == first
    assert passwords_in(tmp_path / "other") != first


@pytest.mark.parametrize("content", ["{}", "[]", "nonsense", '{"1001": "a"}'])
def test_password_file_that_does_not_fit_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "passwords.json").write_text(content)
    with pytest.raises(PairError, match=r"passwords\.json"):
        passwords_in(tmp_path)


def test_description_is_read_back_as_it_was_written(pair: PairDescription) -> None:
    pair.write()
    assert PairDescription.read(pair.folder) == pair


@pytest.mark.parametrize("content", [None, "", "{}", "[1]", '{"rtp_range": 5}'])
def test_folder_without_a_running_pair_has_no_description(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "pair.json").write_text(content)
    assert PairDescription.read(tmp_path) is None


def test_nobody_else_may_read_the_passwords(pair: PairDescription) -> None:
    pair.write()
    for name in ("control.yaml", "dataplane.yaml", "pair.json", "passwords.json", "api-key"):
        assert stat.S_IMODE((pair.folder / name).stat().st_mode) == 0o600, name


def test_both_planes_are_given_the_same_media_socket(pair: PairDescription) -> None:
    pair.write()
    control = yaml.safe_load((pair.folder / "control.yaml").read_text())
    dataplane = yaml.safe_load((pair.folder / "dataplane.yaml").read_text())
    assert control["media"]["target"] == dataplane["grpc"]["listen"]
    assert control["metrics"]["port"] + 1 == dataplane["metrics"]["port"]


def test_folder_too_deep_for_a_unix_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PairError, match="--data"):
        described(tmp_path / ("x" * 120))


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PairError, match="--data"):
        described(tmp_path / "file")


def test_sip_host_names_the_port_unless_it_is_the_usual_one(tmp_path: Path) -> None:
    assert described(tmp_path, "192.0.2.7", 5060).sip_host == "192.0.2.7"
    assert described(tmp_path, "192.0.2.7", 5070).sip_host == "192.0.2.7:5070"
    assert described(tmp_path, "2001:db8::7", 5070).sip_host == "[2001:db8::7]:5070"


def test_control_plane_accepts_its_configuration(pair: PairDescription) -> None:
    pair.write()
    settings = load(pair.folder / "control.yaml", {})
    assert settings.api.keys[0].key is not None
    assert settings.api.keys[0].key.get_secret_value() == pair.api_key
    assert settings.drain.timeout_s < STOP_TIMEOUT_S


def test_api_key_is_made_once_and_kept(tmp_path: Path) -> None:
    first = api_key_in(tmp_path / "run")
    assert len(first) >= 32
    assert api_key_in(tmp_path / "run") == first
    assert api_key_in(tmp_path / "other") != first


@pytest.mark.parametrize("content", [b"", b"short", b"has a space in the middle", b"\xff" * 20])
def test_api_key_that_does_not_fit_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "api-key").write_bytes(content)
    with pytest.raises(PairError, match="api-key"):
        api_key_in(tmp_path)


def test_own_address_is_one_of_this_machine() -> None:
    assert own_address() not in {"", "0.0.0.0"}


@pytest.mark.parametrize(
    ("address", "api"), [("192.0.2.5", "127.0.0.1"), ("127.0.0.5", "127.0.0.5"), ("2001:db8::5", "::1"), ("::1", "::1")]
)
def test_apis_are_on_loopback_wherever_phones_are(tmp_path: Path, address: str, api: str) -> None:
    pair = described(tmp_path, address)
    settings = pair.control_settings()
    assert {settings["api"][name]["bind"] for name in ("http", "grpc")} == {api}
    host = f"[{api}]" if ":" in api else api
    assert (pair.http_url, pair.grpc_target) == (f"http://{host}:24092", f"{host}:24093")
