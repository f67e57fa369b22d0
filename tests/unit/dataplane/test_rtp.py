"""Header checks and reception statistics."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.rtp import StreamStats, is_rtcp, is_rtp
from tests.unit.dataplane.packets import rtcp, rtp


def received(sequences: list[int], stats: StreamStats | None = None, ssrc: int = 1) -> StreamStats:
    stats = stats or StreamStats()
    for sequence in sequences:
        packet = rtp(sequence, ssrc=ssrc)
        stats.receive(packet, len(packet), 0, 1.0)
    return stats


@pytest.mark.rfc("3550", "5.1")
def test_a_whole_header_is_rtp() -> None:
    assert is_rtp(rtp(payload=b""), 12)


@pytest.mark.rfc("3550", "5.1")
@pytest.mark.parametrize(
    "packet",
    [
        rtp(first_octet=0x00),
        rtp(first_octet=0x40),
        rtp(payload=b"")[:11],
        rtp(first_octet=0x82, payload=bytes(7)),
        rtp(first_octet=0x90, payload=bytes(3)),
        rtp(first_octet=0x90, payload=b"\xbe\xde\x00\x02" + bytes(7)),
        b"",
    ],
    ids=["version 0", "version 1", "short", "CSRCs cut", "extension cut", "extension data cut", "empty"],
)
def test_a_header_that_is_no_rtp_or_is_cut_is_told(packet: bytes) -> None:
    buffer = bytearray(rtp())
    buffer[: len(packet)] = packet
    assert not is_rtp(buffer, len(packet))


@pytest.mark.rfc("3550", "5.1")
def test_csrcs_and_an_extension_that_are_whole_are_rtp() -> None:
    packet = rtp(first_octet=0x91, payload=bytes(4) + b"\xbe\xde\x00\x01" + bytes(4))
    assert is_rtp(packet, len(packet))


@pytest.mark.rfc("5761", "4")
@pytest.mark.parametrize(
    ("packet_type", "verdict"), [(191, False), (192, True), (200, True), (223, True), (224, False)]
)
def test_rtcp_is_told_by_its_type(packet_type: int, verdict: bool) -> None:
    packet = rtcp(packet_type)
    assert is_rtcp(packet, len(packet)) is verdict


@pytest.mark.rfc("3550", "A.3")
def test_a_gap_is_loss_and_a_late_packet_takes_it_back() -> None:
    stats = received([1, 2, 5])
    assert (stats.packets, stats.lost, stats.reordered) == (3, 2, 0)
    received([3], stats)
    assert (stats.packets, stats.lost, stats.reordered) == (4, 1, 1)


@pytest.mark.rfc("3550", "A.3")
def test_duplicates_make_loss_negative() -> None:
    assert received([1, 2, 2, 2]).lost == -2


@pytest.mark.rfc("3550", "A.1")
def test_sequence_numbers_wrap_without_loss() -> None:
    stats = received([65534, 65535, 0, 1, 3])
    assert (stats.lost, stats.reordered) == (1, 0)


@pytest.mark.rfc("3550", "A.1")
def test_a_packet_from_before_the_wrap_is_late_not_lost() -> None:
    stats = received([65534, 0, 65535])
    assert (stats.lost, stats.reordered) == (0, 1)


@pytest.mark.rfc("3550", "A.1")
def test_one_packet_out_of_nowhere_changes_nothing_but_the_count() -> None:
    stats = received([1, 2, 30_000, 3, 4])
    assert (stats.packets, stats.lost) == (5, 0)


@pytest.mark.rfc("3550", "A.1")
def test_two_packets_in_a_row_after_a_jump_begin_a_new_sequence() -> None:
    stats = received([1, 2, 4, 30_000, 30_001, 30_003])
    assert stats.lost == 2


def test_a_new_ssrc_begins_a_new_sequence_and_sums_go_on() -> None:
    stats = received([1, 3])
    received([500, 502], stats, ssrc=2)
    assert (stats.packets, stats.lost, stats.ssrc) == (4, 2, 2)


@pytest.mark.rfc("3550", "A.8")
def test_jitter_follows_the_formula() -> None:
    stats = StreamStats()
    arrivals = [0.0, 0.020, 0.050, 0.060]
    expected = 0.0
    for i, arrival in enumerate(arrivals):
        packet = rtp(i, timestamp=160 * i)
        stats.receive(packet, len(packet), 8000, arrival)
        if i:
            difference = abs((arrival - arrivals[i - 1]) - 0.020)
            expected += (difference - expected) / 16
    assert stats.jitter_s == pytest.approx(expected)


@pytest.mark.rfc("3550", "A.8")
def test_a_steady_stream_has_no_jitter_also_across_the_wrap_of_its_timestamps() -> None:
    stats = StreamStats()
    for i in range(5):
        packet = rtp(i, timestamp=0xFFFFFFFF - 200 + 160 * i)
        stats.receive(packet, len(packet), 8000, 0.02 * i)
    assert stats.jitter_s == pytest.approx(0.0, abs=1e-9)


def test_jitter_is_unknown_without_a_clock_rate() -> None:
    assert received([1, 2, 3]).jitter_s is None


def test_a_change_of_clock_rate_is_no_jitter() -> None:
    stats = StreamStats()
    for i, (rate, timestamp) in enumerate([(8000, 0), (8000, 160), (48000, 900_000), (48000, 900_960)]):
        packet = rtp(i, timestamp=timestamp)
        stats.receive(packet, len(packet), rate, 0.02 * i)
    assert stats.jitter_s == pytest.approx(0.0, abs=1e-9)


def test_a_resumed_stream_goes_on_with_its_sums() -> None:
    stats = StreamStats()
    stats.resume(packets=10, octets=1000, lost=3, reordered=1, jitter_s=0.5, first_at=1.0, last_at=2.0)
    packet = rtp(900)
    stats.receive(packet, len(packet), 0, 7.0)
    assert (stats.packets, stats.lost, stats.first_at, stats.last_at) == (11, 3, 1.0, 7.0)


@given(st.integers(0, 65535), st.sets(st.integers(1, 398)))
def test_loss_is_exact_whatever_is_lost_and_however_neighbours_are_swapped(start: int, lost: set[int]) -> None:
    sequences = [start + i for i in range(400) if i not in lost]
    for i in range(1, len(sequences) - 1, 7):  # never the first: what precedes it would not be counted as expected
        sequences[i], sequences[i + 1] = sequences[i + 1], sequences[i]
    last_is_newest = max(sequences) - start
    stats = received([sequence & 0xFFFF for sequence in sequences])
    assert stats.lost == len([i for i in lost if i <= last_is_newest])
