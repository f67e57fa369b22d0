"""Settings: what is refused, and how it is told."""

import resource
from collections.abc import Mapping
from pathlib import Path

import pytest

from dataplane.settings import MediaSettings, Settings, SettingsError, load, prepare_host

EXAMPLE = Path(__file__).parents[3] / "deploy" / "config" / "dataplane.yaml"


def test_the_example_holds_every_key_with_its_default() -> None:
    assert load(EXAMPLE, {}) == Settings()
    for section, model in Settings():
        text = EXAMPLE.read_text().partition(f"\n{section}:")[2]
        assert [key for key in type(model).model_fields if f"\n  {key}: " not in text] == []


def test_the_environment_wins_over_the_file() -> None:
    assert load(EXAMPLE, {"SIPPBX_DATAPLANE_MEDIA__REST_S": "3"}).media.rest_s == 3


@pytest.mark.parametrize(
    ("text", "environment", "words"),
    [
        ("media: {ports: 1}", {}, ["media.ports"]),
        ("medai: {}", {}, ["medai", "media"]),
        ("", {"SIPPBX_DATAPLANE_MEDIA__RST_S": "1"}, ["SIPPBX_DATAPLANE_MEDIA__RST_S", "rest_s"]),
        ("media: {block_size: 6}", {}, ["media.block_size", "multiple of 4"]),
        ("media: {port_range: [21401, 21500]}", {}, ["media.port_range", "odd"]),
        ("media: {port_range: [21400, 21405]}", {}, ["media.port_range", "no block of 8"]),
        ("grpc: {listen: '0.0.0.0:50052'}", {}, ["grpc.listen", "insecure"]),
        ("grpc: {listen: run/media.sock}", {}, ["grpc.listen", "unix:///"]),
        ("metrics: {port: nine}", {}, ["metrics.port", "nine"]),
        ("metrics: {bind: localhost}", {}, ["metrics.bind", "numeric"]),
        ("log: {level: loud}", {}, ["log.level", "loud"]),
    ],
)
def test_what_cannot_work_is_refused_by_the_name_of_its_key(
    tmp_path: Path, text: str, environment: Mapping[str, str], words: list[str]
) -> None:
    path = tmp_path / "dataplane.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load(path, environment)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("grpc: {listen: 'unix:///run/x/media.sock'}", "/run/x/media-statistics.jsonl"),
        ("lease: {statistics_path: kept.jsonl}", "/run/sippbx/kept.jsonl"),
        ("lease: {statistics_path: /data/kept.jsonl}\ngrpc: {listen: '127.0.0.1:50052'}", "/data/kept.jsonl"),
        ("grpc: {listen: '127.0.0.1:50052'}", None),
        ("lease: {statistics_path: null}", None),
    ],
    ids=["beside the socket", "named beside the socket", "absolute", "no socket", "switched off"],
)
def test_statistics_are_kept_beside_the_socket_unless_it_is_said_where(
    tmp_path: Path, text: str, path: str | None
) -> None:
    config = tmp_path / "dataplane.yaml"
    config.write_text(text)
    assert load(config, {}).statistics_path == (None if path is None else Path(path))


@pytest.mark.parametrize(
    "listen", ["unix:///run/x.sock", "127.0.0.1:50052", "[::1]:50052"], ids=["socket", "IPv4", "IPv6"]
)
def test_places_that_only_this_host_reaches_need_no_further_word(listen: str) -> None:
    assert load(None, {"SIPPBX_DATAPLANE_GRPC__LISTEN": listen}).grpc.listen == listen


def test_an_open_place_is_taken_when_it_is_said_to_be_insecure() -> None:
    environment = {"SIPPBX_DATAPLANE_GRPC__LISTEN": "0.0.0.0:50052", "SIPPBX_DATAPLANE_GRPC__INSECURE": "true"}
    assert load(None, environment).grpc.insecure


class Host:
    """Files such as the kernel shows, and a limit of descriptors."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, reserved: str = "", hard: int = 20_000
    ) -> None:
        self.limit = (1024, hard)
        self.ephemeral = folder / "range"
        self.ephemeral.write_text("32768\t60999\n")
        self.reserved = folder / "reserved"
        self.reserved.write_text(f"{reserved}\n")
        monkeypatch.setattr(resource, "getrlimit", lambda _kind: self.limit)
        monkeypatch.setattr(resource, "setrlimit", self._set)

    def _set(self, kind: int, limit: tuple[int, int]) -> None:
        assert kind == resource.RLIMIT_NOFILE
        self.limit = limit

    def prepare(self, first: int, last: int) -> None:
        media = MediaSettings(port_range=(first, last))
        prepare_host(media, ephemeral_range=self.ephemeral, reserved_ports=self.reserved)


def test_the_soft_limit_of_descriptors_is_raised_to_what_the_blocks_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(tmp_path, monkeypatch)
    host.prepare(10_000, 20_000)
    assert host.limit == (10_000 + 256, 20_000)


def test_a_range_beyond_the_hard_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(tmp_path, monkeypatch, hard=10_000)
    with pytest.raises(SettingsError, match=r"media\.port_range: .* needs 10256 descriptors, .* have 10000; .*ulimit"):
        host.prepare(10_000, 20_000)


@pytest.mark.parametrize(("first", "last"), [(32_000, 33_000), (40_000, 41_000), (60_998, 61_100)])
def test_a_range_that_overlaps_the_ephemeral_ports_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, last: int
) -> None:
    with pytest.raises(SettingsError, match=r"media\.port_range: .*ip_local_reserved_ports"):
        Host(tmp_path, monkeypatch).prepare(first, last)


def test_ephemeral_ports_that_are_reserved_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Host(tmp_path, monkeypatch, reserved="8080,40000-40999,41000").prepare(40_000, 41_000)
    with pytest.raises(SettingsError, match="port 41001 first"):
        Host(tmp_path, monkeypatch, reserved="8080,40000-40999,41000").prepare(40_000, 41_001)
