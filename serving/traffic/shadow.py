"""Shadow challengers: rank the champion's items again after the answer was sent. Users do not see these rankings.

A thread ranks the jobs of a short queue. It waits until no request is being answered, since a shadow would slow the
request down. If no such moment comes soon, the job is shed. Shadows are therefore shed first under load.
"""

import logging
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy

from features.shown.message import Impression, Shadowed
from features.value.field import ITEM_ID
from serving.background import Background, Rounds
from serving.load_state import State
from serving.metrics import Metrics
from serving.ranking.answer import RankingAnswer
from serving.ranking.service import RankService
from serving.traffic.recorder import Recorder

_LOGGER = logging.getLogger(__name__)
_MOST = 16
_PATIENCE_S, _POLL_S, _WAIT_S = 0.05, 0.001, 0.2


@dataclass(frozen=True)
class _Job:
    experiment: str
    service: RankService
    shown: Impression


class Shadows:
    """Ranks shown items again by shadow challengers.

    Args:
        recorder: Receives the results.
        metrics: Counts ranked, failed and shed jobs.
        state: State of the server, with the number of requests that are being answered.
        sample: Receives the request's id and a shadow's answer, as in `serving.traffic.accounting.accounted`.
    """

    def __init__(
        self,
        recorder: Recorder,
        metrics: Metrics,
        state: State,
        *,
        sample: Callable[[str, RankingAnswer], None] | None = None,
    ) -> None:
        self._sample = sample
        self._recorder = recorder
        self._metrics = metrics
        self._state = state
        self._queue: queue.Queue[_Job] = queue.Queue(_MOST)
        rounds = Rounds("shadows", "a shadow could not rank", metrics)
        self._worker = Background("shadows", lambda stop: self._rank_next(), rounds, every_s=0.0, at_once=True)

    def offer(self, shadows: tuple[tuple[str, RankService], ...], shown: Impression) -> None:
        """Queues a job for each shadow, or sheds the job if the queue is full. Returns at once.

        Args:
            shadows: Experiments and services.
            shown: Impression of the champion's answer.
        """
        for experiment, service in shadows:
            try:
                self._queue.put_nowait(_Job(experiment, service, shown))
            except queue.Full:
                self._metrics.shadows.labels("shed").inc()

    def close(self) -> None:
        """Ranks the queued jobs and ends the thread."""
        if self._worker.close(10):
            with self._worker.rounds.round():
                while not self._queue.empty():
                    self._rank_next()

    def _rank_next(self) -> None:
        try:
            job = self._queue.get(timeout=_WAIT_S)
        except queue.Empty:
            return
        if not self._quiet():
            self._metrics.shadows.labels("shed").inc()
            return
        shadowed = _ranked(job, self._sample)
        self._metrics.shadows.labels("failed" if shadowed.failed else "ranked").inc()
        self._recorder.put(shadowed)

    def _quiet(self) -> bool:
        """Waits for a moment without requests. Returns whether the moment came in time."""
        deadline = time.monotonic() + _PATIENCE_S
        while self._state.in_flight:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True


def _ranked(job: _Job, sample: Callable[[str, RankingAnswer], None] | None) -> Shadowed:
    try:
        return _compared(job, job.shown, sample)
    except Exception as error:
        # An error of the challenger is a result of the experiment and must not affect requests.
        _LOGGER.warning("shadow %s: %s: %s", job.experiment, type(error).__name__, error)
        return Shadowed(job.shown.id, job.experiment, job.shown.time_ms, failed=True)


def _compared(job: _Job, shown: Impression, sample: Callable[[str, RankingAnswer], None] | None) -> Shadowed:
    began = time.perf_counter()
    events = job.service.bundle.dataset.events
    context = {name: value for name, value in shown.context.items() if name in events.request}
    known = [
        {name: value for name, value in shown.values_at(place).items() if name in events.candidate}
        for place in range(len(shown.items) if events.candidate else 0)
    ]
    asked = [{ITEM_ID: item, **own} for item, own in zip(shown.items, known, strict=True)] if known else shown.items
    answer = job.service.rank(shown.user, asked, len(shown.items), context)
    ms = 1_000 * (time.perf_counter() - began)
    scores = dict(zip((item for item, _ in answer.items), answer.judged, strict=True))
    if sample is not None:
        sample(shown.id, answer)
    champion, challenger = np.array(shown.scores), np.array([scores[item] for item in shown.items])
    comparable = len(champion) > 1 and champion.std() > 0 and challenger.std() > 0
    return Shadowed(
        shown.id,
        job.experiment,
        shown.time_ms,
        correlation=float(scipy.stats.spearmanr(champion, challenger).statistic) if comparable else None,
        drift=float((challenger - champion).mean()) if len(champion) else 0.0,
        ms=ms,
    )
