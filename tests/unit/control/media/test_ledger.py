from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.media.ledger import RESTORE_RETRY_S, Command, MediaLedger, Purpose
from control.media.wire import CommandError, SessionState
from control.pbx.media import (
    MediaClosed,
    MediaFailed,
    MediaFailure,
    MediaInput,
    MediaLost,
    MediaOpened,
    MediaUpdated,
)
from tests.harness.media_specs import media_spec

TIMEOUT_S = 2.0
LOST_S = 10.0
DONE = SessionState(first_port=10_000, ports=(), streams=())
REFUSED = CommandError("bind_failed", MediaFailure.REFUSED, "no such address")
GONE = CommandError("unknown_session", MediaFailure.REFUSED, "no such session", session_gone=True)

OUTCOMES: dict[str, SessionState | CommandError] = {"answer": DONE, "refuse": REFUSED, "gone": GONE}


def ledger_with(*session_ids: str, max_pending: int = 100) -> MediaLedger:
    ledger = MediaLedger(command_timeout_s=TIMEOUT_S, lost_timeout_s=LOST_S, max_pending=max_pending)
    for session_id in session_ids:
        ledger.open(media_spec(session_id), 0.0)
        assert settle_all(ledger) == [MediaOpened(session_id, ())]
    return ledger


def settle_all(ledger: MediaLedger, outcome: SessionState | CommandError = DONE, now: float = 0.0) -> list[MediaInput]:
    return [answer for command in ledger.take(1000) for answer in ledger.settle(command.command_id, outcome, now)[1]]


def wanted(commands: list[Command]) -> list[tuple[Purpose, str]]:
    return [(command.purpose, command.session_id) for command in commands]


def test_commands_are_taken_in_order_and_once() -> None:
    ledger = ledger_with()
    for session_id in ("s1", "s2", "s3"):
        ledger.open(media_spec(session_id), 0.0)
    assert wanted(ledger.take(2)) == [(Purpose.OPEN, "s1"), (Purpose.OPEN, "s2")]
    assert wanted(ledger.take(2)) == [(Purpose.OPEN, "s3")]
    assert ledger.take(2) == []


def test_a_session_cannot_be_opened_twice() -> None:
    ledger = ledger_with("s1")
    [failed] = ledger.open(media_spec("s1"), 0.0)
    assert isinstance(failed, MediaFailed)


def test_beyond_the_bound_opens_and_updates_fail_and_closes_do_not() -> None:
    ledger = ledger_with("s1", max_pending=1)
    assert ledger.update(media_spec("s1", 2), 0.0) == []
    for answers in (ledger.update(media_spec("s1", 3), 0.0), ledger.open(media_spec("s2"), 0.0)):
        [failed] = answers
        assert isinstance(failed, MediaFailed)
        assert failed.failure is MediaFailure.UNAVAILABLE
    assert ledger.close("s1", 0.0) == []
    assert wanted(ledger.take(9)) == [(Purpose.UPDATE, "s1"), (Purpose.CLOSE, "s1")]


def test_a_refused_update_leaves_the_session_with_its_confirmed_state() -> None:
    ledger = ledger_with("s1")
    ledger.update(media_spec("s1", 2), 0.0)
    [failed] = settle_all(ledger, REFUSED)
    assert failed == MediaFailed("s1", 2, MediaFailure.REFUSED, "no such address")
    ledger.connected((), same_instance=False, now=1.0)
    [command] = ledger.take(9)
    assert (command.spec, command.first_port) == (media_spec("s1", 1), 10_000)


def test_an_update_of_a_session_that_the_data_plane_does_not_know_is_its_loss() -> None:
    ledger = ledger_with("s1")
    ledger.update(media_spec("s1", 2), 0.0)
    failed, lost = settle_all(ledger, GONE)
    assert (type(failed), type(lost)) == (MediaFailed, MediaLost)
    assert ledger.close("s1", 0.0) == [MediaClosed("s1", None)]


@pytest.mark.parametrize("verb", ["open", "update", "close"])
def test_what_is_not_answered_in_time_is_answered_here_and_late_results_are_ignored(verb: str) -> None:
    ledger = ledger_with("s1")
    match verb:
        case "open":
            ledger.open(media_spec("s2"), 1.0)
        case "update":
            ledger.update(media_spec("s1", 2), 1.0)
        case _:
            ledger.close("s1", 1.0)
    [command] = ledger.take(9)
    assert ledger.next_deadline() == 1.0 + TIMEOUT_S
    assert ledger.handle_timer(2.9) == (False, [])
    unanswered, answers = ledger.handle_timer(3.0)
    assert unanswered
    assert [type(answer) for answer in answers] == [MediaClosed if verb == "close" else MediaFailed]
    assert ledger.settle(command.command_id, DONE, 3.1) == (None, [])
    assert ledger.next_deadline() is None


def test_a_session_opened_too_late_is_not_held() -> None:
    ledger = ledger_with()
    ledger.open(media_spec("s1"), 0.0)
    ledger.take(9)
    ledger.handle_timer(TIMEOUT_S)
    ledger.connected({"s1"}, same_instance=True, now=3.0)
    assert wanted(ledger.take(9)) == [(Purpose.DISCARD, "s1")]
    assert len(ledger) == 0


def test_sessions_missing_from_the_same_instance_are_made_again() -> None:
    ledger = ledger_with("s1", "s2")
    ledger.disconnected(1.0)
    assert ledger.connected({"s2"}, same_instance=True, now=2.0) == []
    assert wanted(ledger.take(9)) == [(Purpose.RESTORE, "s1")]


def test_on_a_new_instance_sessions_are_made_before_the_updates_on_their_way() -> None:
    ledger = ledger_with("s1")
    ledger.update(media_spec("s1", 2), 0.5)
    ledger.take(9)
    ledger.disconnected(1.0)
    ledger.connected((), same_instance=False, now=1.5)
    commands = ledger.take(9)
    assert wanted(commands) == [(Purpose.RESTORE, "s1"), (Purpose.UPDATE, "s1")]
    assert [command.spec.generation for command in commands if command.spec] == [1, 2]
    answers = [answer for command in commands for answer in ledger.settle(command.command_id, DONE, 1.6)[1]]
    assert answers == [MediaUpdated("s1", 2, ())]


def test_on_a_new_instance_what_was_to_be_closed_is_gone_without_statistics() -> None:
    ledger = ledger_with("s1")
    ledger.close("s1", 0.5)
    ledger.take(9)
    assert ledger.connected((), same_instance=False, now=1.0) == [MediaClosed("s1", None)]
    assert ledger.take(9) == []


def test_a_session_being_closed_is_not_discarded_beside_it() -> None:
    ledger = ledger_with("s1")
    ledger.close("s1", 0.5)
    ledger.take(9)
    ledger.connected({"s1"}, same_instance=True, now=1.0)
    assert wanted(ledger.take(9)) == [(Purpose.CLOSE, "s1")]


def test_restoring_is_tried_again_until_the_session_is_lost() -> None:
    ledger = ledger_with("s1")
    ledger.disconnected(1.0)
    ledger.connected((), same_instance=False, now=2.0)
    assert settle_all(ledger, REFUSED, 2.0) == []
    assert ledger.take(9) == []
    assert ledger.next_deadline() == 2.0 + RESTORE_RETRY_S
    assert ledger.handle_timer(2.0 + RESTORE_RETRY_S) == (False, [])
    assert settle_all(ledger, REFUSED, 10.99) == [MediaLost("s1", "no such address")]
    assert len(ledger) == 0


def test_a_session_closed_between_two_tries_is_not_restored() -> None:
    ledger = ledger_with("s1")
    ledger.connected((), same_instance=False, now=2.0)
    settle_all(ledger, REFUSED, 2.0)
    ledger.close("s1", 2.1)
    assert settle_all(ledger, GONE, 2.1) == [MediaClosed("s1", None)]
    ledger.handle_timer(2.0 + RESTORE_RETRY_S)
    assert ledger.take(9) == []


def test_sessions_are_lost_once_when_the_data_plane_stays_away() -> None:
    ledger = ledger_with("s1", "s2")
    ledger.disconnected(1.0)
    ledger.disconnected(5.0)
    assert ledger.next_deadline() == 1.0 + LOST_S
    _, answers = ledger.handle_timer(1.0 + LOST_S)
    assert [type(answer) for answer in answers] == [MediaLost, MediaLost]
    assert ledger.handle_timer(100.0) == (False, [])
    assert ledger.next_deadline() is None


def test_a_data_plane_that_returns_in_time_costs_no_session() -> None:
    ledger = ledger_with("s1")
    ledger.disconnected(1.0)
    ledger.connected({"s1"}, same_instance=True, now=1.0 + LOST_S - 0.1)
    assert ledger.handle_timer(100.0) == (False, [])
    assert ledger.standing() == {"s1"}


def test_abandoning_answers_everything() -> None:
    ledger = ledger_with("s1", "s2")
    ledger.update(media_spec("s1", 2), 0.0)
    ledger.close("s2", 0.0)
    ledger.open(media_spec("s3"), 0.0)
    assert [type(answer) for answer in ledger.abandon("stop")] == [MediaFailed, MediaClosed, MediaFailed]
    assert ledger.next_deadline() is None


STEPS = st.lists(
    st.sampled_from(
        ["open", "update", "close", "take", "answer", "refuse", "gone", "cut", "same", "new", "second", "long"]
    ),
    max_size=40,
)


@given(STEPS)
def test_each_wish_gets_exactly_one_answer_and_each_session_is_lost_at_most_once(steps: list[str]) -> None:
    ledger = ledger_with()
    wishes: Counter[tuple[str, str, int]] = Counter()
    answers: list[MediaInput] = []
    taken: list[Command] = []
    now, opened, generation = 0.0, 0, 1
    for step in steps:
        session_id = f"s{opened}"
        match step:
            case "open":
                opened, generation = opened + 1, 1
                wishes["set", f"s{opened}", 1] += 1
                answers += ledger.open(media_spec(f"s{opened}"), now)
            case "update":
                generation += 1
                wishes["set", session_id, generation] += 1
                answers += ledger.update(media_spec(session_id, generation), now)
            case "close":
                wishes["close", session_id, 0] += 1
                answers += ledger.close(session_id, now)
            case "take":
                taken += ledger.take(2)
            case "answer" | "refuse" | "gone" if taken:
                outcome = OUTCOMES[step]
                answers += ledger.settle(taken.pop(0).command_id, outcome, now)[1]
            case "cut":
                ledger.disconnected(now)
            case "same" | "new":
                present = ledger.standing() if step == "same" else set()
                answers += ledger.connected(present, same_instance=step == "same", now=now)
            case "second" | "long":
                now += 1.0 if step == "second" else LOST_S
                answers += ledger.handle_timer(now)[1]
            case _:
                pass
    answers += ledger.abandon("the end")
    heard: Counter[tuple[str, str, int]] = Counter()
    lost: Counter[str] = Counter()
    for answer in answers:
        match answer:
            case MediaOpened():
                heard["set", answer.session_id, 1] += 1
            case MediaUpdated() | MediaFailed():
                heard["set", answer.session_id, answer.generation] += 1
            case MediaClosed():
                heard["close", answer.session_id, 0] += 1
            case MediaLost():
                lost[answer.session_id] += 1
    assert heard == wishes
    assert all(count == 1 for count in lost.values())
