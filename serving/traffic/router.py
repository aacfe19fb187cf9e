"""The router: pins every request to one bundle from the first lookup to the last.

A swap is one assignment and waits for no request. A request that began on the old bundle ends on the old bundle, whose
resources are released when its last request has ended. While experiments run, the requests of some users are pinned to
a challenger.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from serving.ranking.answer import RankingAnswer
from serving.ranking.service import RankService
from serving.rollout.experiment import CHALLENGER, CONTROL, Experiment, arm
from serving.traffic.bulkhead import Bulkhead


@dataclass(frozen=True)
class Pinned:
    """Service and arms of one request.

    Attributes:
        service: Service that answers.
        arms: Arm for which the answer counts, by the experiment's id.
        epochs: Start of the experiment's epoch, Unix seconds, by the experiment's id.
        shadows: Experiments and services that should rank the shown items too. Users do not see these rankings.
        run: Runs a call of the service. Calls of the champion run in the caller's thread, and calls of a challenger on
            separate threads.
        challenger: True if the service is a challenger's.
    """

    service: RankService
    arms: dict[str, str]
    epochs: dict[str, int]
    shadows: tuple[tuple[str, RankService], ...]
    run: Callable[[Callable[[], RankingAnswer]], RankingAnswer]
    challenger: bool


class Router:
    """Assigns requests to services.

    Args:
        service: Service of the first champion.
        close: Releases the resources of the first service, such as a mirror.
        answer_s: Time after which a call of a challenger counts as hanging, seconds.
    """

    def __init__(
        self, service: RankService, *, close: Callable[[], None] = lambda: None, answer_s: float = 5.0
    ) -> None:
        self._answer_s = answer_s
        self._lock = threading.Lock()
        self._held = _Held(service, close)
        self._watchers: list[Callable[[RankService], None]] = []
        self._experiments: tuple[Experiment, ...] = ()
        self._challengers: dict[str, _Held] = {}

    @property
    def service(self) -> RankService:
        """Service of the champion, which new requests get."""
        return self._held.service

    @contextlib.contextmanager
    def pinned(self) -> Iterator[RankService]:
        """Yields the champion's service for a whole request. A swap meanwhile does not change it."""
        with self._lock:
            held = self._held
            held.users += 1
        try:
            yield held.service
        finally:
            self._leave(held)

    @contextlib.contextmanager
    def pinned_for(self, user: str) -> Iterator[Pinned]:
        """Yields the service for a user's whole request: the champion's, or the service of the user's challenger.

        An answer counts for an experiment if one of the experiment's two bundles answers and no other experiment
        assigns a challenger to the user. If two layers assign different challengers, the user gets the champion and
        counts for no experiment. Each experiment then loses the same share of both arms.

        Args:
            user: Id of the user.
        """
        now = time.time()
        with self._lock:
            experiments, champion = self._experiments, self._held
            arms = {each.id: arm(user, each, experiments, now) for each in experiments} if experiments else {}
            chosen = [
                each for each in experiments if arms[each.id] == CHALLENGER and each.challenger in self._challengers
            ]
            assigned = [each for each in chosen if not each.shadow]
            held = self._challengers[assigned[0].challenger] if len(assigned) == 1 else champion
            held.users += 1
            counted = assigned if len(assigned) == 1 else []
            if not assigned:
                control = champion.service.bundle.id
                counted = [
                    each
                    for each in experiments
                    if not each.shadow and arms[each.id] == CONTROL and each.control == control
                ]
            shadows = tuple((each.id, self._challengers[each.challenger].service) for each in chosen if each.shadow)
        counts = {each.id: str(arms[each.id]) for each in counted}
        try:
            epochs = {each.id: each.epoch(now) for each in counted}
            run = held.bulkhead.run if held.bulkhead is not None else _here
            yield Pinned(held.service, counts, epochs, shadows, run, held.bulkhead is not None)
        finally:
            self._leave(held)

    def follow(
        self, experiments: Sequence[Experiment], opened: Mapping[str, tuple[RankService, Callable[[], None]]]
    ) -> None:
        """Replaces the running experiments.

        If no experiment names a challenger any more, its service is released when its last request has ended.

        Args:
            experiments: Experiments that run from now on.
            opened: Services of new challengers and functions that release their resources, by bundle.
        """
        with self._lock:
            self._experiments = tuple(sorted(experiments, key=lambda experiment: experiment.name))
            self._challengers |= {
                bundle: _Held(service, close, Bulkhead(f"challenger {bundle}", answer_s=self._answer_s))
                for bundle, (service, close) in opened.items()
            }
            named = {experiment.challenger for experiment in experiments}
            retired = [self._challengers.pop(bundle) for bundle in list(self._challengers) if bundle not in named]
            for held in retired:
                held.users += 1
                held.retired = True
        for held in retired:
            self._leave(held)

    @property
    def challengers(self) -> dict[str, RankService]:
        """Services of the challengers, by bundle."""
        with self._lock:
            return {bundle: held.service for bundle, held in self._challengers.items()}

    def swap(self, service: RankService, *, close: Callable[[], None] = lambda: None) -> RankService:
        """Replaces the champion's service for new requests. Returns the previous service.

        Args:
            service: New service.
            close: Releases the resources of the new service.
        """
        with self._lock:
            before, self._held = self._held, _Held(service, close)
            before.users += 1
        for watcher in self._watchers:
            watcher(service)
        before.retired = True
        self._leave(before)
        return before.service

    def watch(self, watcher: Callable[[RankService], None]) -> None:
        """Calls `watcher` with the champion's service, now and after each swap."""
        self._watchers.append(watcher)
        watcher(self.service)

    def close(self) -> None:
        """Releases the resources of all services. No request may follow."""
        self.follow((), {})
        self._held.close()

    def _leave(self, held: "_Held") -> None:
        with self._lock:
            held.users -= 1
            last = held.retired and not held.users
        if last:
            held.close()


def _here(call: Callable[[], RankingAnswer]) -> RankingAnswer:
    return call()


class _Held:
    def __init__(self, service: RankService, close: Callable[[], None], bulkhead: Bulkhead | None = None) -> None:
        self.service = service
        self._close = close
        self.bulkhead = bulkhead
        self.users = 0
        self.retired = False

    def close(self) -> None:
        self._close()
        if self.bulkhead is not None:
            self.bulkhead.close()
