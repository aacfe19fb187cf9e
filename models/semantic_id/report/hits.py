"""How often what a user likes next shares codes with what they liked before, for frequent and for rare items.

What a ranker can gain from Semantic IDs on rare items is what their nodes tell: a hit at depth d is a positive test
event whose item shares its first d codes with an item of the user's history, other than itself. Beside it, by chance:
the same items against the histories of other users.

Shape letters: E events, N items, Q levels.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

_FREQUENT = 0.2


@dataclass(frozen=True)
class HitRate:
    """One group of items.

    Attributes:
        group: `frequent`, the fifth of the items with most training events, or `rare`, the others.
        events: positive test events of its items.
        rate: per depth, the share of them that hit.
        by_chance: per depth, the same with histories of other users.
    """

    group: str
    events: int
    rate: tuple[float, ...]
    by_chance: tuple[float, ...]


def hit_rates(codes: NDArray[np.uint16], coded: NDArray[np.bool_], examples: pl.DataFrame) -> list[HitRate]:
    """Measures the frame's test part.

    Args:
        codes: (N, Q) by item number; any where `coded` (N,) is false.
        examples: the frame's, with `item`, `history`, `label` and `split`.
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
