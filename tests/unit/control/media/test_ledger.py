from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.media import wire
from control.media.ledger import RETRY_S, Command, MediaLedger, Purpose
from control.media.wire import CommandError, HeldSession, SessionState
from control.pbx.media import (
    LearnedSource,
    MediaClosed,
    MediaFailed,
    MediaFailure,
    MediaInput,
    MediaInterrupted,
    MediaLatched,
    MediaLost,
    MediaOpened,
    MediaSpec,
    MediaUpdated,
    RestoredSession,
)
from control.pbx.records import LegName
from control.sip.address import Address
from sippbx.media.v1 import session_pb2
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


def held(*specs: MediaSpec, generation: int | None = None) -> dict[str, HeldSession]:
    """What a data plane holds, under the generations of the specs or under another."""
    sessions = [
        session_pb2.Session(
            generation=spec.generation if generation is None else generation, spec=wire.spec_to_wire(spec)
        )
        for spec in specs
    ]
    return {session.spec.session_id: wire.held_from_wire(session) for session in sessions}


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
    ledger.connected({}, same_instance=False, now=1.0)
    [command] = ledger.take(9)
    assert (command.spec, command.first_port) == (media_spec("s1", 1), 10_000)


def test_an_update_of_a_session_that_the_data_plane_does_not_know_is_its_loss() -> None:
    ledger = ledger_with("s1")
    ledger.update(media_spec("s1", 2), 0.0)
    failed, lost = settle_all(ledger, GONE)
    assert (type(failed), type(lost)) == (MediaFailed, MediaLost)
    assert ledger.close("s1", 0.5) == [MediaClosed("s1", None, 1, 0.5)]


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
    ledger.connected(held(media_spec("s1")), same_instance=True, now=3.0)
    assert wanted(ledger.take(9)) == [(Purpose.DISCARD, "s1")]
    assert len(ledger) == 0


def test_sessions_missing_from_the_same_instance_are_made_again() -> None:
    ledger = ledger_with("s1", "s2")
    ledger.disconnected(1.0)
    ledger.connected(held(media_spec("s2")), same_instance=True, now=2.0)
    assert wanted(ledger.take(9)) == [(Purpose.RESTORE, "s1")]


def test_on_a_new_instance_sessions_are_made_before_the_updates_on_their_way() -> None:
    ledger = ledger_with("s1")
    ledger.update(media_spec("s1", 2), 0.5)
    ledger.take(9)
    ledger.disconnected(1.0)
    ledger.connected({}, same_instance=False, now=1.5)
    commands = ledger.take(9)
    assert wanted(commands) == [(Purpose.RESTORE, "s1"), (Purpose.UPDATE, "s1")]
    assert [command.spec.generation for command in commands if command.spec] == [1, 2]
    answers = [answer for command in commands for answer in ledger.settle(command.command_id, DONE, 1.75)[1]]
    assert answers == [MediaInterrupted("s1", 1, 0.75), MediaUpdated("s1", 2, ())]


def test_a_new_instance_is_asked_for_the_statistics_of_what_was_to_be_closed() -> None:
    ledger = ledger_with("s1", "s2")
    for session_id in ("s1", "s2"):
        ledger.close(session_id, 0.5)
    ledger.take(9)
    ledger.connected({}, same_instance=False, now=1.0)
    remembered, forgotten = ledger.take(9)
    assert wanted([remembered, forgotten]) == [(Purpose.CLOSE, "s1"), (Purpose.CLOSE, "s2")]
    assert ledger.settle(remembered.command_id, DONE, 1.1)[1] == [MediaClosed("s1", ())]
    assert ledger.settle(forgotten.command_id, GONE, 1.1)[1] == [MediaClosed("s2", None)]


def test_a_session_being_closed_is_not_discarded_beside_it() -> None:
    ledger = ledger_with("s1")
    ledger.close("s1", 0.5)
    ledger.take(9)
    ledger.connected(held(media_spec("s1")), same_instance=True, now=1.0)
    assert wanted(ledger.take(9)) == [(Purpose.CLOSE, "s1")]


def test_restoring_is_tried_again_until_the_session_is_lost() -> None:
    ledger = ledger_with("s1")
    ledger.disconnected(1.0)
    ledger.connected({}, same_instance=False, now=2.0)
    assert settle_all(ledger, REFUSED, 2.0) == []
    assert ledger.take(9) == []
    assert ledger.next_deadline() == 2.0 + RETRY_S
    assert ledger.handle_timer(2.0 + RETRY_S) == (False, [])
    assert settle_all(ledger, REFUSED, 10.99) == [MediaLost("s1", "no such address")]
    assert len(ledger) == 0
    assert ledger.handle_timer(100.0) == (False, [])


def test_a_session_closed_between_two_tries_is_not_restored() -> None:
    ledger = ledger_with("s1")
    ledger.connected({}, same_instance=False, now=2.0)
    settle_all(ledger, REFUSED, 2.0)
    ledger.close("s1", 2.1)
    assert settle_all(ledger, GONE, 2.1) == [MediaClosed("s1", None)]
    ledger.handle_timer(2.0 + RETRY_S)
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
    ledger.connected(held(media_spec("s1")), same_instance=True, now=1.0 + LOST_S - 0.1)
    assert ledger.handle_timer(100.0) == (False, [])
    assert ledger.standing() == {"s1"}


def test_abandoning_answers_everything() -> None:
    ledger = ledger_with("s1", "s2")
    ledger.update(media_spec("s1", 2), 0.0)
    ledger.close("s2", 0.0)
    ledger.open(media_spec("s3"), 0.0)
    assert [type(answer) for answer in ledger.abandon("stop", 0.0)] == [MediaFailed, MediaClosed, MediaFailed]
    assert ledger.next_deadline() is None


# ------------------------------------------------------------------------------------- sessions of an earlier process

FAR_END = Address("192.0.2.1", 4000)


def restored(
    session_id: str = "s1", generation: int = 3, *, learned: tuple[LearnedSource, ...] = ()
) -> RestoredSession:
    return RestoredSession(media_spec(session_id, generation, remote=FAR_END), 10_008, learned, 2, 1.5)


def ledger_that_restores(*sessions: RestoredSession) -> MediaLedger:
    ledger = ledger_with()
    ledger.restore(sessions, 0.0)
    return ledger


def source(port: int, signalled: Address = FAR_END) -> LearnedSource:
    return LearnedSource(LegName.CALLER, 0, signalled, Address("192.0.2.1", port), None)


def test_a_session_that_is_held_as_wanted_is_left_alone() -> None:
    ledger = ledger_that_restores(restored())
    ledger.connected(held(restored().spec), same_instance=False, now=1.0)
    assert ledger.take(9) == []
    ledger.close("s1", 5.0)
    assert settle_all(ledger, DONE, 5.0) == [MediaClosed("s1", (), 2, 1.5)]


def test_a_session_that_is_held_in_an_older_state_is_told_the_wanted_one() -> None:
    ledger = ledger_that_restores(restored(generation=3))
    ledger.connected(held(media_spec("s1", 2)), same_instance=False, now=1.0)
    [command] = ledger.take(9)
    assert (command.purpose, command.spec, command.generation) == (Purpose.AMEND, restored().spec, 3)
    assert ledger.settle(command.command_id, DONE, 1.0)[1] == []


def test_a_state_that_nobody_journaled_is_taken_back_and_generations_go_on_from_it() -> None:
    ledger = ledger_that_restores(restored(generation=3))
    ledger.connected(held(media_spec("s1", 4)), same_instance=False, now=1.0)
    [command] = ledger.take(9)
    assert (command.purpose, command.spec, command.generation) == (Purpose.AMEND, restored().spec, 5)
    ledger.settle(command.command_id, DONE, 1.0)
    ledger.update(media_spec("s1", 4), 2.0)
    [update] = ledger.take(9)
    assert update.generation == 6
    assert ledger.settle(update.command_id, DONE, 2.0)[1] == [MediaUpdated("s1", 4, ())]


def test_the_same_state_under_a_later_generation_is_left_alone_and_counted_on_from() -> None:
    ledger = ledger_that_restores(restored(generation=3))
    ledger.connected(held(restored().spec, generation=7), same_instance=False, now=1.0)
    assert ledger.take(9) == []
    ledger.update(media_spec("s1", 4), 2.0)
    assert [command.generation for command in ledger.take(9)] == [8]


def test_a_session_that_is_not_held_is_made_again_on_its_ports_with_its_sources() -> None:
    stale = LearnedSource(LegName.CALLEE, 0, Address("192.0.2.9", 1), Address("192.0.2.9", 2), None)
    ledger = ledger_that_restores(restored(learned=(source(4444), stale)))
    ledger.connected({}, same_instance=False, now=1.0)
    [command] = ledger.take(9)
    assert (command.purpose, command.first_port, command.learned) == (Purpose.RESTORE, 10_008, (source(4444),))
    assert ledger.settle(command.command_id, DONE, 1.25)[1] == [MediaInterrupted("s1", 3, 2.75)]


def test_what_an_earlier_process_had_and_nobody_restores_is_deleted() -> None:
    ledger = ledger_that_restores(restored())
    ledger.connected(held(restored().spec, media_spec("s2")), same_instance=False, now=1.0)
    assert wanted(ledger.take(9)) == [(Purpose.DISCARD, "s2")]


def test_a_restored_session_can_be_updated_before_the_data_plane_is_there() -> None:
    ledger = ledger_that_restores(restored(generation=3))
    assert ledger.update(media_spec("s1", 4), 0.1) == []
    ledger.connected(held(media_spec("s1", 5)), same_instance=False, now=1.0)
    [update] = ledger.take(9)
    assert (update.purpose, update.generation) == (Purpose.UPDATE, 6)


def test_a_restored_session_can_be_closed_before_the_data_plane_is_there() -> None:
    ledger = ledger_that_restores(restored())
    assert ledger.close("s1", 0.1) == []
    ledger.connected(held(restored().spec), same_instance=False, now=1.0)
    assert wanted(ledger.take(9)) == [(Purpose.CLOSE, "s1")]


def test_restored_sessions_are_lost_once_when_there_is_no_data_plane() -> None:
    ledger = ledger_that_restores(restored("s1"), restored("s2"))
    assert ledger.next_deadline() == LOST_S
    _, answers = ledger.handle_timer(LOST_S)
    assert [type(answer) for answer in answers] == [MediaLost, MediaLost]
    assert ledger.close("s1", LOST_S + 1) == [MediaClosed("s1", None, 2, 1.5)]
    ledger.connected({}, same_instance=False, now=20.0)
    assert ledger.take(9) == []


def test_an_update_waits_for_the_session_that_is_being_made_again() -> None:
    ledger = ledger_that_restores(restored())
    ledger.update(media_spec("s1", 4), 0.9)
    ledger.connected({}, same_instance=False, now=1.0)
    restore, update = ledger.take(9)
    assert ledger.settle(restore.command_id, REFUSED, 1.0)[1] == []
    assert ledger.settle(update.command_id, GONE, 1.0)[1] == []
    ledger.handle_timer(1.0 + RETRY_S)
    commands = ledger.take(9)
    assert wanted(commands) == [(Purpose.RESTORE, "s1"), (Purpose.UPDATE, "s1")]
    answers = [answer for command in commands for answer in ledger.settle(command.command_id, DONE, 1.5)[1]]
    assert answers == [MediaInterrupted("s1", 3, 3.0), MediaUpdated("s1", 4, ())]


def test_an_update_that_waits_is_answered_also_when_the_connection_is_cut_meanwhile() -> None:
    ledger = ledger_that_restores(restored())
    ledger.update(media_spec("s1", 4), 0.9)
    ledger.connected({}, same_instance=False, now=1.0)
    restore, update = ledger.take(9)
    ledger.settle(restore.command_id, REFUSED, 1.0)
    ledger.settle(update.command_id, GONE, 1.0)
    ledger.disconnected(1.1)
    ledger.connected({}, same_instance=True, now=1.2)
    assert wanted(ledger.take(9)) == [(Purpose.RESTORE, "s1"), (Purpose.UPDATE, "s1")]


# ----------------------------------------------------------------------------------------------- sources, interruptions


def test_a_latched_source_is_told_once() -> None:
    ledger = ledger_with("s1")
    assert ledger.latched("s1", source(4444)) == [MediaLatched("s1", source(4444))]
    assert ledger.latched("s1", source(4444)) == []
    assert ledger.latched("s1", source(4445)) == [MediaLatched("s1", source(4445))]
    assert ledger.latched("unknown", source(4444)) == []


def test_what_was_learned_is_forgotten_when_the_far_end_moves_even_if_it_moves_back() -> None:
    ledger = ledger_that_restores(restored(learned=(source(4444),)))
    ledger.connected(held(restored().spec), same_instance=False, now=1.0)
    for generation, remote in ((4, Address("192.0.2.1", 6000)), (5, FAR_END)):
        ledger.update(media_spec("s1", generation, remote=remote), 1.0)
        settle_all(ledger)
    ledger.connected({}, same_instance=False, now=2.0)
    assert [command.learned for command in ledger.take(9)] == [()]


def test_a_cut_connection_to_a_data_plane_that_goes_on_is_no_interruption() -> None:
    ledger = ledger_with("s1")
    ledger.disconnected(1.0)
    ledger.connected(held(media_spec("s1")), same_instance=True, now=3.0)
    assert ledger.take(9) == []
    ledger.close("s1", 4.0)
    assert settle_all(ledger) == [MediaClosed("s1", ())]


def test_the_time_without_a_relay_is_summed_up_from_cut_to_restored() -> None:
    ledger = ledger_with("s1")
    for number, cut in enumerate((1.0, 5.0), start=1):
        ledger.disconnected(cut)
        ledger.connected({}, same_instance=False, now=cut + 0.5)
        assert settle_all(ledger, DONE, cut + 0.75) == [MediaInterrupted("s1", number, 0.75 * number)]
    ledger.close("s1", 9.0)
    assert settle_all(ledger) == [MediaClosed("s1", (), 2, 1.5)]


def test_a_session_that_was_made_again_without_its_answer_coming_through_was_interrupted_all_the_same() -> None:
    ledger = ledger_with("s1")
    ledger.disconnected(now=10.0)
    ledger.connected({}, same_instance=False, now=12.0)
    (restore,) = ledger.take(10)
    assert restore.purpose is Purpose.RESTORE
    ledger.disconnected(now=13.0)
    ledger.connected(held(media_spec("s1")), same_instance=True, now=13.5)
    ledger.close("s1", now=20.0)
    (closed,) = settle_all(ledger, now=20.0)
    assert isinstance(closed, MediaClosed)
    assert (closed.interruptions, closed.gap_s) == (1, 3.5)


def test_a_session_closed_while_it_has_no_relay_was_interrupted_until_then() -> None:
    ledger = ledger_with("s1")
    ledger.disconnected(1.0)
    ledger.close("s1", 1.5)
    ledger.connected({}, same_instance=False, now=2.0)
    assert settle_all(ledger, DONE, 2.0) == [MediaClosed("s1", (), 1, 0.5)]


def test_a_relay_that_failed_and_came_back_by_itself_is_an_interruption_of_all_that_stand() -> None:
    ledger = ledger_with("s1")
    ledger.open(media_spec("s2"), 0.0)
    assert ledger.interrupted(0.2) == [MediaInterrupted("s1", 1, 0.2)]


def test_the_tombstone_of_a_session_that_was_given_up_is_asked_for_its_statistics() -> None:
    ledger = ledger_with("s1")
    ledger.connected(held(media_spec("s1")), same_instance=True, now=0.0)
    assert ledger.session_ended("s1", "worker lost", 1.0) == [MediaLost("s1", "worker lost")]
    assert ledger.close("s1", 1.5) == []
    assert settle_all(ledger) == [MediaClosed("s1", (), 1, 0.5)]


def test_an_update_that_the_data_plane_could_not_carry_out_is_told_again() -> None:
    ledger = ledger_with("s1")
    ledger.connected(held(media_spec("s1")), same_instance=True, now=0.0)
    ledger.update(media_spec("s1", 2), 0.0)
    busy = CommandError("internal", MediaFailure.UNAVAILABLE, "it erred")
    assert [type(answer) for answer in settle_all(ledger, busy)] == [MediaFailed]
    ledger.handle_timer(RETRY_S)
    [command] = ledger.take(9)
    assert (command.purpose, command.generation) == (Purpose.AMEND, 2)


def test_an_update_without_an_answer_is_told_again_after_the_reconnect() -> None:
    ledger = ledger_with("s1")
    ledger.update(media_spec("s1", 2, remote=FAR_END), 0.0)
    ledger.take(9)
    ledger.handle_timer(TIMEOUT_S)
    ledger.disconnected(TIMEOUT_S)
    ledger.connected(held(media_spec("s1")), same_instance=True, now=3.0)
    assert [(command.purpose, command.generation) for command in ledger.take(9)] == [(Purpose.AMEND, 2)]


STEPS = st.lists(
    st.sampled_from(
        ["open", "update", "close", "take", "answer", "refuse", "gone", "cut", "same", "new", "second", "long"]
    ),
    max_size=40,
)


@given(STEPS)
def test_each_wish_gets_exactly_one_answer_and_each_session_is_lost_at_most_once(steps: list[str]) -> None:
    ledger = ledger_that_restores(restored("s0"))
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
                there = held(*(media_spec(name) for name in present))
                ledger.connected(there, same_instance=step == "same", now=now)
            case "second" | "long":
                now += 1.0 if step == "second" else LOST_S
                answers += ledger.handle_timer(now)[1]
            case _:
                pass
    answers += ledger.abandon("the end", now)
    heard, lost = counted(answers)
    assert heard == wishes
    assert all(count == 1 for count in lost.values())


def counted(answers: list[MediaInput]) -> tuple[Counter[tuple[str, str, int]], Counter[str]]:
    """Answers to wishes, and losses by session."""
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
            case _:
                assert isinstance(answer, MediaInterrupted)
    return heard, lost
