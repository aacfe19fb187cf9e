"""The bundle that answers: every request is pinned to one from its first lookup to its last, and a swap waits for none.

A swap is one assignment. Requests that began on the old bundle end on it; what it holds is released when the last of
them has ended. While experiments run, some users' requests are pinned to a challenger instead.
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
    """Parts that one request is pinned to.

    Attributes:
        service: answers.
        run: runs a call of the service: here where it is the champion's, on threads of its own where a challenger's.
        challenger: True if the service is a challenger's.
        arms: by an experiment's id, the arm that this answer counts for; epochs: and since when it is what it is.
        shadows: experiment and service of those that should rank it too, unseen.
    """

    service: RankService
    arms: dict[str, str]
    epochs: dict[str, int]
    shadows: tuple[tuple[str, RankService], ...]
    run: Callable[[Callable[[], RankingAnswer]], RankingAnswer]
    challenger: bool


class Router:
    """Holds the service that new requests get.

    Args:
        service: the first.
        close: Releases parts beside the first service, such as a mirror.
        answer_s: seconds until a challenger that has not answered counts as hanging.
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
        """Service that a request starting now would get."""
        return self._held.service

    @contextlib.contextmanager
    def pinned(self) -> Iterator[RankService]:
        """One service for a whole request, whatever is swapped meanwhile."""
        with self._lock:
            held = self._held
            held.users += 1
        try:
            yield held.service
        finally:
            self._leave(held)

    @contextlib.contextmanager
    def pinned_for(self, user: str) -> Iterator[Pinned]:
        """One service for a user's whole request: the champion's, or a challenger's that the user is given.

        An answer counts for an experiment where it is by one of the two bundles that are compared, and the user is
        given no other challenger. A user whom two layers give different challengers gets the champion and counts for
        no experiment, so that each experiment loses the same share of both its arms.
        """
        now = time.time()
        with self._lock:
            experiments, champion = self._experiments, self._held
            arms = {one.id: arm(user, one, experiments, now) for one in experiments} if experiments else {}
            seen = [one for one in experiments if not one.shadow]
            given = [one for one in seen if arms[one.id] == CHALLENGER and one.challenger in self._challengers]
            held = self._challengers[given[0].challenger] if len(given) == 1 else champion
            held.users += 1
            counted = given if len(given) == 1 else []
            if not given:
                here = champion.service.bundle.id
                counted = [one for one in seen if arms[one.id] == CONTROL and one.control == here]
            shadows = tuple(
                (one.id, self._challengers[one.challenger].service)
                for one in experiments
                if one.shadow and arms[one.id] == CHALLENGER and one.challenger in self._challengers
            )
        counts = {one.id: str(arms[one.id]) for one in counted}
        try:
            epochs = {one.id: one.epoch(now) for one in counted}
            run = held.bulkhead.run if held.bulkhead is not None else _here
            yield Pinned(held.service, counts, epochs, shadows, run, held.bulkhead is not None)
        finally:
            self._leave(held)

    def follow(
        self, experiments: Sequence[Experiment], opened: Mapping[str, tuple[RankService, Callable[[], None]]]
    ) -> None:
        """Runs these experiments from now on.

        Args:
            opened: services of challengers that are new, by bundle; those that no experiment names any more go when
                their last request has ended.
        """
        with self._lock:
            self._experiments = tuple(sorted(experiments, key=lambda one: one.name))
            self._challengers |= {
                bundle: _Held(service, close, Bulkhead(f"challenger {bundle}", answer_s=self._answer_s))
                for bundle, (service, close) in opened.items()
            }
            wanted = {one.challenger for one in experiments}
            gone = [self._challengers.pop(bundle) for bundle in list(self._challengers) if bundle not in wanted]
            for held in gone:
                held.users += 1
                held.retired = True
        for held in gone:
            self._leave(held)

    @property
    def challengers(self) -> dict[str, RankService]:
        """The services of challengers, by bundle."""
        with self._lock:
            return {bundle: held.service for bundle, held in self._challengers.items()}

    def swap(self, service: RankService, *, close: Callable[[], None] = lambda: None) -> RankService:
        """Gives new requests another service; returns the one before."""
        with self._lock:
            before, self._held = self._held, _Held(service, close)
            before.users += 1
        for watcher in self._watchers:
            watcher(service)
        before.retired = True
        self._leave(before)
        return before.service

    def watch(self, watcher: Callable[[RankService], None]) -> None:
        """Calls `watcher` with the service, now and after each swap."""
        self._watchers.append(watcher)
        watcher(self.service)

    def close(self) -> None:
        """Releases the parts of the services; no request may follow."""
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
