"""The port pool: blocks whole or not at all, the least recently used first, rest before reuse."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.ports import BlockUnavailableError, PortBlock, PortPool, PortsExhaustedError

REST_S = 10.0


def pool(blocks: int = 3) -> PortPool:
    return PortPool(10_000, 10_000 + 8 * blocks - 1, 8, REST_S)


def test_the_default_range_makes_1250_blocks() -> None:
    assert PortPool(10_000, 20_000, 8, REST_S).counts(0.0).total == 1250


def test_a_block_of_eight_has_the_documented_offsets() -> None:
    block = PortBlock(10_000, 8)
    assert [block.caller_port(0), block.caller_port(1), block.callee_port(0), block.callee_port(1)] == [
        10_000,
        10_002,
        10_004,
        10_006,
    ]
    assert block.lines == 2


@pytest.mark.parametrize(
    ("first", "last", "size", "problem"),
    [
        (10_000, 10_100, 6, "multiple of 4"),
        (10_000, 10_100, 0, "multiple of 4"),
        (10_001, 10_100, 8, "odd"),
        (10_000, 10_006, 8, "hold no block"),
    ],
)
def test_a_range_that_makes_no_blocks_is_refused_with_the_reason(
    first: int, last: int, size: int, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        PortPool(first, last, size, REST_S)


def test_a_freed_block_rests_before_it_is_given_again() -> None:
    ports = pool(1)
    block = ports.take(0.0)
    ports.release(block, 100.0)
    with pytest.raises(PortsExhaustedError, match="1 are resting"):
        ports.take(100.0 + REST_S - 0.001)
    assert ports.take(100.0 + REST_S) == block


def test_the_block_that_has_been_free_the_longest_goes_first() -> None:
    ports = pool(3)
    first, second = ports.take(0.0), ports.take(0.0)
    ports.release(second, 1.0)
    ports.release(first, 2.0)
    later = 2.0 + REST_S
    assert [ports.take(later).first for _ in range(3)] == [10_016, second.first, first.first]


def test_a_block_put_back_is_free_at_once() -> None:
    ports = pool(1)
    ports.put_back(ports.take(0.0))
    assert ports.take(0.0).first == 10_000


def test_a_named_block_is_given_exactly() -> None:
    assert pool().take(0.0, 10_008) == PortBlock(10_008, 8)


def test_a_named_block_is_refused_with_the_reason() -> None:
    ports = pool()
    block = ports.take(0.0, 10_008)
    with pytest.raises(BlockUnavailableError, match="in use"):
        ports.take(0.0, 10_008)
    ports.release(block, 0.0)
    with pytest.raises(BlockUnavailableError, match="resting"):
        ports.take(1.0, 10_008)
    with pytest.raises(BlockUnavailableError, match="does not begin a block"):
        ports.take(1.0, 10_004)


def test_releasing_twice_is_a_bug_that_shows() -> None:
    ports = pool()
    block = ports.take(0.0)
    ports.release(block, 0.0)
    with pytest.raises(ValueError, match="not in use"):
        ports.release(block, 0.0)


@given(st.lists(st.tuples(st.sampled_from(["take", "release", "put_back"]), st.floats(0, 6)), max_size=60))
def test_whatever_happens_the_states_add_up_and_no_block_is_given_twice(steps: list[tuple[str, float]]) -> None:
    ports = pool(4)
    taken: list[PortBlock] = []
    released_at: dict[PortBlock, float] = {}
    now = 0.0
    for step, passed in steps:
        now += passed
        if step == "take":
            try:
                block = ports.take(now)
            except PortsExhaustedError:
                assert ports.counts(now).free == 0
            else:
                assert block not in taken
                assert now - released_at.get(block, -REST_S) >= REST_S
                taken.append(block)
        elif taken:
            block = taken.pop(0)
            if step == "release":
                ports.release(block, now)
                released_at[block] = now
            else:
                ports.put_back(block)
                released_at.pop(block, None)
        counts = ports.counts(now)
        assert counts.in_use == len(taken)
        assert counts.in_use + counts.resting + counts.free == counts.total
