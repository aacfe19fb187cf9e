"""Rows of encoders that learn from the shop: tuned views, bases side by side, merged heads.

Each table holds its control: permuted pairs beside tuned views, the heads of a single task beside a merged head.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.content.chain import apply_steps
from features.content.step import VectorStep
from models.encoder.losses import LossOptions
from models.encoder.measure import alignment, nearest, uniformity
from models.encoder.merge import best_weights, merge
from models.encoder.pairs import shared_value
from models.encoder.tune import tune
from models.encoder.tuning.options import TuneOptions
from tessera.bench.encoder.shop import LSA, Shop

BASE, TUNED, LOW_RANK, HARD = "base", "tuned", "tuned, low rank", "tuned, hard labels"
PERMUTED = "tuned, permuted pairs"
_OPTIONS: dict[str, dict[str, Any]] = {
    TUNED: {},
    LOW_RANK: {"head": "low-rank", "rate": 2e-3},
    HARD: {"loss": LossOptions(labels="hard")},
    "tuned, focal": {"loss": LossOptions(focal=0.5)},
    "tuned, mixed negatives": {"loss": LossOptions(mixed=16)},
    "tuned, progressive": {"loss": LossOptions(progressive=1.0)},
}
_COMMON = 10


def similar(shop: Shop, base: str, variants: Sequence[str] = tuple(_OPTIONS)) -> list[dict[str, Any]]:
    """Returns rows of the base, of tuned views and of the control: recall of co-liked new items, and spread."""
    vectors = shop.vectors(base)
    task = shop.task(vectors)
    rows = [row_of(shop, base, BASE, vectors, pairs=0, rounds=0)]
    for variant in [*variants, PERMUTED]:
        start = time.perf_counter()
        own = task.permuted(shop.seed) if variant == PERMUTED else task
        tuned = tune([own], TuneOptions(seed=shop.seed, **_OPTIONS.get(variant, {})))
        seconds = time.perf_counter() - start
        row = row_of(shop, base, variant, apply_steps(tuned.steps, vectors), pairs=own.pairs, rounds=tuned.rounds)
        rows.append(row | {"fit_s": seconds})
    return rows


def row_of(
    shop: Shop, base: str, variant: str, vectors: NDArray[np.float32], *, pairs: int, rounds: int
) -> dict[str, Any]:
    first, second = shop.gold.of, shop.gold.item
    return {
        "seed": shop.seed,
        "base": base,
        "variant": variant,
        "recall@50": shop.recall(vectors),
        "uniformity": uniformity(vectors, seed=shop.seed),
        "alignment": alignment(vectors[first], vectors[second]),
        "pairs": pairs,
        "rounds": rounds,
    }


def side_by_side(shop: Shop, bases: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a row of each base: recall, and AUC of the logistic content ranker on new items."""
    return [
        {"seed": shop.seed, "base": base, "variant": BASE, "recall@50": shop.recall(own), "content_auc": shop.auc(own)}
        for base in bases
        for own in [shop.vectors(base)]
    ]


def merged(shop: Shop, column: str, base: str = LSA) -> list[dict[str, Any]]:
    """Returns rows of two heads, of both merged, and of one head trained on both tasks.

    Args:
        shop: The shop.
        column: Column whose values make the second task, such as people.
        base: Base of the vectors.
    """
    vectors, values = shop.vectors(base), shop.column(column)
    tasks = (
        shop.task(vectors),
        shared_value(vectors, values, ~shop.new, name=column, seed=shop.seed),
    )
    options = TuneOptions(seed=shop.seed)
    first, second = (tune([task], options).steps for task in tasks)
    joint = tune(tasks, options).steps
    weights = best_weights(first, second, tasks, shop.seed)
    heads: dict[str, Sequence[VectorStep]] = {
        BASE: (),
        "head of co-likes": first,
        f"head of {column}": second,
        "joint": joint,
        "merged": merge(first, second, weights),
    }
    return [
        {
            "seed": shop.seed,
            "base": base,
            "variant": name,
            "recall@50": shop.recall(own),
            "shares_value@10": _shares_value(own, values, shop.new),
            "weights": list(weights) if name == "merged" else None,
        }
        for name, steps in heads.items()
        for own in [apply_steps(steps, vectors)]
    ]


def _shares_value(vectors: NDArray[np.float32], values: list[list[str]], new: NDArray[np.bool_]) -> float:
    """Returns the share of the ten nearest known items that have a value in common with a new item, in the mean."""
    asked = np.array([row for row in np.flatnonzero(new) if values[row]], dtype=np.int64)
    found = nearest(vectors[asked], vectors, ~new, _COMMON)
    sets = [set(one) for one in values]
    hits = [[not sets[row].isdisjoint(sets[other]) for other in near] for row, near in zip(asked, found, strict=True)]
    return float(np.mean(hits)) if hits else 0.0
