"""The one place that says how a request left its pin: by an answer, by the caller's own fault, or as a failure."""

import time
import uuid
from collections.abc import Callable, Sequence

from features.errors import EventError
from serving.metrics import Stopwatch
from serving.ranking.answer import RankingAnswer
from serving.ranking.service import RankService
from serving.rollout.impression import Impression
from serving.traffic.recorder import Recorder
from serving.traffic.router import Pinned, Router


def accounted(
    current: Router, pinned: Pinned, user: str, recorder: Recorder | None, ask: Callable[[RankService], RankingAnswer]
) -> tuple[RankingAnswer, Impression | None]:
    """A ranking by the pinned bundle, recorded as an impression of its arms.

    Whatever leaves without an answer is a failed impression: an exception of any type, scores that are no numbers, a
    call that hangs or was shed. The exception is input that the champion refuses as well: that is the caller's fault,
    and no impression.

    Args:
        ask: ranks by a service.

    Returns:
        The ranking and its impression; None where nothing is recorded.
    """
    watch = Stopwatch()
    try:
        found = pinned.run(lambda: ask(pinned.service))
    except BaseException as error:
        if recorder is not None and not _refused(current, pinned, error, ask):
            recorder.put(_impression(pinned, user, (), watch, failed=True))
        raise
    shown = None
    if recorder is not None:
        shown = _impression(pinned, user, found.items, watch)
        recorder.put(shown)
    return found, shown


def _refused(
    current: Router, pinned: Pinned, error: BaseException, ask: Callable[[RankService], RankingAnswer]
) -> bool:
    """Returns whether the caller's input is at fault, for the champion as well."""
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
        # The champion cannot be asked now: the challenger is not to blame for what nobody can tell.
        return True
    return False


def _impression(
    pinned: Pinned, user: str, items: Sequence[tuple[str, float]], watch: Stopwatch, *, failed: bool = False
) -> Impression:
    bundle = pinned.service.bundle
    return Impression(
        id=uuid.uuid4().hex,
        user=user,
        time_ms=time.time_ns() // 1_000_000,
        bundle=bundle.id,
        model=bundle.dataset.name,
        arms=pinned.arms,
        epochs=pinned.epochs,
        items=[item for item, _ in items],
        scores=[round(score, 6) for _, score in items],
        ms=round(1_000 * watch.seconds(), 3),
        failed=failed,
    )
