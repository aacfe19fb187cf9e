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
        self._psi = Gauge(
            "tessera_drift_psi",
            "Population stability index of served and trained distributions in the present window.",
            ["feature", "measure"],
            registry=self.registry,
        )
        self._alarm = Gauge(
            "tessera_drift_alarm",
            "1 if a served distribution is farther from training's than tolerated, with confidence.",
            ["feature", "measure"],
            registry=self.registry,
        )
        self._users = Gauge("tessera_drift_users", "Users of the present window.", registry=self.registry)
        self._round = Gauge(
            "tessera_skew_round_timestamp_seconds", "Time of the last comparison.", registry=self.registry
        )

    def note(self, report: SkewReport) -> None:
        """Adds the counts of a report."""
        self._requests.inc(report.requests)
        self._values.inc(report.values)
        for difference in report.differences:
            self._differences.labels(difference.feature, difference.kind).inc(difference.count)
        if report.drift is not None and not report.drift.note:
            self._users.set(report.drift.users)
            # A window that has just begun knows no measure of the last one.
            self._psi.clear()
            self._alarm.clear()
            for one in report.drift.measures:
                self._psi.labels(one.feature, one.measure).set(one.psi)
                self._alarm.labels(one.feature, one.measure).set(one.alarm)
        self._round.set(time.time())

    def serve(self, port: int) -> None:
        """Serves `GET /metrics` on a port of this machine, in a thread."""
        start_http_server(port, addr="127.0.0.1", registry=self.registry)
