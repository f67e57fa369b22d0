from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.events.backoff import RETRY_AFTER_MOST_S, BackOff, Brake, retry_after_s

NOW = datetime(2026, 3, 1, 9, 30, tzinfo=UTC)
BACK_OFF = BackOff(first_s=1.0, most_s=60.0)


def test_the_delay_doubles_with_each_failure_up_to_its_bound() -> None:
    assert [BACK_OFF.delay_s(failures, 0.0) for failures in range(1, 9)] == [1, 2, 4, 8, 16, 32, 60, 60]


def test_chance_takes_away_up_to_a_half() -> None:
    assert BACK_OFF.delay_s(4, 0.5) == 6
    assert BACK_OFF.delay_s(4, 0.999) == pytest.approx(4, abs=0.01)


def test_what_the_receiver_asked_for_is_the_least() -> None:
    assert BACK_OFF.delay_s(1, 0.0, retry_after_s=30) == 30
    assert BACK_OFF.delay_s(6, 0.0, retry_after_s=0) == 32


def test_a_receiver_cannot_ask_for_more_than_an_hour() -> None:
    assert BACK_OFF.delay_s(1, 0.0, retry_after_s=1e9) == RETRY_AFTER_MOST_S == 3600


@given(st.integers(1, 10**9), st.floats(0, 1, exclude_max=True), st.none() | st.floats(0, 1e12))
def test_no_delay_is_longer_than_the_longest(failures: int, draw: float, asked: float | None) -> None:
    assert 0.5 <= BACK_OFF.delay_s(failures, draw, asked) <= BACK_OFF.longest_s


@pytest.mark.rfc("9110", "10.2.3")
@pytest.mark.parametrize(
    ("field", "seconds"),
    [
        ("120", 120),
        (" 0 ", 0),
        ("Sun, 01 Mar 2026 09:31:30 GMT", 90),
        ("Sun, 01 Mar 2026 09:31:30 -0000", 90),
        ("Sun, 01 Mar 2026 08:00:00 GMT", 0),
        (None, None),
        ("", None),
        ("soon", None),
        ("-5", None),
        ("1.5", None),
        ("\u0663", None),
        ("9" * 5000, None),
    ],
)
def test_retry_after_is_seconds_or_a_date(field: str | None, seconds: float | None) -> None:
    assert retry_after_s(field, NOW) == seconds


@given(st.text())
def test_no_retry_after_makes_trouble(field: str) -> None:
    seconds = retry_after_s(field, NOW)
    assert seconds is None or seconds >= 0


@given(st.integers(0, 10**6))
def test_a_date_is_as_far_away_as_it_says(seconds: int) -> None:
    date = f"{NOW + timedelta(seconds=seconds):%a, %d %b %Y %H:%M:%S} GMT"
    assert retry_after_s(date, NOW) == seconds


def braked(failures: int) -> Brake:
    brake = Brake(patience=3, pauses=BackOff(first_s=1.0, most_s=4.0))
    for _ in range(failures):
        brake.failed(100.0, 0.0)
    return brake


def test_a_few_failures_leave_a_receiver_all_its_room() -> None:
    brake = braked(2)
    assert (brake.on, brake.pause_s(100.0), brake.room(100.0, 8)) == (False, 0, 8)


def test_a_receiver_that_keeps_failing_gets_pauses_and_then_one_event_at_a_time() -> None:
    brake = braked(3)
    assert (brake.on, brake.pause_s(100.25), brake.room(100.25, 8)) == (True, 0.75, 0)
    assert (brake.pause_s(101.0), brake.room(101.0, 8)) == (0, 1)


def test_pauses_grow_with_the_failures_up_to_their_bound() -> None:
    assert [braked(failures).pause_s(100.0) for failures in (3, 4, 5, 6, 50)] == [1, 2, 4, 4, 4]


def test_one_success_lets_everything_go_again() -> None:
    brake = braked(50)
    brake.succeeded()
    assert (brake.on, brake.pause_s(100.0), brake.room(100.0, 8)) == (False, 0, 8)
    brake.failed(100.0, 0.0)
    assert not brake.on
