"""Measures hits: how often a user's next liked item shares codes with the items they liked before.

A ranker can gain from Semantic IDs on rare items only what their nodes carry. A hit at depth d is a positive test event
whose item shares its first d codes with another item of the user's history. The rate by chance compares the same items
with the histories of other users. Frequent and rare items are reported apart.

Shape letters: E events, N items, Q levels.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

_FREQUENT = 0.2


@dataclass(frozen=True)
class HitRate:
    """Hit rates of one group of items.

    Attributes:
        group: `frequent`, the fifth of the items with most training events, or `rare`, the others.
        events: Positive test events of the group's items.
        rate: Per depth, the share of the events that hit.
        by_chance: Per depth, the same share with histories of other users.
    """

    group: str
    events: int
    rate: tuple[float, ...]
    by_chance: tuple[float, ...]


def hit_rates(codes: NDArray[np.uint16], coded: NDArray[np.bool_], examples: pl.DataFrame) -> list[HitRate]:
    """Measures the frame's test part.

    Args:
        codes: (N, Q) by item number; arbitrary where `coded` (N,) is false.
        examples: Examples of the frame, with `item`, `history`, `label` and `split`.
    """
    train = examples.filter(pl.col("split") == "train")["item"].to_numpy()
    seen = np.bincount(train, minlength=len(codes))[: len(codes)]
    frequent = np.zeros(len(codes), dtype=np.bool_)
    frequent[np.argsort(-seen, kind="stable")[: int(len(codes) * _FREQUENT)]] = True
    test = examples.filter(
        (pl.col("split") == "test") & (pl.col("label") == 1) & (pl.col("history").list.len() > 0)
    ).with_row_index("event")
    test = test.filter(pl.Series(coded[test["item"].to_numpy().astype(np.int64)], dtype=pl.Boolean))
    items = test["item"].to_numpy().astype(np.int64)
    shifted = test["history"].gather(np.roll(np.arange(test.height), max(test.height // 2, 1))) if test.height else None
    rates = [_hits(codes, coded, items, test["history"])]
    rates.append(_hits(codes, coded, items, shifted) if shifted is not None else rates[0])
    found = []
    for group, chosen in (("frequent", frequent[items]), ("rare", ~frequent[items])):
        if chosen.any():
            own, chance = (tuple(float(share) for share in hits[chosen].mean(axis=0)) for hits in rates)
            found.append(HitRate(group, int(chosen.sum()), own, chance))
    return found


def _hits(
    codes: NDArray[np.uint16], coded: NDArray[np.bool_], items: NDArray[np.int64], history: pl.Series
) -> NDArray[np.bool_]:
    """Returns (E, Q): whether event e's item shares its first d codes with one of its history, for d from 1."""
    past = history.explode(empty_as_null=False).to_numpy().astype(np.int64)
    event = np.repeat(np.arange(len(items)), history.list.len().to_numpy())
    usable = coded[past] & (past != items[event])
    past, event = past[usable], event[usable]
    same = np.logical_and.accumulate(codes[past] == codes[items[event]], axis=1)
    found = np.zeros((len(items), codes.shape[1]), dtype=np.bool_)
    for depth in range(codes.shape[1]):
        found[event[same[:, depth]], depth] = True
    return found
