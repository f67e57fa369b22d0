"""The supervisor's arithmetic; what it does with processes is in tests/integration/test_supervisor.py."""

import signal

from hypothesis import given
from hypothesis import strategies as st

from sippbx.runtime.supervisor import RestartCap, exit_code


def test_cap_refuses_one_restart_more_than_its_limit() -> None:
    cap = RestartCap(3, 60.0)
    assert [cap.allows(now) for now in (1.0, 2.0, 3.0, 4.0)] == [True, True, True, False]


def test_cap_forgets_restarts_that_left_the_window() -> None:
    cap = RestartCap(2, 10.0)
    assert cap.allows(0.0)
    assert cap.allows(5.0)
    assert not cap.allows(9.9)
    assert cap.allows(10.0)
    assert not cap.allows(14.9)


def test_cap_of_zero_allows_no_restart() -> None:
    assert not RestartCap(0, 60.0).allows(1.0)


@given(st.lists(st.floats(0.001, 30.0), max_size=60), st.integers(1, 5))
def test_no_window_ever_holds_more_restarts_than_the_limit(gaps: list[float], limit: int) -> None:
    cap = RestartCap(limit, 60.0)
    now, allowed = 0.0, []
    for gap in gaps:
        now += gap
        if cap.allows(now):
            allowed.append(now)
    for start in allowed:
        assert sum(start <= each < start + 60.0 for each in allowed) <= limit


def test_exit_codes_are_those_of_a_shell() -> None:
    assert exit_code(3 << 8) == 3
    assert exit_code(signal.SIGKILL) == 137
