"""Challengers in the shadow: they rank what the champion ranked, after it was sent, and nobody sees it.

One thread and a short queue. A shadow ranks while no request is being answered, since it would take its time from that
one; where no such moment comes soon it goes without. So under load shadows are the first to be shed.
"""

import logging
import queue
import time
from dataclasses import dataclass

import numpy as np
import scipy

from serving.background import Background, Rounds
from serving.load_state import State
from serving.metrics import Metrics
from serving.ranking.service import RankService
from serving.rollout.impression import Impression, Shadowed
from serving.traffic.recorder import Recorder

_LOGGER = logging.getLogger(__name__)
_MOST = 16
_PATIENCE_S, _LOOK_S, _WAIT_S = 0.05, 0.001, 0.2


@dataclass(frozen=True)
class _Job:
    experiment: str
    service: RankService
    shown: Impression


class Shadows:
    """Ranks again what was shown.

    Args:
        recorder: takes what came of it.
        state: says how many requests are being answered.
    """

    def __init__(self, recorder: Recorder, metrics: Metrics, state: State) -> None:
        self._recorder = recorder
        self._metrics = metrics
        self._state = state
        self._queue: queue.Queue[_Job] = queue.Queue(_MOST)
        rounds = Rounds("shadows", "a shadow could not rank", metrics)
        self._worker = Background("shadows", lambda stop: self._rank_next(), rounds, every_s=0.0, at_once=True)

    def offer(self, shadows: tuple[tuple[str, RankService], ...], shown: Impression) -> None:
        """Ranks in the background, where there is room; returns at once."""
        for experiment, service in shadows:
            try:
                self._queue.put_nowait(_Job(experiment, service, shown))
            except queue.Full:
                self._metrics.shadows.labels("shed").inc()

    def close(self) -> None:
        """Ranks the queued jobs, and ends."""
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
        shadowed = _ranked(job)
        self._metrics.shadows.labels("failed" if shadowed.failed else "ranked").inc()
        self._recorder.put(shadowed)

    def _quiet(self) -> bool:
        """Waits for a moment in which no request is being answered; says whether one came."""
        give_up = time.monotonic() + _PATIENCE_S
        while self._state.in_flight:
            if time.monotonic() > give_up:
                return False
            time.sleep(_LOOK_S)
        return True


def _ranked(job: _Job) -> Shadowed:
    try:
        return _compared(job, job.shown)
    except Exception as error:
        # Whatever a challenger raises is a figure of the experiment, and no concern of anybody's request.
        _LOGGER.warning("shadow %s: %s: %s", job.experiment, type(error).__name__, error)
        return Shadowed(job.shown.id, job.experiment, job.shown.time_ms, failed=True)


def _compared(job: _Job, shown: Impression) -> Shadowed:
    began = time.perf_counter()
    again = dict(job.service.rank(shown.user, shown.items, len(shown.items)).items)
    ms = 1_000 * (time.perf_counter() - began)
    mine, theirs = np.array(shown.scores), np.array([again[item] for item in shown.items])
    together = len(mine) > 1 and mine.std() > 0 and theirs.std() > 0
    return Shadowed(
        shown.id,
        job.experiment,
        shown.time_ms,
        correlation=float(scipy.stats.spearmanr(mine, theirs).statistic) if together else None,
        drift=float((theirs - mine).mean()) if len(mine) else 0.0,
        ms=ms,
    )
