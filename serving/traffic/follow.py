"""Follows an alias of the registry: the server swaps to the bundle that the alias names.

The replaced bundle stays in the store for a grace period.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from features.collector import frozen_heap
from features.errors import BundleError, TesseraError
from models.bundle.bundle import Bundle
from models.registry.registry import Registry
from models.registry.release import CHAMPION
from serving.background import Background, Rounds
from serving.metrics import Metrics
from serving.ranking.rows import RowReader
from serving.ranking.service import RankService
from serving.retrieval.rows import RowKind
from serving.rollout.lifecycle import running
from serving.store.fill import fill_store
from serving.store.protocol import OnlineStore
from serving.traffic.router import Router

_LOGGER = logging.getLogger(__name__)
# Seconds until a bundle that could not be loaded is tried again.
_AGAIN_S = 30.0


class ServiceOpener:
    """Opens the service of a bundle over a store.

    Args:
        store: Store of rows, histories and items.
        storage: Format of the rows of a bundle that is loaded into the store: float32, float16 or int8.
        mirror: Opens a source of a bundle's rows in this process. None: rows come from the store.
        deltas: Name of the deltas' topic, whose position in the store the answers name. None: the position is 0.
        index: Format of the rows of the search indexes.
    """

    def __init__(
        self,
        store: OnlineStore,
        *,
        storage: str = "float32",
        mirror: Callable[[Bundle], AbstractContextManager[RowReader]] | None = None,
        deltas: str | None = None,
        index: RowKind = "float32",
    ) -> None:
        self._deltas, self._index = deltas, index
        self._store = store
        self._storage = storage
        self._mirror = mirror

    def __call__(self, bundle: Bundle) -> tuple[RankService, Callable[[], None]]:
        """Returns the service, ready to answer, and a function that closes the mirror.

        Raises:
            TesseraError: The store cannot be filled, or the mirror cannot be opened.
        """
        fill_store(self._store, bundle, storage=self._storage)
        with contextlib.ExitStack() as stack:
            rows = stack.enter_context(self._mirror(bundle)) if self._mirror is not None else None
            service = RankService(bundle, self._store, rows, deltas=self._deltas, index=self._index)
            _warm(service)
            stack.enter_context(frozen_heap())
            return service, stack.pop_all().close

    def retire(self, bundle: str, *, after_s: float) -> None:
        """Lets a bundle leave the store after some seconds. Does nothing if the store is unavailable.

        Args:
            bundle: Id of the bundle.
            after_s: Seconds until the store drops the bundle.
        """
        with contextlib.suppress(TesseraError):
            self._store.expire(bundle, after_s=after_s)


class RegistryFollower:
    """Polls the registry and swaps when the alias names another bundle.

    If a bundle cannot be fetched, verified or loaded, it is not tried again for 30 s, and the current bundle continues.

    Args:
        registry: Names the bundles and the experiments.
        bundles: Directory of fetched bundles.
        current: Router whose service is swapped.
        opener: Opens services.
        model: Name of the model. None: the registry holds one model.
        grace_s: Seconds that a replaced bundle stays in the store. All servers must have swapped by then.
        metrics: Counts swaps and failed swaps.
        alias: Alias to follow.
    """

    def __init__(
        self,
        registry: Registry,
        bundles: Path,
        current: Router,
        opener: ServiceOpener,
        *,
        model: str | None,
        grace_s: float,
        metrics: Metrics,
        alias: str = CHAMPION,
    ) -> None:
        self._registry = registry
        self._bundles = bundles
        self._current = current
        self._opener = opener
        self._model = model
        self._alias = alias
        self._grace_s = grace_s
        self._metrics = metrics
        self._looking = threading.Lock()
        self._refused: dict[str, float] = {}
        self._followed: object = None

    def look(self) -> str:
        """Swaps if the alias names another bundle; returns the id of the bundle that serves.

        Raises:
            TesseraError: The alias names a bundle that cannot be served. The current bundle continues.
        """
        with self._looking:
            # The pulse is read first. The next poll follows a change that comes after it.
            pulse = self._registry.pulse(self._current.service.bundle.dataset.name)
            bundle = self._follow_alias()
            self._follow_rollouts()
            self._followed = pulse
            return bundle

    def catch_up(self) -> None:
        """Polls once. Logs a failure, after which the current bundle continues and a later poll tries again."""
        try:
            self.look()
        except Exception:
            # The registry's client raises the errors of its database or its server.
            _LOGGER.exception(
                "the registry could not be followed; bundle %s still serves", self._current.service.bundle.id
            )

    def _follow_rollouts(self) -> None:
        """Opens the challengers of running experiments. A challenger that cannot be opened gets no requests."""
        model = self._current.service.bundle.dataset.name
        experiments = running(self._registry, model)
        opened: dict[str, tuple[RankService, Callable[[], None]]] = {}
        challengers = {experiment.challenger for experiment in experiments}
        for challenger in challengers - self._current.challengers.keys():
            if time.monotonic() < self._refused.get(challenger, 0.0):
                continue
            try:
                release = self._registry.release(model, challenger)
                opened[challenger] = self._opener(self._registry.open(release, self._bundles))
            except TesseraError as error:
                self._metrics.swap_failures.inc()
                self._refused[challenger] = time.monotonic() + _AGAIN_S
                _LOGGER.warning("challenger %s cannot serve: %s", challenger, error)
        self._current.follow(experiments, opened)
        # A refused bundle is forgotten when its pause is over and no experiment names it.
        now, missing = time.monotonic(), challengers - self._current.challengers.keys()
        self._refused = {bundle: until for bundle, until in self._refused.items() if bundle in missing or now < until}

    def _follow_alias(self) -> str:
        release = self._registry.resolve(self._model, self._alias)
        before = self._current.service.bundle
        if release.bundle == before.id:
            return before.id
        try:
            bundle = self._registry.open(release, self._bundles)
            if bundle.id != release.bundle or bundle.dataset.name != release.model:
                raise BundleError(f"bundle {bundle.id} of {bundle.dataset.name} is not what {release.model} names")
            service, close = self._opener(bundle)
        except TesseraError:
            self._metrics.swap_failures.inc()
            self._refused[release.bundle] = time.monotonic() + _AGAIN_S
            raise
        self._current.swap(service, close=close)
        self._metrics.swaps.inc()
        _LOGGER.info("bundle %s took over from %s", bundle.id, before.id)
        self._opener.retire(before.id, after_s=self._grace_s)
        return bundle.id

    def follow(self, *, every_s: float) -> Background:
        """Polls in a thread until the returned work is closed.

        Args:
            every_s: Seconds between two polls.
        """
        rounds = Rounds("registry", "the registry cannot be followed; the bundle still serves", self._metrics)
        return Background("follower", lambda stop: self.poll(), rounds, every_s=every_s)

    def poll(self) -> None:
        """Swaps if the registry has changed and its bundle is not refused for now.

        Raises:
            TesseraError: The alias names a bundle that cannot be served. The current bundle continues.
        """
        # A full check slows requests down, so most polls read the pulse alone.
        if not self._changed():
            return
        champion = self._registry.resolve(self._model, self._alias).bundle
        if time.monotonic() >= self._refused.get(champion, 0.0):
            self.look()
        else:
            self._follow_rollouts()

    def _changed(self) -> bool:
        """Returns True if the registry's pulse has changed or a refused bundle is due."""
        due = any(time.monotonic() >= until for until in self._refused.values())
        return due or self._registry.pulse(self._current.service.bundle.dataset.name) != self._followed


def _warm(service: RankService) -> None:
    """Ranks once, because libraries allocate memory and choose kernels at the first ranking."""
    if service.ranks_items:
        service.rank("", None, 10)
