"""Metrics of several streams of one process: the metrics of each stream, with its bundle as a label."""

from collections.abc import Iterable
from threading import Lock

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from streaming.metrics import StreamMetrics, serve_metrics
from streaming.shared.ledger import FollowedBundle


class FollowMetrics(Collector):
    """Collects the metrics of followed bundles. All methods may be called from several threads.

    Attributes:
        registry: Registry of the metrics of all bundles.
        states: State of each bundle, by id.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.states: dict[str, FollowedBundle] = {}
        self._streams: dict[str, StreamMetrics] = {}
        self._lock = Lock()
        self.registry.register(self)

    def serve(self, place: str) -> None:
        """Serves `GET /metrics` of all bundles; see `serve_metrics`."""
        serve_metrics(self.registry, place)

    def add(self, bundle: str) -> StreamMetrics:
        """Returns new metrics of a bundle."""
        with self._lock:
            metrics = self._streams[bundle] = StreamMetrics()
            return metrics

    def remove(self, bundle: str) -> None:
        """Removes the metrics of a bundle that is no longer followed."""
        with self._lock:
            self._streams.pop(bundle, None)

    def streams(self) -> dict[str, StreamMetrics]:
        """Returns the metrics of each bundle, by id."""
        with self._lock:
            return dict(self._streams)

    def collect(self) -> Iterable[Metric]:
        """Returns the metrics of all bundles for Prometheus."""
        families: dict[str, Metric] = {}
        for bundle, metrics in self.streams().items():
            for family in metrics.registry.collect():
                merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    merged.samples.append(sample._replace(labels=sample.labels | {"bundle": bundle}))
        yield from families.values()
        followed = GaugeMetricFamily(
            "tessera_followed",
            "Bundles that the stream follows, by state and role.",
            labels=["bundle", "state", "role"],
        )
        for state in dict(self.states).values():
            for role in state.roles or ("none",):
                followed.add_metric([state.bundle, state.state, role], 1)
        yield followed
