"""Aggregates of requests: answered from the mirror, or from records that were read with the history."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from features.aggregate.plan import AggregatePlan
from features.history import Jagged
from models.bundle import aggregate_record
from models.bundle.request_aggregates import AsOf, answer, record_ids
from models.bundle.scorer import Scorer
from serving.ranking.histories import UserRecords
from serving.ranking.mirror import Mirror
from serving.ranking.rows import RowReader


@dataclass(frozen=True)
class Asked:
    """Aggregates that one request reads.

    Attributes:
        keys: Keys of each candidate's values by part of the plan.
        candidates: n, the number of candidates.
        mirror: Mirror that answers, None if the store does.
        ids: Records to read from the store; empty if the mirror answers.
    """

    keys: Mapping[str, Jagged]
    candidates: int
    mirror: Mirror | None = None
    ids: Sequence[str] = ()


class RequestAggregates:
    """Answers for the aggregates of requests.

    Args:
        plan: Plan of the bundle.
        scorer: Knows users and items.
        rows: Has the mirror, if there is one.
    """

    def __init__(self, plan: AggregatePlan, scorer: Scorer, rows: RowReader) -> None:
        self._plan = plan
        self._scorer = scorer
        self._rows = rows

    def of(self, user: str, items: NDArray[np.int64]) -> Asked:
        """Returns what candidates (n,) read. The catalogue must not change during the call."""
        if not self._plan.columns:
            return Asked({}, len(items))
        keys = self._scorer.aggregate_keys(user, items)
        # Decided once: a mirror that begins to lag during the request still answers it.
        mirror = self._rows.mirrored(away=False)
        return Asked(keys, len(items), mirror, () if mirror else record_ids(self._plan, keys))

    def answer(
        self, asked: Asked, records: UserRecords, at: int | None
    ) -> tuple[NDArray[np.float32] | None, AsOf | None]:
        """Returns the columns (n, A) and the time as of which they are; None for both without aggregates.

        Args:
            asked: See `of`.
            records: Records that were read.
            at: See `models.bundle.request_aggregates.answer`.

        Raises:
            EventError: A record has another size than the plan's.
        """
        if not self._plan.columns:
            return None, None
        mirror = asked.mirror or (self._rows.mirrored(away=True) if records.stale else None)
        if mirror is not None:
            return mirror.aggregates(asked.keys, asked.candidates, at)
        return answer(aggregate_record.restored(self._plan, records.aggregates), asked.keys, asked.candidates, at)
