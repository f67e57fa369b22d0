"""The contract may grow and may not shrink: `buf breaking` as `make proto-check` runs it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUF = Path(sys.executable).parent / "buf"
LAST_FIELD = "  string owner_id = 1;\n"


@pytest.fixture
def contract(tmp_path: Path) -> Path:
    """A copy of the contract that a test may change."""
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    shutil.copytree(ROOT / "proto", tmp_path / "proto")
    return tmp_path


def breaking(contract: Path) -> subprocess.CompletedProcess[str]:
    command = [str(BUF), "breaking", "--against", str(ROOT / "proto" / "baseline.binpb")]
    return subprocess.run(command, cwd=contract, capture_output=True, text=True, check=False)


def replace_in_service(contract: Path, old: str, new: str) -> None:
    path = contract / "proto/sippbx/media/v1/media_service.proto"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_contract_as_committed_breaks_nothing(contract: Path) -> None:
    result = breaking(contract)
    assert result.returncode == 0, result.stdout + result.stderr


def test_adding_a_field_breaks_nothing(contract: Path) -> None:
    replace_in_service(contract, LAST_FIELD, f"{LAST_FIELD}  // New.\n  string zone = 90;\n")
    result = breaking(contract)
    assert result.returncode == 0, result.stdout + result.stderr


def test_removing_a_field_is_refused_and_named(contract: Path) -> None:
    replace_in_service(contract, LAST_FIELD, "")
    result = breaking(contract)
    assert result.returncode != 0
    assert "owner_id" in result.stdout


def test_changing_the_type_of_a_field_is_refused(contract: Path) -> None:
    replace_in_service(contract, LAST_FIELD, "  bytes owner_id = 1;\n")
    assert breaking(contract).returncode != 0


def test_removing_a_service_method_is_refused(contract: Path) -> None:
    replace_in_service(contract, "  rpc Shutdown(ShutdownRequest) returns (ShutdownResponse);\n", "")
    assert breaking(contract).returncode != 0
