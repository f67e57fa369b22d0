"""What Prometheus sees of the control plane, in a registry of its own.

Labels come from closed sets only: no user, number, URI, address or id of any call is ever a label. All series that can
be named in advance exist from the start with 0, so that `rate` and `absent` work. Gauges are read from the tables they
describe when they are scraped; nothing is counted up and down by hand.
"""

import platform
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from control.pbx.records import EVENT_TYPES, CallDirection, CallEvent, CallEventKind, CallRecord, Event, Reason, Result
from control.sip.address import Transport
from control.sip.stack import METHODS, OTHER_METHOD, DiscardReason, MessageLabel

DISTRIBUTION = "sip-pbx"

_WAYS = ("in", "out")
_SETUP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 2, 5, 10)
_DELAY_BUCKETS = (0.1, 0.25, 0.5, 1, 2, 4, 8, 16)
_RING_BUCKETS = (1, 3, 5, 10, 20, 30, 60, 120, 180)
_DURATION_BUCKETS = (1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400)
_RPC_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1)
_COMMIT_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5)
_REQUEST_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5)
_DELIVERY_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 30, 60)
_LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)


class ControlMetrics:
    """The metrics of one control plane, and the registry to expose."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._calls = self._counter("calls", "Calls started.", "direction")
        self._ended = self._counter(
            "calls_ended", "Calls ended, refused ones included.", "direction", "result", "reason"
        )
        self._duration = self._histogram(
            "call_duration_seconds", "From the answer to the end.", _DURATION_BUCKETS, "direction"
        )
        self._setup = self._histogram(
            "call_setup_seconds", "From the INVITE to the forwarded INVITE.", _SETUP_BUCKETS, "direction"
        )
        self._post_dial = self._histogram(
            "post_dial_delay_seconds", "From the INVITE to the first ringing.", _DELAY_BUCKETS, "direction"
        )
        self._ring = self._histogram("ring_seconds", "From ringing to the answer.", _RING_BUCKETS, "direction")
        self._errors = self._counter("errors", "Errors of this system, by part and kind.", "component", "kind")
        self._requests = self._counter("sip_requests", "SIP requests.", "method", "direction", "transport")
        self._responses = self._counter("sip_responses", "SIP responses.", "method", "code_class", "direction")
        self._finals = self._counter("sip_final_responses", "Final SIP responses.", "method", "code", "direction")
        self._retransmissions = self._counter(
            "sip_retransmissions", "SIP messages seen or sent again.", "method", "direction"
        )
        self._discarded = self._counter("sip_discarded", "Datagrams that led to nothing.", "reason")
        self._parse_errors = self._counter("sip_parse_errors", "Datagrams that are not valid SIP.")
        self._registers = self._counter("register_requests", "REGISTER requests by what became of them.", "result")
        self._auth = self._counter("sip_auth", "Digest authentications.", "method", "result")
        self._media_rpc = self._histogram(
            "media_rpc_seconds", "From the queueing of a media command to its result.", _RPC_BUCKETS, "method", "code"
        )
        self._media_connected = self._gauge("media_connected", "1 while the data plane is connected.")
        self._media_restores = self._counter(
            "media_restores", "Sessions made again after a data plane was lost.", "result"
        )
        self._cdrs_written = self._counter("cdrs_written", "Call detail records written.", "backend")
        self._cdr_failures = self._counter(
            "cdr_failures", "Call detail records that a backend could not take.", "backend"
        )
        self._commit = self._histogram("store_commit_seconds", "One commit of the store.", _COMMIT_BUCKETS)
        self._store_pending = self._gauge("store_pending", "Writes that wait for a commit.")
        self._events = self._counter("events", "Events stored.", "type")
        self._deliveries = self._counter(
            "webhook_deliveries", "Attempts to deliver an event, by what became of them.", "endpoint", "result"
        )
        self._delivery_time = self._histogram(
            "webhook_delivery_seconds", "One attempt to deliver an event.", _DELIVERY_BUCKETS, "endpoint"
        )
        self._outbox_pending = self._gauge("outbox_pending", "Events that wait for delivery.", "endpoint")
        self._outbox_oldest = self._gauge("outbox_oldest_seconds", "How old the oldest of them is.", "endpoint")
        self._http = self._histogram(
            "http_request_seconds", "Requests of the HTTP API.", _REQUEST_BUCKETS, "route", "method", "code"
        )
        self._grpc = self._histogram(
            "grpc_request_seconds", "Requests of the gRPC API.", _REQUEST_BUCKETS, "method", "code"
        )
        self._watchers = self._gauge("watch_clients", "Event streams of the gRPC API.")
        self._loop_lag = self._histogram("event_loop_lag_seconds", "How late the event loop ran a timer.", _LAG_BUCKETS)
        self._tasks = self._gauge("event_loop_tasks", "Tasks of the event loop now.")
        self._gauge("start_time_seconds", "When this process started, Unix time.").set(time.time())
        self._gauge("build_info", "What runs here.", "version", "python").labels(
            product_version(), platform.python_version()
        ).set(1)
        self._preset()
        self.registry.register(_SeedAlias(self._calls))
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def bind(
        self,
        *,
        active_calls: Callable[[], Mapping[str, int]],
        registrations: Callable[[], int],
        transactions: Callable[[], Mapping[str, int]],
        sockets: Callable[[], Mapping[str, int]],
        ready: Callable[[], bool],
        draining: Callable[[], bool],
    ) -> None:
        """Name the tables that gauges are read from.

        `active_calls` are by state, `transactions` by kind, `sockets` are the counters of the SIP sockets by event.
        """
        self.registry.register(
            _Tables(
                active_calls=active_calls,
                registrations=registrations,
                transactions=transactions,
                sockets=sockets,
                ready=ready,
                draining=draining,
            )
        )

    def observe(self, event: Event) -> None:
        """Count one event of a call; others are counted where they happen."""
        if not isinstance(event, CallEvent):
            return
        direction = event.direction.value
        match event.kind:
            case CallEventKind.STARTED:
                self._calls.labels(direction).inc()
            case CallEventKind.FORWARDED:
                self._setup.labels(direction).observe(event.elapsed_s)
            case CallEventKind.RINGING:
                self._post_dial.labels(direction).observe(event.elapsed_s)
            case CallEventKind.ANSWERED:
                pass
            case CallEventKind.ENDED:
                if event.record is not None:
                    self._observe_record(event.record)

    def sip_message(self, direction: str, label: MessageLabel, transport: Transport = Transport.UDP) -> None:
        """Count one SIP message, `direction` being "in" or "out"."""
        method = label.method
        if label.status is None:
            self._requests.labels(method, direction, transport.value.lower()).inc()
        else:
            self._responses.labels(method, f"{label.status // 100}xx", direction).inc()
            if label.status >= 200 and not label.retransmission:
                self._finals.labels(method, str(label.status), direction).inc()
        if label.retransmission:
            self._retransmissions.labels(method, direction).inc()

    def sip_discarded(self, reason: str) -> None:
        """Count a datagram that led to nothing."""
        self._discarded.labels(reason).inc()
        if reason == DiscardReason.MALFORMED.value:
            self._parse_errors.inc()

    def registration(self, result: str) -> None:
        """Count a REGISTER by what became of it."""
        self._registers.labels(result).inc()

    def authentication(self, method: str, result: str) -> None:
        """Count a digest authentication by its outcome."""
        self._auth.labels(method if method in METHODS else OTHER_METHOD, result).inc()

    def error(self, component: str, kind: str) -> None:
        """Count an error; both words are literals of the code."""
        self._errors.labels(component, kind).inc()

    def media_command(self, method: str, code: str, seconds: float) -> None:
        """Observe how long a media command took and what became of it."""
        self._media_rpc.labels(method, code).observe(seconds)

    def media_connected(self, connected: bool) -> None:
        """Tell whether the data plane is connected."""
        self._media_connected.set(connected)

    def media_restored(self, result: str) -> None:
        """Count a session that was made again (`ok`) or could not be (`lost`)."""
        self._media_restores.labels(result).inc()

    def cdrs_written(self, backend: str, records: int) -> None:
        """Count records that a backend has taken."""
        self._cdrs_written.labels(backend).inc(records)

    def cdr_failed(self, backend: str, records: int = 1) -> None:
        """Count records that a backend will never have."""
        self._cdr_failures.labels(backend).inc(records)

    def committed(self, seconds: float) -> None:
        """Observe one commit of the store."""
        self._commit.observe(seconds)

    def watch_store(self, pending: Callable[[], int]) -> None:
        """Ask at each scrape how many writes wait."""
        self._store_pending.set_function(pending)

    def event_stored(self, event_type: str) -> None:
        """Count an event that is on the disk."""
        self._events.labels(event_type).inc()

    def webhook_delivery(self, endpoint: str, result: str, seconds: float) -> None:
        """Count an attempt: `ok`, `retry` (will be tried again) or `dead` (given up)."""
        self._deliveries.labels(endpoint, result).inc()
        self._delivery_time.labels(endpoint).observe(seconds)

    def watch_outbox(self, endpoint: str, pending: Callable[[], int], oldest_s: Callable[[], float]) -> None:
        """Ask at each scrape how many events wait for an endpoint, and how old the oldest is; makes its series."""
        for result in ("ok", "retry", "dead"):
            self._deliveries.labels(endpoint, result)
        self._delivery_time.labels(endpoint)
        self._outbox_pending.labels(endpoint).set_function(pending)
        self._outbox_oldest.labels(endpoint).set_function(oldest_s)

    def http_request(self, route: str, method: str, code: int, seconds: float) -> None:
        """Observe a request; `route` is the pattern, not the path."""
        self._http.labels(route, method, str(code)).observe(seconds)

    def grpc_request(self, method: str, code: str, seconds: float) -> None:
        """Observe a request; `method` is one of the contract's, or "other"."""
        self._grpc.labels(method, code).observe(seconds)

    def watch_watchers(self, count: Callable[[], int]) -> None:
        """Ask at each scrape how many event streams there are."""
        self._watchers.set_function(count)

    def event_loop_lag(self, seconds: float) -> None:
        """Observe how late a timer ran."""
        self._loop_lag.observe(seconds)

    def watch_tasks(self, count: Callable[[], int]) -> None:
        """Ask for the number of tasks at each scrape: one that nobody ends is a leak that memory shows late."""
        self._tasks.set_function(count)

    def _observe_record(self, record: CallRecord) -> None:
        direction = record.direction.value
        end = record.termination
        self._ended.labels(direction, end.result.value, end.reason.value).inc()
        if record.answered_at is not None:
            self._duration.labels(direction).observe(record.duration_s)
            if record.ringing_at is not None:
                self._ring.labels(direction).observe(max(0.0, (record.answered_at - record.ringing_at).total_seconds()))

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"sip_pbx_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"sip_pbx_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"sip_pbx_{name}", text, labels, buckets=buckets, registry=self.registry)

    def _preset(self) -> None:
        """Make the series that can be named in advance, with 0."""
        for direction in CallDirection:
            for by_direction in (self._calls, self._duration, self._setup, self._post_dial, self._ring):
                by_direction.labels(direction.value)
            for result in Result:
                for reason in Reason:
                    self._ended.labels(direction.value, result.value, reason.value)
        for method in sorted(METHODS | {OTHER_METHOD}):
            for way in _WAYS:
                self._retransmissions.labels(method, way)
                for transport in Transport:
                    self._requests.labels(method, way, transport.value.lower())
                for code_class in range(1, 7):
                    self._responses.labels(method, f"{code_class}xx", way)
        for discard in DiscardReason:
            self._discarded.labels(discard.value)
        for backend in ("sqlite", "jsonl", "csv"):
            self._cdrs_written.labels(backend)
            self._cdr_failures.labels(backend)
        for outcome in ("ok", "lost"):
            self._media_restores.labels(outcome)
        for action in ("create", "update", "delete"):
            self._media_rpc.labels(action, "ok")
        for event_type in EVENT_TYPES:
            self._events.labels(event_type)
        for component in ("sip", "media", "store", "events", "webhook", "api"):
            self._errors.labels(component, "internal")


class _SeedAlias(Collector):
    """`sip_pbx_total_calls`: a Counter of this name would be exported with `_total` behind it."""

    def __init__(self, calls: Counter) -> None:
        self._calls = calls

    def collect(self) -> Iterable[Metric]:
        alias = Metric("sip_pbx_total_calls", "Calls started. Alias of the sum of sip_pbx_calls_total.", "unknown")
        started = sum(
            sample.value
            for family in self._calls.collect()
            for sample in family.samples
            if sample.name.endswith("_total")
        )
        alias.add_sample("sip_pbx_total_calls", {}, started)
        yield alias


class _Tables(Collector):
    """Gauges whose value is the size of a table, and counters that are kept as plain integers elsewhere."""

    def __init__(
        self,
        *,
        active_calls: Callable[[], Mapping[str, int]],
        registrations: Callable[[], int],
        transactions: Callable[[], Mapping[str, int]],
        sockets: Callable[[], Mapping[str, int]],
        ready: Callable[[], bool],
        draining: Callable[[], bool],
    ) -> None:
        self._active_calls = active_calls
        self._registrations = registrations
        self._transactions = transactions
        self._sockets = sockets
        self._ready = ready
        self._draining = draining

    def collect(self) -> Iterable[Metric]:
        by_state = self._active_calls()
        yield GaugeMetricFamily("sip_pbx_active_calls", "Calls that have not ended.", sum(by_state.values()))
        yield _family(GaugeMetricFamily("sip_pbx_calls_by_state", "Calls by state.", labels=["state"]), by_state)
        yield GaugeMetricFamily("sip_pbx_registrations", "Live bindings.", self._registrations())
        kinds = GaugeMetricFamily("sip_pbx_sip_transactions", "SIP transactions by kind.", labels=["kind"])
        yield _family(kinds, self._transactions())
        events = CounterMetricFamily("sip_pbx_sip_socket_events", "Datagrams of the SIP sockets.", labels=["event"])
        yield _family(events, self._sockets())
        yield GaugeMetricFamily("sip_pbx_ready", "1 while new calls are taken.", self._ready())
        yield GaugeMetricFamily(
            "sip_pbx_draining", "1 while running calls finish and new ones are refused.", self._draining()
        )


def _family(
    family: GaugeMetricFamily | CounterMetricFamily, values: Mapping[str, int]
) -> GaugeMetricFamily | CounterMetricFamily:
    for label, value in values.items():
        family.add_metric([label], value)
    return family


def product_version() -> str:
    """The version of this program, "unknown" where it is not installed."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "unknown"
