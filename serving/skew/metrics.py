"""The metrics of `tessera skew --every-s`."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from serving.skew.report import SkewReport


class SkewMetrics:
    """Metrics in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter("tessera_skew_requests", "Compared requests.", registry=self.registry)
        self._values = Counter("tessera_skew_values", "Compared values.", registry=self.registry)
        self._differences = Counter(
            "tessera_skew_differences",
            "Served values that differ from snapshot and log.",
            ["feature", "kind"],
            registry=self.registry,
        )
        self._round = Gauge(
            "tessera_skew_round_timestamp_seconds", "Time of the last comparison.", registry=self.registry
        )

    def note(self, report: SkewReport) -> None:
        """Adds the counts of a report."""
        self._requests.inc(report.requests)
        self._values.inc(report.values)
        for difference in report.differences:
            self._differences.labels(difference.feature, difference.kind).inc(difference.count)
        self._round.set(time.time())

    def serve(self, port: int) -> None:
        """Serves `GET /metrics` on a port of this machine, in a thread."""
        start_http_server(port, addr="127.0.0.1", registry=self.registry)
