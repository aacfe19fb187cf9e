"""A server follows an alias of the registry: the bundle that it names takes over, and the one before goes in time."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable

from features.errors import BundleError, TesseraError
from models.bundle.bundle import Bundle
from models.registry.registry import CHAMPION
from serving.metrics import Metrics
from serving.ranking.service import RankService
from serving.rollout.lifecycle import running
from serving.store.fill import fill_store
from serving.store.protocol import OnlineStore
from serving.traffic.router import Router
from tessera.mirroring import mirrored
from tessera.settings import Settings

_LOGGER = logging.getLogger(__name__)
# How long a bundle that could not be loaded is left alone.
_AGAIN_S = 30.0


class ServiceOpener:
    """Makes the service of a bundle, over the settings' store.

    Args:
        mirror: keep its table in this process.
        metrics: counts failures of the mirror.
    """

    def __init__(self, settings: Settings, store: OnlineStore, *, mirror: bool, metrics: Metrics | None = None) -> None:
        self._metrics = metrics or Metrics()
        self._settings = settings
        self._store = store
        self._mirror = mirror

    def __call__(self, bundle: Bundle) -> tuple[RankService, Callable[[], None]]:
        """The service, ready to answer, and what lets go of it."""
        fill_store(self._store, bundle, storage=self._settings.storage)
        with contextlib.ExitStack() as stack:
            rows = (
                stack.enter_context(mirrored(self._settings, self._store, bundle, self._metrics))
                if self._mirror
                else None
            )
            service = RankService(bundle, self._store, rows)
            _warm(service)
            return service, stack.pop_all().close


class RegistryFollower:
    """Looks at the registry now and then; swaps when the alias names another bundle.

    A bundle that cannot be fetched, checked or loaded is left alone for a while, and the one that serves goes on.

    Args:
        current: what is swapped.
        opener: makes services.
        model: None: the only one.
        grace_s: how long the bundle before stays in the store: until every server has swapped, and a while for going
            back.
        metrics: counts swaps.
    """

    def __init__(
        self,
        settings: Settings,
        store: OnlineStore,
        current: Router,
        opener: ServiceOpener,
        *,
        model: str | None,
        grace_s: float,
        metrics: Metrics,
        alias: str = CHAMPION,
    ) -> None:
        self._settings = settings
        self._store = store
        self._current = current
        self._opener = opener
        self._model = model
        self._alias = alias
        self._grace_s = grace_s
        self._metrics = metrics
        self._registry = settings.open_registry(create=False)
        self._looking = threading.Lock()
        self._refused: dict[str, float] = {}
        self._followed: object = None

    def look(self) -> str:
        """Swaps where the alias names another bundle; returns the id of the one that serves.

        Raises:
            TesseraError: it names one that cannot be served; the one before goes on.
        """
        with self._looking:
            # Asked before: what changes meanwhile is followed at the next look.
            pulse = self._registry.pulse(self._current.service.bundle.dataset.name)
            found = self._follow_alias()
            self._follow_rollouts()
            self._followed = pulse
            return found

    def catch_up(self) -> None:
        """Looks once; what cannot be followed now is followed later, and the one that serves goes on."""
        try:
            self.look()
        except Exception:
            # The registry's client raises what its database or its server raises.
            _LOGGER.exception("the registry could not be followed; bundle %s goes on", self._current.service.bundle.id)

    def _follow_rollouts(self) -> None:
        """Opens the challengers of the experiments that run; one that cannot be opened serves nobody."""
        model = self._current.service.bundle.dataset.name
        experiments = running(self._registry, model)
        opened: dict[str, tuple[RankService, Callable[[], None]]] = {}
        for wanted in {one.challenger for one in experiments} - self._current.challengers.keys():
            if time.monotonic() < self._refused.get(wanted, 0.0):
                continue
            try:
                release = self._registry.release(model, wanted)
                opened[wanted] = self._opener(self._registry.open(release, self._settings.home / "bundles"))
            except TesseraError as error:
                self._metrics.swap_failures.inc()
                self._refused[wanted] = time.monotonic() + _AGAIN_S
                _LOGGER.warning("challenger %s serves nobody: %s", wanted, error)
        self._current.follow(experiments, opened)
        # Of those that nobody asks for any more nothing is remembered once their time has come.
        now, missing = time.monotonic(), {one.challenger for one in experiments} - self._current.challengers.keys()
        self._refused = {one: until for one, until in self._refused.items() if one in missing or now < until}

    def _follow_alias(self) -> str:
        release = self._registry.resolve(self._model, self._alias)
        before = self._current.service.bundle
        if release.bundle == before.id:
            return before.id
        try:
            bundle = self._registry.open(release, self._settings.home / "bundles")
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
        with contextlib.suppress(TesseraError):
            self._store.expire(before.id, after_s=self._grace_s)
        return bundle.id

    def run(self, stop: threading.Event, *, every_s: float) -> None:
        """Looks until told to stop."""
        while not stop.wait(every_s):
            try:
                # A look costs requests their time, so most of the time one question is all that is asked.
                if not self._changed():
                    continue
                wanted = self._registry.resolve(self._model, self._alias).bundle
                if time.monotonic() >= self._refused.get(wanted, 0.0):
                    self.look()
                else:
                    self._follow_rollouts()
            except TesseraError as error:
                _LOGGER.warning("bundle %s goes on: %s", self._current.service.bundle.id, error)
            except Exception:
                # The registry's client raises what its database or its server raises.
                _LOGGER.exception("the registry could not be asked; bundle %s goes on", self._current.service.bundle.id)

    def _changed(self) -> bool:
        """Whether there is something to follow: the registry's pulse is another one, or a refused bundle is due."""
        due = any(time.monotonic() >= until for until in self._refused.values())
        return due or self._registry.pulse(self._current.service.bundle.dataset.name) != self._followed


def _warm(service: RankService) -> None:
    """A first ranking, whose cost is nobody's request: libraries allocate and choose kernels then."""
    if service.ranks_items:
        service.rank("", None, 10)
