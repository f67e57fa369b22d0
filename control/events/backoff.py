"""When to try again: pure arithmetic over attempts, failures and what a receiver asked for."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

RETRY_AFTER_MOST_S = 3600.0

_MOST_DOUBLINGS = 40


@dataclass(frozen=True, slots=True)
class BackOff:
    """Exponential back-off: `first_s`, doubled after each failure up to `most_s`, less a random part of up to a half.

    The random part keeps events that failed together from coming back together.
    """

    first_s: float = 1.0
    most_s: float = 3600.0

    def delay_s(self, failures: int, draw: float, retry_after_s: float | None = None) -> float:
        """How long to wait after so many failures, one or more; `draw` is random in [0, 1).

        What the receiver asked for is the least, as far as `RETRY_AFTER_MOST_S`.
        """
        full = min(self.first_s * 2.0 ** min(failures - 1, _MOST_DOUBLINGS), self.most_s)
        return max(full * (1 - draw / 2), min(retry_after_s or 0.0, RETRY_AFTER_MOST_S))

    @property
    def longest_s(self) -> float:
        """The bound of every delay."""
        return max(self.most_s, RETRY_AFTER_MOST_S)


class Brake:
    """Spares a receiver that is down, and ourselves: its whole backlog would be tried again and again otherwise.

    After `patience` failures in a row it is tried with one event at a time and growing pauses; one success lets
    everything go again. `now` is monotonic, in seconds.
    """

    def __init__(self, *, patience: int = 10, pauses: BackOff) -> None:
        self._patience = patience
        self._pauses = pauses
        self._failures = 0
        self._pause_until = 0.0

    @property
    def on(self) -> bool:
        """Whether the receiver counts as down."""
        return self._failures >= self._patience

    def succeeded(self) -> None:
        """The receiver took an event."""
        self._failures = 0

    def failed(self, now: float, draw: float) -> None:
        """The receiver did not take an event."""
        self._failures += 1
        if self.on:
            self._pause_until = now + self._pauses.delay_s(self._failures - self._patience + 1, draw)

    def pause_s(self, now: float) -> float:
        """How long nothing must be tried."""
        return max(0.0, self._pause_until - now) if self.on else 0.0

    def room(self, now: float, most: int) -> int:
        """How many attempts may be under way at once, at most `most`."""
        if not self.on:
            return most
        return 0 if self.pause_s(now) else 1


def retry_after_s(value: str | None, now: datetime) -> float | None:
    """Seconds from a Retry-After field (RFC 9110 section 10.2.3); None where there is none that can be read."""
    if value is None:
        return None
    value = value.strip()
    if re.fullmatch(r"[0-9]{1,9}", value):
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - now).total_seconds())
