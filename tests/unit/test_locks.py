"""The locks: which versions are installed here, and which in the images."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMAGE_LOCKS = ("requirements-runtime.lock", "requirements-build.lock")


def pins(lock: str) -> set[str]:
    """The lines that choose a version, with their conditions."""
    lines = (ROOT / lock).read_text().splitlines()
    return {line.removesuffix(" \\").strip() for line in lines if re.match(r"[a-z0-9]", line)}


def names(lock: str) -> set[str]:
    return {pin.partition("==")[0] for pin in pins(lock)}


@pytest.mark.parametrize("lock", IMAGE_LOCKS)
def test_images_get_the_versions_that_are_tested(lock: str) -> None:
    assert pins(lock) <= pins("requirements.lock"), "make lock"


def test_images_get_what_the_product_needs_and_no_tools() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[\[<>=~!; ]", requirement)[0] for requirement in project["dependencies"]}
    tools = {re.split(r"[\[<>=~!; ]", requirement)[0] for requirement in project["optional-dependencies"]["dev"]}
    assert needed <= names("requirements-runtime.lock"), "make lock"
    assert not tools & names("requirements-runtime.lock")


@pytest.mark.parametrize("lock", ["requirements.lock", *IMAGE_LOCKS])
def test_locks_are_hashed_and_name_no_address(lock: str) -> None:
    text = (ROOT / lock).read_text()
    assert "://" not in text
    for requirement in re.split(r"\n(?=[a-z0-9])", text)[1:]:
        assert "--hash=sha256:" in requirement, requirement
