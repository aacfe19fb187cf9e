"""Aggregates of one request: the records that it reads, and the columns of its candidates."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from features.aggregate.aggregator import Aggregator, Occasions, group_keys
from features.aggregate.order import NEVER
from features.aggregate.plan import AggregatePlan
from features.history import Jagged
from models.bundle.aggregate_record import WATERMARK, key_id
from models.bundle.scorer import Scorer

Parts = Mapping[str, Jagged]
Columns = NDArray[np.float32]


@dataclass(frozen=True)
class AsOf:
    """Time as of which aggregates were answered.

    Attributes:
        time: Microseconds since 1970, or the position of the newest event where the dataset has no clock.
        asked: True if the request gave the time; else the time is that of the newest event in the stream.
    """

    time: int
    asked: bool


def record_ids(plan: AggregatePlan, parts: Parts) -> list[str]:
    """Returns the ids of the records that candidates read, the watermark's first."""
    found = [WATERMARK]
    for number, group in enumerate(plan.groups):
        keys, _ = group_keys(group, parts)
        found += [key_id(number, key) for key in np.unique(keys).tolist()]
    return found


def answer(state: Aggregator, parts: Parts, candidates: int, at: int | None) -> tuple[Columns, AsOf | None]:
    """Answers for the candidates of one request.

    Args:
        state: State that has the candidates' keys; it does not change.
        parts: Keys of each candidate's values by part of the plan.
        candidates: n, their number.
        at: Time as of which to answer; by default right after the newest event.

    Returns:
        (n, A) columns of the plan, and the time; no time where nothing was ever counted and none was asked.
    """
    known = state.watermark > NEVER
    moment = at if at is not None else state.watermark + 1 if known else 0
    occasions = Occasions(
        times=np.full(candidates, moment, dtype=np.int64),
        keys=parts,
        labels=np.zeros(0, dtype=np.float32),
        enters=np.zeros(candidates, dtype=np.bool_),
    )
    columns, _ = state.advance(occasions)
    if at is not None:
        return columns, AsOf(at, asked=True)
    return columns, AsOf(state.watermark, asked=False) if known else None


def published_columns(state: Aggregator, scorer: Scorer, user: str, items: NDArray[np.int64]) -> Columns | None:
    """Returns the columns (n, A) of candidates (n,) as of a bundle's newest event; None without aggregates."""
    if not state.plan.columns:
        return None
    columns, _ = answer(state, scorer.aggregate_keys(user, items), len(items), None)
    return columns
