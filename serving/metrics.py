"""What `/metrics` shows, and one line of the log for each request."""

import logging
import time
from datetime import UTC, datetime
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_LATENCY_S = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.0)
CONTENT_TYPE = CONTENT_TYPE_LATEST
_access = logging.getLogger("tessera.access")


class Metrics:
    """A registry of its own, so that two apps in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "tessera_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.latency = Histogram(
            "tessera_request_seconds", "Time to answer.", ["route"], buckets=_LATENCY_S, registry=self.registry
        )
        self.in_flight = Gauge("tessera_in_flight", "Requests being answered.", registry=self.registry)
        self.refused = Counter(
            "tessera_refused", "Requests turned away before they were looked at.", ["why"], registry=self.registry
        )
        self.unknown_users = Counter("tessera_unknown_users", "Users served by defaults.", registry=self.registry)
        self.unknown_items = Counter("tessera_unknown_items", "Candidates nobody knows.", registry=self.registry)
        self.stale = Counter("tessera_stale_answers", "Answers made while the store was away.", registry=self.registry)
        self.plans = Counter("tessera_retrievals", "Retrievals by method.", ["method"], registry=self.registry)
        self.items = Gauge("tessera_items", "Items that can be ranked.", registry=self.registry)
        self.unreadable = Gauge(
            "tessera_items_unreadable", "Items left out, since their records cannot be read.", registry=self.registry
        )
        self.mirror_lag = Gauge("tessera_mirror_lag_seconds", "Since the mirror had all of the log; 0 without one.",
                                registry=self.registry)  # fmt: skip
        self.bundle = Gauge("tessera_bundle_info", "The bundle that answers.", ["bundle"], registry=self.registry)
        self.impressions = Counter(
            "tessera_impressions", "Impressions by what became of them.", ["what"], registry=self.registry
        )
        self.shadows = Counter(
            "tessera_shadows", "Rankings in the shadow by what became of them.", ["what"], registry=self.registry
        )
        self.background_failures = Counter(
            "tessera_background_failures", "Failed rounds of work behind requests.", ["part"], registry=self.registry
        )
        self.swaps = Counter("tessera_swaps", "Bundles that took over.", registry=self.registry)
        self.swap_failures = Counter("tessera_swap_failures", "Bundles that could not be.", registry=self.registry)

    def answers(self, bundle: str) -> None:
        """Notes which bundle answers from now on."""
        self.bundle.clear()
        self.bundle.labels(bundle).set(1)

    def page(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return bytes(generate_latest(self.registry))


def log_request(**fields: Any) -> None:
    """One structured line: the logger's handler decides where it goes."""
    if _access.isEnabledFor(logging.INFO):
        _access.info("request", extra={"fields": fields})


class JsonLines(logging.Formatter):
    """A record as a line of JSON: time, level, logger, message, and the fields that came with it."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": moment, "level": record.levelname.lower(), "logger": record.name}
        line |= {"message": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        """Elapsed."""
        return time.perf_counter() - self._start
