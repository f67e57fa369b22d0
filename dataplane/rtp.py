"""RTP and RTCP as a relay sees them: header checks and reception statistics.

Implements RFC 3550 sections 5.1 (header) and 6.4.1 (loss and jitter) with appendices A.1, A.3 and A.8, and RFC 5761
section 4 (telling RTCP from RTP). Nothing behind the headers is looked at, so that encrypted media (RFC 3711) passes as
well. Pure.
"""

from typing import Final

Packet = bytes | bytearray | memoryview

_RTP_HEADER_BYTES: Final = 12
_RTCP_HEADER_BYTES: Final = 8
_SEQUENCE_MODULUS: Final = 1 << 16
_TIMESTAMP_MASK: Final = (1 << 32) - 1
_HALF_TIMESTAMP: Final = 1 << 31
# RFC 3550 appendix A.1.
_MAX_DROPOUT: Final = 3000
_MAX_MISORDER: Final = 100


def is_rtp(packet: Packet, size: int) -> bool:
    """Tell whether the first `size` octets begin with a whole RTP header of version 2, CSRCs and extension included."""
    if size < _RTP_HEADER_BYTES or packet[0] >> 6 != 2:
        return False
    end = _RTP_HEADER_BYTES + 4 * (packet[0] & 0x0F)
    if packet[0] & 0x10:
        if size < end + 4:
            return False
        end += 4 + 4 * (packet[end + 2] << 8 | packet[end + 3])
    return size >= end


def is_rtcp(packet: Packet, size: int) -> bool:
    """Tell whether the first `size` octets begin with an RTCP header of version 2 (types as in RFC 5761 section 4)."""
    return size >= _RTCP_HEADER_BYTES and packet[0] >> 6 == 2 and 192 <= packet[1] <= 223


class StreamStats:
    """What was received of one stream; sums go on across changes of its SSRC, sequence numbers begin anew.

    Times are monotonic seconds. `jitter_s` is None until two packets of a known clock rate have come.
    """

    __slots__ = (
        "_bad_sequence",
        "_base",
        "_cycles",
        "_jitter_arrival",
        "_jitter_rate",
        "_jitter_timestamp",
        "_lost_before",
        "_max",
        "_received",
        "first_at",
        "jitter_s",
        "last_at",
        "octets",
        "packets",
        "reordered",
        "ssrc",
    )

    def __init__(self) -> None:
        self.packets = 0
        self.octets = 0
        self.reordered = 0
        self.jitter_s: float | None = None
        self.first_at: float | None = None
        self.last_at: float | None = None
        self.ssrc: int | None = None
        self._lost_before = 0
        self._received = 0
        self._base = 0
        self._max = -1
        self._cycles = 0
        self._bad_sequence = -1
        self._jitter_rate = 0
        self._jitter_timestamp = 0
        self._jitter_arrival = 0.0

    @property
    def lost(self) -> int:
        """Packets lost (RFC 3550 appendix A.3); negative when duplicates outnumber losses."""
        return self._lost_before + self._lost_of_source()

    def resume(
        self,
        *,
        packets: int,
        octets: int,
        lost: int,
        reordered: int,
        jitter_s: float | None,
        first_at: float | None,
        last_at: float | None,
    ) -> None:
        """Take over the sums of a stream that was received elsewhere before; the next packet begins a new sequence."""
        self.packets = packets
        self.octets = octets
        self.reordered = reordered
        self.jitter_s = jitter_s
        self.first_at = first_at
        self.last_at = last_at
        self._lost_before = lost

    def receive(self, packet: Packet, octets: int, clock_rate: int, now: float) -> None:
        """Count an RTP packet whose header is whole. A `clock_rate` of 0 leaves it out of the jitter."""
        self.packets += 1
        self.octets += octets
        self.last_at = now
        sequence = packet[2] << 8 | packet[3]
        ssrc = packet[8] << 24 | packet[9] << 16 | packet[10] << 8 | packet[11]
        if ssrc == self.ssrc and self._max >= 0:
            delta = (sequence - self._max) & 0xFFFF
            if delta < _MAX_DROPOUT:
                if sequence < self._max:
                    self._cycles += _SEQUENCE_MODULUS
                self._max = sequence
                self._received += 1
            elif delta <= _SEQUENCE_MODULUS - _MAX_MISORDER:
                # A jump. Two in a row mean that the sender began anew; one alone is not counted (appendix A.1).
                if sequence == self._bad_sequence:
                    self._begin(sequence)
                else:
                    self._bad_sequence = (sequence + 1) & 0xFFFF
            else:
                self.reordered += 1
                self._received += 1
        else:
            if self.first_at is None:
                self.first_at = now
            self.ssrc = ssrc
            self._begin(sequence)
            self._jitter_rate = 0
        if clock_rate:
            timestamp = packet[4] << 24 | packet[5] << 16 | packet[6] << 8 | packet[7]
            if clock_rate == self._jitter_rate:
                # Appendix A.8 in seconds, so that streams which change their clock rate keep one figure.
                ticks = ((timestamp - self._jitter_timestamp + _HALF_TIMESTAMP) & _TIMESTAMP_MASK) - _HALF_TIMESTAMP
                difference = now - self._jitter_arrival - ticks / clock_rate
                jitter = self.jitter_s or 0.0
                self.jitter_s = jitter + ((difference if difference > 0 else -difference) - jitter) * 0.0625
            self._jitter_rate = clock_rate
            self._jitter_timestamp = timestamp
            self._jitter_arrival = now

    def _begin(self, sequence: int) -> None:
        self._lost_before += self._lost_of_source()
        self._base = self._max = sequence
        self._cycles = 0
        self._received = 1
        self._bad_sequence = -1

    def _lost_of_source(self) -> int:
        if self._max < 0:
            return 0
        return self._cycles + self._max - self._base + 1 - self._received
