"""Records the outcome of each ranking request: an answer, a fault of the caller, or a failure of the bundle."""

import time
import uuid
from collections.abc import Callable, Sequence

from features.errors import EventError
from features.shown.message import Impression
from serving.metrics import Stopwatch
from serving.policy.arrange import Arrangement
from serving.ranking.answer import RankingAnswer
from serving.ranking.service import RankService
from serving.traffic.explore import arranged
from serving.traffic.recorder import Recorder
from serving.traffic.router import Pinned, Router


def accounted(
    current: Router,
    pinned: Pinned,
    user: str,
    recorder: Recorder | None,
    ask: Callable[[RankService], RankingAnswer],
    *,
    request: str = "",
    surface: str = "",
    sample: Callable[[str, RankingAnswer], None] | None = None,
) -> tuple[RankingAnswer, Impression | None]:
    """Ranks by the pinned bundle and records an impression of its arms.

    A request without an answer is a failed impression: an exception of any type, scores that are no numbers, a call
    that hangs or was shed. If the champion refuses the input too, the caller is at fault, and no impression is
    recorded.

    Args:
        current: Router that gives the champion.
        pinned: Bundle and arms of the request.
        user: Id of the user.
        recorder: Receives the impression. None records no impression.
        ask: Ranks by a service.
        request: Id of the request. Default: a new one.
        surface: Place where the answer is shown, from the request's context.
        sample: Receives the request's id and the answer. Decides by the id whether to log the answer's inputs.

    Returns:
        The ranking and its impression, or None if no impression is recorded.
    """
    watch, request = Stopwatch(), request or uuid.uuid4().hex
    try:
        ranking = pinned.run(lambda: ask(pinned.service))
    except BaseException as error:
        if recorder is not None and not _refused(current, pinned, error, ask):
            recorder.put(_impression(pinned, request, user, None, watch, surface=surface))
        raise
    if sample is not None:
        sample(request, ranking)
    shown = None
    if recorder is not None:
        placement = pinned.service.bundle.dataset.events.placement
        ranking, explored = arranged(request, ranking, rate=placement.explore if placement is not None else 0.0)
        shown = _impression(pinned, request, user, ranking, watch, surface=surface, explored=explored)
        recorder.put(shown)
    return ranking, shown


def _refused(
    current: Router, pinned: Pinned, error: BaseException, ask: Callable[[RankService], RankingAnswer]
) -> bool:
    """Returns whether the caller is at fault, because the champion refuses the input too."""
    if not isinstance(error, EventError):
        return False
    if not pinned.challenger:
        return True
    try:
        with current.pinned() as champion:
            ask(champion)
    except EventError:
        return True
    except Exception:
        # The champion fails too, so the fault cannot be attributed to the challenger.
        return True
    return False


def _impression(
    pinned: Pinned,
    request: str,
    user: str,
    ranking: RankingAnswer | None,
    watch: Stopwatch,
    *,
    surface: str,
    explored: Sequence[int] = (),
) -> Impression:
    """Returns the impression of a ranking as it is shown; None for a request that failed."""
    bundle = pinned.service.bundle
    items = ranking.items if ranking is not None else []
    context, candidates = ranking.sent if ranking is not None else ({}, {})
    inputs = ranking.inputs if ranking is not None and bundle.dataset.events.reads_clock else None
    return Impression(
        id=request,
        user=user,
        time_ms=time.time_ns() // 1_000_000,
        bundle=bundle.id,
        model=bundle.dataset.name,
        arms=pinned.arms,
        epochs=pinned.epochs,
        items=[item for item, _ in items],
        scores=[round(score, 6) for score in (ranking.judged if ranking is not None else ())],
        ms=round(1_000 * watch.seconds(), 3),
        failed=ranking is None,
        surface=surface,
        context=context,
        candidates=candidates,
        explored=list(explored),
        read_us=inputs.now_us if inputs is not None else None,
        policy=ranking.policy if ranking is not None else "",
        propensities=propensities_of(ranking.arrangement) if ranking is not None else [],
        sources=ranking.sources if ranking is not None else [],
    )


def propensities_of(arrangement: Arrangement | None) -> list[float]:
    """Returns the probability with which chance chose each item of an answer; empty if chance chose none."""
    if arrangement is None or not arrangement.drawn.any():
        return []
    found: list[float] = arrangement.propensities.tolist()
    return found
