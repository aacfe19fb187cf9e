"""Samples of log, store and registry for the console's pages, taken in the background.

A page is rendered from memory, so it is fast and costs requests nothing, even if a server is unavailable.
"""

import contextlib
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

from models.registry.documents import ENCODER_REPORT, SKEW_REPORT, UPGRADES
from models.registry.lineage import ModelVersion
from serving.background import Background, Rounds
from serving.metrics import Metrics
from serving.rollout.experiment import Experiment
from serving.rollout.lifecycle import PastExperiment, past, running
from serving.rollout.look_log import looks_of
from serving.store.lag import inputs_behind, ranges_behind
from serving.store.redis.store import RedisStore
from serving.store.writer import position_of
from serving.traffic.router import Router
from streaming.dead_letter import Filing, Letters
from streaming.forget.message import Line
from streaming.forget.request import ForgottenFeed
from streaming.log.protocol import ends_of
from streaming.shared.ledger import FollowEntry, newest_entry
from tessera.settings import Settings

_LOGGER = logging.getLogger(__name__)
_EVERY_S, _REGISTRY_EVERY_S, _VERSIONS_EVERY_S = 2.0, 10.0, 60.0
_KEPT = 150  # samples: five minutes
# Loading MLflow takes seconds, in which the server that starts shall answer.
_FIRST_REGISTRY_S = 3.0


@dataclass(frozen=True)
class Sample:
    """State at one moment.

    Attributes:
        at: Seconds since 1970.
        requests, failed: Requests answered so far, and those with a status of 500 or more.
        ends: Messages appended so far, by topic.
        lag: Messages that the trainer has not consumed, and deltas that are not in the store; None without a reader.
        fresh_s: Age of the oldest change that is not in the store yet; 0 if all are, None if unknown.
        ranges: End of each row range's deltas, and the number of them that are not in the store; None without a writer.
    """

    at: float
    requests: float
    failed: float
    ends: dict[str, int] = field(default_factory=dict)
    lag: dict[str, int | None] = field(default_factory=dict)
    fresh_s: float | None = None
    ranges: tuple[tuple[int, int | None], ...] = ()


@dataclass
class Seen:
    """All data of the pages; parts are replaced, never changed."""

    samples: deque[Sample] = field(default_factory=lambda: deque(maxlen=_KEPT))
    letters: Letters = field(default_factory=Letters)
    forgotten: list[Line] = field(default_factory=list)
    versions: list[ModelVersion] = field(default_factory=list)
    running: list[Experiment] = field(default_factory=list)
    past: list[PastExperiment] = field(default_factory=list)
    looks: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    away: dict[str, str] = field(default_factory=dict)
    encoder_report: dict[str, Any] | None = None
    upgrades: dict[str, dict[str, Any]] = field(default_factory=dict)
    skew: dict[str, Any] | None = None
    servers: list[dict[str, str]] = field(default_factory=list)
    followed: FollowEntry | None = None

    def rates(self, value: Callable[[Sample], float]) -> list[float]:
        """Returns the growth of a count per second, between each sample and the next."""
        held = list(self.samples)
        return [
            max(value(after) - value(before), 0.0) / max(after.at - before.at, 1e-3)
            for before, after in itertools.pairwise(held)
        ]


class Sampler:
    """Thread that takes samples until it is closed.

    Args:
        settings: Addresses of log, store and registry.
        current: Router of the bundles that serve.
        metrics: Counts of the server.
    """

    def __init__(self, settings: Settings, current: Router, metrics: Metrics) -> None:
        self.seen = Seen()
        self._settings = settings
        self._current = current
        self._metrics = metrics
        self._filing = Filing()
        self._forgotten: ForgottenFeed | None = None
        self._log: Any = None
        self._store: Any = None
        self._registry: Any = None
        self._pulse: Any = None
        self._versions_due = self._servers_due = 0.0
        self._registry_due = time.monotonic() + _FIRST_REGISTRY_S
        self._looking = threading.Lock()
        rounds = Rounds("console", "the console cannot be brought up to date", metrics)
        self._worker = Background("console", lambda stop: self._round(), rounds, every_s=_EVERY_S, at_once=True)

    def close(self) -> None:
        """Stops after the sample in hand, and closes what was opened."""
        self._worker.close(10)
        for held in (self._log, self._store):
            if held is not None:
                held.close()

    def look(self) -> None:
        """Takes one sample of everything."""
        with self._looking:
            self._sample()
            self._follow_registry()

    @property
    def log(self) -> Any:
        """Event log; the first use opens it."""
        if self._log is None:
            log = self._settings.open_log()
            log.create_topics(self._settings.topics.partitions())
            self._log = log
        return self._log

    def _round(self) -> None:
        with self._looking:
            self._sample()
            if time.monotonic() >= self._registry_due:
                self._follow_registry()
                self._registry_due = time.monotonic() + _REGISTRY_EVERY_S

    def _sample(self) -> None:
        answered = self._metrics.statuses()
        sample = Sample(
            at=time.time(),
            requests=sum(answered.values()),
            failed=sum(count for status, count in answered.items() if status >= 500),
        )
        with self._watched("log"):
            sample = self._with_log(sample)
            self._with_forgotten()
            self.seen.letters = self._filing.read_on(self.log, self._settings.topics)
            self.seen.followed = newest_entry(self.log, self._settings.topics)
        with self._watched("store"):
            sample = self._with_store(sample)
            if time.monotonic() >= self._servers_due:
                self.seen.servers = self._store.facts() if isinstance(self._store, RedisStore) else []
                self._servers_due = time.monotonic() + _REGISTRY_EVERY_S
        self.seen.samples.append(sample)

    def _with_forgotten(self) -> None:
        if self._forgotten is None:
            self._forgotten = ForgottenFeed(self.log, self._settings.topics)
        before = self._forgotten.rewrites
        self._forgotten.read_on()
        if self._forgotten.rewrites > before:
            # A rewrite removes letters, so all letters are read again.
            self._filing = Filing()
        self.seen.forgotten = list(self._forgotten.newest)

    def _with_log(self, sample: Sample) -> Sample:
        log, topics = self.log, self._settings.topics
        ends = {topic: sum(log.end_offsets(topic).values()) for topic in topics.partitions()}
        return replace(sample, ends=ends, lag=inputs_behind(log, self._current.service.bundle, topics))

    def _with_store(self, sample: Sample) -> Sample:
        if self._store is None:
            self._store = self._settings.open_store()
        topics = self._settings.topics
        start = position_of(self._store, self._current.service.bundle.id, topics.deltas)
        ends = ends_of(self.log, topics.deltas)
        if start is None:
            return replace(sample, lag=sample.lag | {topics.deltas: None}, ranges=tuple((end, None) for end in ends))
        found = ranges_behind(self.log, start, topics)
        oldest = min((first.timestamp_ms for _, first in found if first is not None), default=None)
        fresh = 0.0 if oldest is None else max(sample.at - oldest / 1_000, 0.0)
        behind = [count for count, _ in found]
        lag = sample.lag | {topics.deltas: sum(behind)}
        return replace(sample, lag=lag, fresh_s=fresh, ranges=tuple(zip(ends, behind, strict=True)))

    def _follow_registry(self) -> None:
        with self._watched("registry"):
            if self._registry is None:
                self._registry = self._settings.open_registry(create=False)
            registry, model = self._registry, self._current.service.bundle.dataset.name
            if not self.seen.versions and model not in registry.models():
                return
            pulse = registry.pulse(model)
            if pulse != self._pulse or time.monotonic() >= self._versions_due:
                self.seen.versions = registry.versions(model)
                self.seen.running, self.seen.past = running(registry, model), past(registry, model)
                self._read_documents(registry)
                self._pulse, self._versions_due = pulse, time.monotonic() + _VERSIONS_EVERY_S
            elif not self.seen.running:
                return
            ended = {one.experiment.id for one in self.seen.past}
            # An ended experiment does not change any more.
            looks = {name: found for name, found in self.seen.looks.items() if name in ended and found}
            for one in [*self.seen.running, *(found.experiment for found in self.seen.past)]:
                if one.id not in looks:
                    looks[one.id] = looks_of(registry, model, one)
            self.seen.looks = looks

    def _read_documents(self, registry: Any) -> None:
        """Reads the reports of the version that serves: its encoder's, the upgrades, and what servers read."""
        bundle = self._current.service.bundle
        serving = [one for one in self.seen.versions if one.bundle == bundle.id]
        if not serving:
            self.seen.encoder_report, self.seen.upgrades, self.seen.skew = None, {}, None
            return
        documents, release = registry.documents, registry.release(bundle.dataset.name, bundle.id)
        self.seen.encoder_report = documents.get(release, ENCODER_REPORT)
        self.seen.skew = documents.get(release, SKEW_REPORT)
        found = {name: documents.get(release, name) for name in documents.names(release, UPGRADES)}
        self.seen.upgrades = {PurePosixPath(name).stem: one for name, one in found.items() if one is not None}

    @contextlib.contextmanager
    def _watched(self, what: str) -> Any:
        """Records that a server is unavailable, and continues: pages show the error."""
        try:
            yield
        except Exception as error:
            # Clients raise the errors of their servers and databases; the page shows any of them.
            if what not in self.seen.away:
                _LOGGER.warning("console: %s: %s", what, error)
            self.seen.away = self.seen.away | {what: f"{type(error).__name__}: {error}"}
        else:
            self.seen.away = {name: why for name, why in self.seen.away.items() if name != what}
