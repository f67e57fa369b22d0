"""control.store.health: when the store is too slow to take another call."""

from dataclasses import dataclass

import pytest

from control.store.database import Commit
from control.store.health import StoreHealth


@dataclass
class Queue:
    """What a database tells of itself."""

    pending: int = 0
    pending_since: float | None = None
    last_commit: Commit | None = None


def trouble(queue: Queue, now: float = 100.0) -> str | None:
    return StoreHealth(queue, slow_after_s=1.0, clock=lambda: now).trouble


@pytest.mark.parametrize(
    "queue",
    [
        pytest.param(Queue(), id="nothing happened yet"),
        pytest.param(Queue(3, 99.5), id="writes wait, and not for long"),
        pytest.param(Queue(3, 99.0), id="just as long as they may"),
        pytest.param(Queue(0, None, Commit(0.9, 99.9)), id="a commit took almost too long"),
        pytest.param(Queue(0, None, Commit(3.0, 95.0)), id="a slow commit was long ago"),
    ],
)
def test_a_store_that_keeps_up_is_no_trouble(queue: Queue) -> None:
    assert trouble(queue) is None


def test_a_write_that_waits_too_long_is_trouble_and_the_text_says_how_many_wait() -> None:
    assert trouble(Queue(7, 97.5)) == "7 writes wait for the disk, the oldest for 2.5 s"


def test_trouble_ends_when_the_write_is_done() -> None:
    queue = Queue(1, 90.0)
    assert trouble(queue) is not None
    queue.pending, queue.pending_since = 0, None
    assert trouble(queue) is None


def test_a_slow_commit_is_held_against_the_disk_for_five_times_the_limit_and_no_longer() -> None:
    queue = Queue(0, None, Commit(2.0, 100.0))
    assert trouble(queue, now=104.9) == "the last commit took 2.0 s"
    assert trouble(queue, now=105.0) is None


def test_a_quick_commit_makes_up_for_a_slow_one() -> None:
    assert trouble(Queue(0, None, Commit(0.01, 100.0)), now=100.1) is None
