"""Limits on new calls."""

from control.pbx.admission import Admission
from control.pbx.records import Reason
from control.pbx.routing import Refusal
from control.sip.address import Address

ALICE = Address("192.0.2.1", 5060)
BOB = Address("2001:db8::2", 5060)


def admission(*, max_calls: int = 10, rate: float = 2.0, max_sources: int = 100) -> Admission:
    return Admission(max_calls=max_calls, calls_per_second=rate, retry_after_s=7, max_sources=max_sources)


def reason(refusal: Refusal | None) -> Reason | None:
    return refusal.reason if refusal else None


def test_a_call_within_all_limits_is_admitted() -> None:
    assert admission().admit(ALICE, 0, 100.0) is None


def test_a_refusal_is_503_with_the_time_to_retry_after() -> None:
    refusal = admission(max_calls=3).admit(ALICE, 3, 100.0)
    assert refusal == Refusal(503, Reason.CALL_LIMIT, "3 calls of at most 3", 7)


def test_the_last_call_below_the_limit_is_admitted() -> None:
    assert admission(max_calls=3).admit(ALICE, 2, 100.0) is None


def test_a_source_may_burst_one_second_s_worth_and_no_more() -> None:
    gate = admission(rate=2.0)
    assert [reason(gate.admit(ALICE, 0, 100.0)) for _ in range(3)] == [None, None, Reason.RATE_LIMIT]


def test_tokens_come_back_at_the_rate() -> None:
    gate = admission(rate=2.0)
    for _ in range(3):
        gate.admit(ALICE, 0, 100.0)
    assert reason(gate.admit(ALICE, 0, 100.25)) is Reason.RATE_LIMIT
    assert gate.admit(ALICE, 0, 100.5) is None
    assert reason(gate.admit(ALICE, 0, 100.5)) is Reason.RATE_LIMIT


def test_a_long_silence_saves_up_no_more_than_one_burst() -> None:
    gate = admission(rate=2.0)
    gate.admit(ALICE, 0, 100.0)
    assert [reason(gate.admit(ALICE, 0, 1000.0)) for _ in range(3)] == [None, None, Reason.RATE_LIMIT]


def test_a_rate_below_one_still_lets_one_call_through() -> None:
    gate = admission(rate=0.1)
    assert gate.admit(ALICE, 0, 100.0) is None
    assert reason(gate.admit(ALICE, 0, 105.0)) is Reason.RATE_LIMIT
    assert gate.admit(ALICE, 0, 110.0) is None


def test_sources_are_told_apart_by_address_and_not_by_port() -> None:
    gate = admission(rate=1.0)
    assert gate.admit(ALICE, 0, 100.0) is None
    assert reason(gate.admit(Address(ALICE.host, 9999), 0, 100.0)) is Reason.RATE_LIMIT
    assert gate.admit(BOB, 0, 100.0) is None


def test_a_call_refused_for_another_reason_counts_against_the_rate() -> None:
    gate = admission(max_calls=1, rate=1.0)
    assert reason(gate.admit(ALICE, 1, 100.0)) is Reason.CALL_LIMIT
    assert reason(gate.admit(ALICE, 0, 100.0)) is Reason.RATE_LIMIT


def test_the_quietest_source_is_forgotten_when_the_table_is_full() -> None:
    gate = admission(rate=1.0, max_sources=2)
    gate.admit(ALICE, 0, 100.0)
    gate.admit(BOB, 0, 100.0)
    gate.admit(ALICE, 0, 100.1)
    gate.admit(Address("192.0.2.3", 5060), 0, 100.2)
    assert reason(gate.admit(ALICE, 0, 100.3)) is Reason.RATE_LIMIT
    assert gate.admit(BOB, 0, 100.4) is None


def test_the_table_of_sources_does_not_grow_beyond_its_bound() -> None:
    gate = admission(max_sources=50)
    for number in range(500):
        gate.admit(Address(f"192.0.{number // 256}.{number % 256}", 5060), 0, 100.0)
    assert len(gate._buckets) == 50


def test_no_call_is_admitted_while_draining_and_all_are_again_afterwards() -> None:
    gate = admission()
    gate.draining = True
    assert reason(gate.admit(ALICE, 0, 100.0)) is Reason.DRAINING
    gate.draining = False
    assert gate.admit(ALICE, 0, 100.0) is None


def test_draining_is_the_reason_even_where_a_limit_is_reached_too() -> None:
    gate = admission(max_calls=1, rate=1.0)
    gate.draining = True
    assert [reason(gate.admit(ALICE, 5, 100.0)) for _ in range(2)] == [Reason.DRAINING, Reason.DRAINING]


def test_no_call_is_taken_whose_record_could_not_be_kept() -> None:
    trouble: list[str | None] = ["no space on the disk"]
    admission = Admission(max_calls=10, calls_per_second=10, retry_after_s=7, store_trouble=lambda: trouble[0])
    refused = admission.admit(None, 0, 0.0)
    assert refused is not None
    assert (refused.status, refused.reason, refused.retry_after_s) == (503, Reason.STORE_UNAVAILABLE, 7)
    assert refused.detail == "no space on the disk"
    trouble[0] = None
    assert admission.admit(None, 0, 0.0) is None
