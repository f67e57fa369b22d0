"""The data plane's metrics: gauges and counters read from the node's tables at each scrape.

Packet counters are sums over sessions, those that have ended included; the packet path knows no metric object.
"""

import platform
import time
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

PREFIX = "sip_pbx_"
LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


class DataplaneMetrics:
    """The metrics of one data plane, and the registry to expose."""

    def __init__(self, version: str) -> None:
        self.registry = CollectorRegistry()
        self._grpc = Counter(
            f"{PREFIX}media_grpc_requests",
            "Calls and commands of the media service.",
            ("method", "code"),
            registry=self.registry,
        )
        self._lag = Histogram(
            f"{PREFIX}media_event_loop_lag_seconds",
            "How late the event loop ran a timer.",
            buckets=LAG_BUCKETS,
            registry=self.registry,
        )
        self._tasks = Gauge(f"{PREFIX}media_event_loop_tasks", "Tasks of the event loop now.", registry=self.registry)
        Gauge(f"{PREFIX}media_start_time_seconds", "When this process started, Unix time.", registry=self.registry).set(
            time.time()
        )
        Gauge(f"{PREFIX}media_build_info", "What runs here.", ("version", "python"), registry=self.registry).labels(
            version, platform.python_version()
        ).set(1)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def grpc_request(self, method: str, code: str) -> None:
        """Count a call or a command by its outcome; both words are literals of the code and the contract."""
        self._grpc.labels(method, code).inc()

    def loop_lag(self, seconds: float) -> None:
        """Observe how late a timer ran."""
        self._lag.observe(seconds)

    def watch_tasks(self, count: Callable[[], int]) -> None:
        """Ask for the number of tasks at each scrape: one that nobody ends is a leak that memory shows late."""
        self._tasks.set_function(count)

    def register(self, tables: "Tables") -> None:
        """Read these tables at each scrape."""
        self.registry.register(tables)


class Tables:
    """Collects what tables know. Each argument gives the present values, all of the label values included."""

    def __init__(
        self,
        *,
        gauges: Callable[[], Mapping[str, float]],
        closed: Callable[[], Mapping[str, int]],
        allocation_failures: Callable[[], Mapping[str, int]],
        counters: Callable[[], Mapping[str, int]],
        packets: Callable[[], Mapping[tuple[str, tuple[str, ...]], int]],
    ) -> None:
        self._gauges = gauges
        self._closed = closed
        self._allocation_failures = allocation_failures
        self._counters = counters
        self._packets = packets

    def collect(self) -> Iterable[Metric]:
        """One scrape."""
        for name, value in self._gauges().items():
            yield GaugeMetricFamily(PREFIX + name, GAUGES[name], value)
        for name, value in self._counters().items():
            yield CounterMetricFamily(PREFIX + name, COUNTERS[name], value)
        yield _by_reason("media_sessions_closed", "Sessions that ended, by reason.", self._closed())
        yield _by_reason(
            "media_port_alloc_failures", "Port blocks that could not be had, by reason.", self._allocation_failures()
        )
        families: dict[str, CounterMetricFamily] = {}
        for (name, labels), value in self._packets().items():
            text, label_names = PACKET_COUNTERS[name]
            family = families.setdefault(name, CounterMetricFamily(PREFIX + name, text, labels=label_names))
            family.add_metric(labels, value)
        yield from families.values()


GAUGES = {
    "media_sessions": "Sessions now.",
    "media_ports_capacity": "Ports in all blocks of the range.",
    "media_ports_in_use": "Ports of blocks that sessions own.",
    "media_ports_quarantined": "Ports of blocks that rest before reuse.",
    "media_control_connected": "1 while the owner's command stream is open.",
    "media_accepting": "1 while new sessions are taken.",
}
COUNTERS = {
    "media_sessions_opened": "Sessions made.",
    "media_worker_restarts": "Relay workers started after one had died.",
}
PACKET_COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "rtp_packets": ("Packets.", ("direction", "kind", "leg")),
    "rtp_bytes": ("Octets of packets, without UDP and IP headers.", ("direction", "kind", "leg")),
    "rtp_dropped": ("Packets that were not relayed, by reason.", ("reason",)),
    "rtp_lost": ("RTP packets lost on the way here (RFC 3550 appendix A.3).", ("leg",)),
    "rtp_reordered": ("RTP packets that came after a later one.", ("leg",)),
}


def _by_reason(name: str, text: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(PREFIX + name, text, labels=("reason",))
    for reason, value in values.items():
        family.add_metric((reason,), value)
    return family
