"""Which node a command talks to."""

from pathlib import Path

import pytest

from sippbx.node_address import ApiKeyError, NodeAddress, NoNodeError, node_address
from sippbx.pair import PairDescription, describe


@pytest.fixture
def pair(tmp_path: Path) -> PairDescription:
    ports = {"sip_port": 5060, "metrics_port": 9090, "http_port": 8080, "grpc_port": 50051}
    made = describe("127.0.0.1", **ports, rtp_range=(10000, 20000), folder=tmp_path / "run")
    made.write()
    return made


def test_pair_that_runs_from_the_folder_is_found_with_its_key(pair: PairDescription) -> None:
    assert node_address(None, None, None, pair.folder) == NodeAddress("127.0.0.1:50051", pair.api_key)


def test_node_that_is_named_is_taken_before_the_pair(pair: PairDescription) -> None:
    named = node_address("pbx.example.org:50051", "key", Path("ca.pem"), pair.folder)
    assert named == NodeAddress("pbx.example.org:50051", "key", Path("ca.pem"))


def test_key_of_the_pair_is_never_sent_to_another_node(pair: PairDescription) -> None:
    with pytest.raises(ApiKeyError, match="--key"):
        node_address("pbx.example.org:50051", None, None, pair.folder)


def test_without_a_pair_it_is_told_how_to_name_a_node(tmp_path: Path) -> None:
    with pytest.raises(NoNodeError, match="--target"):
        node_address(None, "key", None, tmp_path)
