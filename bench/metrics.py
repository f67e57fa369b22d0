"""Quantiles of the histograms of a plane's /metrics."""

from tests.harness.pair import Metrics


def quantile(metrics: Metrics, name: str, share: float) -> float:
    """The quantile of a histogram, all its label sets together, with values spread evenly within each bucket.

    NaN when nothing was observed; the last finite bound when the value lies above it.
    """
    buckets: dict[float, float] = {}
    for (found, labels), value in metrics.items():
        if found == f"{name}_bucket":
            bound = float(dict(labels)["le"])
            buckets[bound] = buckets.get(bound, 0.0) + value
    total = max(buckets.values(), default=0.0)
    if not total:
        return float("nan")
    low_bound = low_count = 0.0
    for bound, count in sorted(buckets.items()):
        if count >= share * total and count > low_count and bound != float("inf"):
            return low_bound + (share * total - low_count) / (count - low_count) * (bound - low_bound)
        if bound != float("inf"):
            low_bound, low_count = bound, count
    return low_bound
