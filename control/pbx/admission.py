"""Admission: whether there is room for one more call, decided before anything is reserved for it."""

from collections import OrderedDict
from collections.abc import Callable

from control.pbx.records import Reason
from control.pbx.routing import Refusal
from control.sip.address import Address

MAX_SOURCES = 10_000


class Admission:
    """Refuses calls while draining, above a rate from one source address, and above a number of calls.

    And while `store_trouble` tells why no record could be kept of one: then the calls that run get what room there is.

    The rate is a token bucket for each source that holds one second's worth, at least one call. The table of sources is
    bounded; the one that has been quiet longest is forgotten first, which can only be to its advantage.
    """

    def __init__(
        self,
        *,
        max_calls: int,
        calls_per_second: float,
        retry_after_s: int,
        max_sources: int = MAX_SOURCES,
        store_trouble: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.draining = False
        self.retry_after_s = retry_after_s
        self._max_calls = max_calls
        self._rate = calls_per_second
        self._capacity = max(1.0, calls_per_second)
        self._max_sources = max_sources
        self._store_trouble = store_trouble
        # host: (tokens, when they were counted), the most recently seen last
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def admit(self, source: Address | None, active_calls: int, now: float) -> Refusal | None:
        """None admits the call. A refusal carries status 503; `retry_after_s` goes with it as Retry-After.

        `source` is None for a call that is not asked for over SIP, and is held to no rate here.

        A call within the rate that is refused for another reason counts against the rate all the same.
        """
        within_rate = source is None or self._take_token(source.host, now)
        if self.draining:
            return self._refuse(Reason.DRAINING, "draining: no new calls")
        if source is not None and not within_rate:
            return self._refuse(Reason.RATE_LIMIT, f"more than {self._rate:g} calls/s from {source.host}")
        if (trouble := self._store_trouble()) is not None:
            return self._refuse(Reason.STORE_UNAVAILABLE, trouble)
        if active_calls >= self._max_calls:
            return self._refuse(Reason.CALL_LIMIT, f"{active_calls} calls of at most {self._max_calls}")
        return None

    def _refuse(self, reason: Reason, detail: str) -> Refusal:
        return Refusal(503, reason, detail, self.retry_after_s)

    def _take_token(self, host: str, now: float) -> bool:
        tokens, counted_at = self._buckets.pop(host, (self._capacity, now))
        tokens = min(self._capacity, tokens + (now - counted_at) * self._rate)
        admitted = tokens >= 1.0
        self._buckets[host] = (tokens - 1.0 if admitted else tokens, now)
        if len(self._buckets) > self._max_sources:
            self._buckets.popitem(last=False)
        return admitted
