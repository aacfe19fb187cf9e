"""The metrics of a server, and one line of the log for each request."""

import collections
import logging
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)

_LATENCY_S = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.0)
CONTENT_TYPE = CONTENT_TYPE_LATEST
_access = logging.getLogger("tessera.access")


class Metrics:
    """Metrics in a registry of their own, so that two apps in one process do not mix.

    Args:
        workers: Directory where the workers of one server keep their metrics, by prometheus_client's multiprocess mode;
            None if one process serves.
    """

    def __init__(self, workers: Path | None = None) -> None:
        self._workers = workers
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "tessera_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.latency = Histogram(
            "tessera_request_seconds", "Time to answer.", ["route"], buckets=_LATENCY_S, registry=self.registry
        )
        self.in_flight = self._gauge("tessera_in_flight", "Requests being answered.", across="livesum")
        self.refused = Counter(
            "tessera_refused", "Requests refused before they were processed.", ["why"], registry=self.registry
        )
        self.unknown_users = Counter("tessera_unknown_users", "Users served by defaults.", registry=self.registry)
        self.unknown_items = Counter("tessera_unknown_items", "Unknown candidates.", registry=self.registry)
        self.stale = Counter(
            "tessera_stale_answers", "Answers while the store was unavailable.", registry=self.registry
        )
        self.plans = Counter("tessera_retrievals", "Retrievals by method.", ["method"], registry=self.registry)
        self.sources = Counter(
            "tessera_retrieved_items", "Items that retrieval found for users, by source.", ["source"],
            registry=self.registry,
        )  # fmt: skip
        self.items = self._gauge("tessera_items", "Items that can be ranked.")
        self.indexes = self._gauge(
            "tessera_index_bytes", "Bytes of each search index in memory.", ["index"], across="livesum"
        )
        self.unreadable = self._gauge("tessera_items_unreadable", "Items left out, since their records cannot be read.")
        self.mirror_lag = self._gauge(
            "tessera_mirror_lag_seconds", "Seconds since the mirror had all of the log; or 0."
        )
        self.bundle = self._gauge("tessera_bundle_info", "The bundle that answers.", ["bundle"])
        self.impressions = Counter(
            "tessera_impressions", "Impressions by their fate.", ["what"], registry=self.registry
        )
        self.skew_records = Counter(
            "tessera_skew_records", "Sampled records of the inputs of answers, by their fate.", ["what"],
            registry=self.registry,
        )  # fmt: skip
        self.shadows = Counter("tessera_shadows", "Shadow rankings by their fate.", ["what"], registry=self.registry)
        self.background_failures = Counter(
            "tessera_background_failures", "Failed rounds of work behind requests.", ["part"], registry=self.registry
        )
        self.swaps = Counter("tessera_swaps", "Bundles that took over.", registry=self.registry)
        self.swap_failures = Counter("tessera_swap_failures", "Bundles that did not take over.", registry=self.registry)

    def _gauge(
        self, name: str, about: str, labels: Sequence[str] = (), *, across: Literal["livemax", "livesum"] = "livemax"
    ) -> Gauge:
        """Returns a gauge; `across` says how the values of several workers become one."""
        return Gauge(name, about, labels, multiprocess_mode=across, registry=self.registry)

    def answers(self, bundle: str) -> None:
        """Records which bundle answers from now on."""
        _zero(self.bundle)
        self.bundle.labels(bundle).set(1)

    def holds(self, indexes: Mapping[str, int]) -> None:
        """Records the bytes of each search index, by name."""
        _zero(self.indexes)
        for name, size_bytes in indexes.items():
            self.indexes.labels(name).set(size_bytes)

    def found(self, sources: Sequence[str]) -> None:
        """Counts the items of an answer by their sources."""
        for source, count in collections.Counter(sources).items():
            self.sources.labels(source).inc(count)

    def page(self) -> bytes:
        """Returns all metrics in Prometheus' text format; those of all workers, if several serve the port."""
        return bytes(generate_latest(self._whole()))

    def statuses(self) -> dict[int, float]:
        """Returns the number of answers by status, of all workers together."""
        return {int(status): count for status, count in self._by_label("tessera_requests_total", "status").items()}

    def found_by(self) -> dict[str, float]:
        """Returns the number of items that retrieval found for users, by source, of all workers together."""
        return self._by_label("tessera_retrieved_items_total", "source")

    def _by_label(self, name: str, label: str) -> dict[str, float]:
        found: dict[str, float] = {}
        for family in self._whole().collect():
            for one in family.samples:
                if one.name == name:
                    found[one.labels[label]] = found.get(one.labels[label], 0.0) + one.value
        return found

    def _whole(self) -> CollectorRegistry:
        """Returns a registry of all workers' metrics. The workers of a server keep theirs in files of one directory."""
        if self._workers is None:
            return self.registry
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry, str(self._workers))
        return registry


def _zero(gauge: Gauge) -> None:
    """Sets all labels of a gauge to 0 and forgets them. A file of a worker's metrics keeps the labels."""
    for family in gauge.collect():
        for one in family.samples:
            gauge.labels(*one.labels.values()).set(0)
    gauge.clear()


def log_request(**fields: Any) -> None:
    """Writes one structured line; the logger's handler decides its destination."""
    if _access.isEnabledFor(logging.INFO):
        _access.info("request", extra={"fields": fields})


class JsonLines(logging.Formatter):
    """Formatter of a record as a line of JSON: time, level, logger, message, and the fields that came with it."""

    def format(self, record: logging.LogRecord) -> str:
        """Formats a record; see `logging.Formatter.format`."""
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": moment, "level": record.levelname.lower(), "logger": record.name}
        line |= {"message": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


class Stopwatch:
    """Clock that measures the seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        """Returns the elapsed seconds."""
        return time.perf_counter() - self._start
