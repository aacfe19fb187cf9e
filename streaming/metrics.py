"""Metrics of a running stream for Prometheus, and the figures of the live view."""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from threading import Lock

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.registry import Collector

from features.errors import StreamError
from streaming.log.protocol import Message, Positions
from streaming.step_result import StepResult

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 5, 30, 300)
_RECENT = 20_000
_KINDS = ("events", "neutral", "duplicates", "items", "deleted", "stale", "forgotten")
_TINY = 1e-7
_LAST_PORT = 65_535


def serve_metrics(registry: CollectorRegistry, place: str) -> None:
    """Serves `GET /metrics` in a thread.

    Args:
        registry: Metrics to serve.
        place: PORT of this machine alone, or HOST:PORT with the address to listen on. "0" serves none.

    Raises:
        StreamError: The place is no port, the port is taken, or the address is not one of this machine.
    """
    host, _, port = place.rpartition(":")
    if not port.isdecimal() or int(port) > _LAST_PORT:
        raise StreamError(f"--metrics-port {place}: expected PORT or HOST:PORT, such as 9100 or 0.0.0.0:9100")
    if port == "0":
        return
    try:
        start_http_server(int(port), addr=host or "127.0.0.1", registry=registry)
    except OSError as error:
        raise StreamError(f"--metrics-port {place}: {error}; choose another port or host") from error


class _Ages(Collector):
    """Histogram of freshness that counts the ages of many messages at once. Its caller holds a lock."""

    def __init__(self) -> None:
        self._bounds = np.array(_SECONDS)
        self._counts: dict[str, NDArray[np.int64]] = {}
        self._sums: dict[str, float] = {}

    def observe(self, ages_s: NDArray[np.float64], at: str) -> None:
        """Counts ages (n,), seconds."""
        each = np.bincount(np.searchsorted(self._bounds, ages_s), minlength=len(self._bounds) + 1)
        self._counts[at] = self._counts.get(at, 0) + each
        self._sums[at] = self._sums.get(at, 0.0) + float(ages_s.sum())

    def describe(self) -> list[HistogramMetricFamily]:
        """Returns the empty histogram, whose names the registry keeps for it."""
        about = "From a message's arrival until it can be read."
        return [HistogramMetricFamily("tessera_freshness_seconds", about, labels=["at"])]

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Yields the histogram; see `Collector`."""
        (family,) = self.describe()
        for at, counts in list(self._counts.items()):
            names = [*map(str, map(float, _SECONDS)), "+Inf"]
            family.add_metric([at], list(zip(names, np.cumsum(counts).tolist(), strict=True)), self._sums[at])
        yield family


class StreamMetrics:
    """Metrics of trainer and writer. All methods may be called from several threads.

    Attributes:
        ages_ms: Ages of recent messages when they could be read, milliseconds.
        transaction_ms: Durations of recent transactions, milliseconds.
        made_visible: Number of messages that could be read so far.
        counts: Number of messages by outcome, of batches and of outages.
        causes: Number of quarantined messages by cause.
        lag: Offsets not yet read, by topic and partition.
        shown: Impressions, outcomes and rows of the joiner, by what became of them. Empty without a joiner.
        last_error: Description of the last outage, or "".
        seq, positions: Number of the last micro-batch, and next offset of each partition of the inputs.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self._messages = Counter("tessera_messages", "Messages read, by their fate.", ["kind"], registry=registry)
        self._letters = Counter("tessera_dead_letters", "Messages quarantined, by cause.", ["cause"], registry=registry)
        self._batches = Counter("tessera_batches", "Micro-batches committed.", registry=registry)
        self._outages = Counter("tessera_outages", "Restarts after an error, by part.", ["part"], registry=registry)
        self._fresh = _Ages()
        registry.register(self._fresh)
        self._transactions = Histogram(
            "tessera_transaction_seconds", "Of one micro-batch.", buckets=_SECONDS, registry=registry
        )
        self._lag = Gauge("tessera_lag", "Offsets not yet read.", ["topic", "partition"], registry=registry)
        self._loss = Gauge("tessera_progressive_log_loss", "Of recent events, before the update.", registry=registry)
        self._auc = Gauge("tessera_progressive_auc", "Of recent events, before the update.", registry=registry)
        self._shown = Gauge("tessera_shown", "Impressions, outcomes and rows, by fate.", ["fate"], registry=registry)
        self.shown: dict[str, int] = {}
        self._lock = Lock()
        self._seen: deque[tuple[float, float]] = deque(maxlen=_RECENT)
        self.ages_ms: deque[float] = deque(maxlen=_RECENT)
        self.transaction_ms: deque[float] = deque(maxlen=_RECENT)
        self.made_visible = 0
        self._rate: deque[tuple[float, int]] = deque(maxlen=200)
        self.counts: dict[str, int] = dict.fromkeys((*_KINDS, "bad", "batches", "outages"), 0)
        self.causes: dict[str, int] = {}
        self.lag: dict[tuple[str, int], int] = {}
        self.last_error = ""
        self.seq = 0
        self.positions: Positions = {}

    def serve(self, place: str) -> None:
        """Serves `GET /metrics` of this stream; see `serve_metrics`."""
        serve_metrics(self.registry, place)

    def joined(self, counts: Mapping[str, int]) -> None:
        """Sets the counts of a joiner: `streaming.shown.joiner.Joiner.counts`."""
        with self._lock:
            self.shown = dict(counts)
        for fate, count in counts.items():
            self._shown.labels(fate).set(count)

    def batch(self, messages: Sequence[Message], outcome: StepResult) -> None:
        """Counts a committed micro-batch."""
        with self._lock:
            self._batches.inc()
            self.counts["batches"] += 1
            for kind in _KINDS:
                if count := getattr(outcome, kind):
                    self._messages.labels(kind).inc(count)
                    self.counts[kind] += count
            for bad in outcome.bad:
                self._letters.labels(bad.cause).inc(bad.rows)
                self.causes[bad.cause] = self.causes.get(bad.cause, 0) + bad.rows
            self.counts["bad"] += outcome.rejected
            self.transaction_ms.append(1_000 * outcome.transaction_s)
            self._transactions.observe(outcome.transaction_s)
            known = ~np.isnan(outcome.labels)
            self._seen.extend(zip(outcome.labels[known].tolist(), outcome.logits[known].tolist(), strict=True))
            self._rate.append((time.monotonic(), outcome.rows))

    def visible(self, ages_ms: Sequence[float], at: str = "store") -> None:
        """Records the ages of messages when they could be read.

        Args:
            ages_ms: Ages, milliseconds.
            at: Place where the messages can be read, a label of the metric.
        """
        with self._lock:
            self._fresh.observe(np.array(ages_ms, dtype=np.float64) / 1_000, at)
            self.ages_ms.extend(ages_ms)
            self.made_visible += len(ages_ms)

    def behind(self, lag: dict[tuple[str, int], int]) -> None:
        """Records the lag by topic and partition."""
        self.lag = lag
        for (topic, partition), offsets in lag.items():
            self._lag.labels(topic, str(partition)).set(offsets)
        loss, auc = self.progressive()
        self._loss.set(loss)
        self._auc.set(auc)

    def reached(self, seq: int, positions: Positions) -> None:
        """Records how far the trainer is.

        Args:
            seq: Number of the last micro-batch.
            positions: Next offset of each partition of the inputs.
        """
        self.seq, self.positions = seq, positions

    def outage(self, part: str, error: Exception) -> None:
        """Counts a restart of a part."""
        self._outages.labels(part).inc()
        self.counts["outages"] += 1
        self.last_error = f"{part}: {error}"

    @staticmethod
    def prepare() -> None:
        """Loads what `progressive` computes with, which takes a second, before the first message can wait for it."""
        import sklearn.metrics  # noqa: F401

    def progressive(self) -> tuple[float, float]:
        """Returns log loss and AUC of the recent events, as predicted before the update. NaN if undefined."""
        with self._lock:
            seen = np.array(self._seen, dtype=np.float64).reshape(-1, 2)
        if not len(seen):
            return float("nan"), float("nan")
        from sklearn.metrics import roc_auc_score

        labels, chance = seen[:, 0], 1 / (1 + np.exp(-seen[:, 1]))
        chance = np.clip(chance, _TINY, 1 - _TINY)
        loss = -np.mean(labels * np.log(chance) + (1 - labels) * np.log1p(-chance))
        return float(loss), float(roc_auc_score(labels, seen[:, 1])) if 0 < labels.mean() < 1 else float("nan")

    def per_second(self) -> float:
        """Returns the messages per second over the last ten seconds."""
        now = time.monotonic()
        with self._lock:
            return sum(count for at, count in self._rate if now - at < 10) / 10

    def freshness_ms(self) -> tuple[float, float]:
        """Returns p50 and p99 of the ages of recent messages, milliseconds. NaN before the first message."""
        with self._lock:
            ages = np.array(self.ages_ms)
        if not len(ages):
            return float("nan"), float("nan")
        p50, p99 = np.percentile(ages, [50, 99])
        return float(p50), float(p99)
