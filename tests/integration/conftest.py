"""Fixtures of tests that run the pair."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.harness.pair import Pair
from tests.harness.stage import Stage

SIPP_SETTINGS = {"digest_algorithms": ["MD5"]}
"""SIPp 3.6 looks at the first challenge only and knows MD5 alone."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """One pair for all tests of a module."""
    with Pair(tmp_path_factory.mktemp("pair"), control=SIPP_SETTINGS) as started:
        yield started


@pytest.fixture
async def stage(pair: Pair, tmp_path: Path) -> AsyncIterator[Stage]:
    """A stage on the module's pair."""
    async with Stage(pair, tmp_path) as made:
        yield made
