"""Leave-last-out: each user's last positive is the question, the one before it may choose when training stops.

Users have three positives at least. Every item but those that the user has visited is a candidate. A method gives each
user a list of 50 items, and one slow readable function measures the lists of all methods.

Shape letters: M users asked, N items, W width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.content.lexical import fuse_scores
from features.errors import DatasetError
from features.frame import Frame
from models.towers.sequences import TEST, Sequences, sequences_of

RECALL_AT, GAIN_AT = 50, 10
LEAST_POSITIVES = 3
FUSED = 200
"""Length of the lists that are fused."""


@dataclass(frozen=True)
class Questions:
    """Users and what each is asked.

    Attributes:
        frame: Positives alone, with the parts of leave-last-out; items that are new occur in the test part alone.
        sequences: Positives of all users.
        asked: (M, 3) as `Sequences.first_of` returns.
        new: (N,) True for an item that training does not see.
    """

    frame: Frame
    sequences: Sequences
    asked: NDArray[np.int64]
    new: NDArray[np.bool_]

    @property
    def goals(self) -> NDArray[np.int64]:
        """(M,) item that each user visits next."""
        return self.sequences.items[self.asked[:, 0]]

    @property
    def users(self) -> NDArray[np.int64]:
        """(M,) number of each user."""
        found: NDArray[np.int64] = np.searchsorted(self.sequences.offsets, self.asked[:, 0], side="right") - 1
        return found

    def visited(self, question: int) -> set[int]:
        """Returns the items that a user has visited before the question."""
        _, start, end = self.asked[question].tolist()
        return set(self.sequences.items[start:end].tolist())


def leave_last_out(frame: Frame, *, hidden: float = 0.0, seed: int = 0) -> Questions:
    """Divides the positives of a frame.

    Args:
        frame: Frame of the events, whatever its split.
        hidden: Share of the items that training does not see.
        seed: Seed that chooses them.

    Raises:
        DatasetError: No user has three positives.
    """
    positives = frame.examples.filter((pl.col("label") == 1).fill_null(value=False)).sort("user", "time", "event")
    positives = positives.filter(pl.len().over("user") >= LEAST_POSITIVES)
    if not positives.height:
        raise DatasetError(f"bench retrieval needs users with {LEAST_POSITIVES} positive events; the frame has none")
    new = np.random.default_rng([seed, 1]).random(frame.items.height) < hidden
    newer = pl.len().over("user") - 1 - pl.int_range(pl.len()).over("user")
    part = pl.when(newer == 0).then(pl.lit("test")).when(newer == 1).then(pl.lit("validation"))
    positives = positives.with_columns(split=part.otherwise(pl.lit("train")))
    of_new = pl.Series(new[positives["item"].to_numpy()])
    positives = positives.filter(~of_new | (positives["split"] == "test")).sort("event")
    divided = frame.replace(examples=positives)
    sequences = sequences_of(divided)
    return Questions(divided, sequences, sequences.first_of(TEST), new)


def top_lists(
    questions: Questions, users: NDArray[np.float32], vectors: NDArray[np.float32], count: int
) -> list[list[int]]:
    """Returns each user's best items by inner product, without visited items and items without a vector.

    Args:
        questions: M questions.
        users: (M, W); vectors: (N, W).
        count: Most items of a list.
    """
    there = np.flatnonzero(vectors.any(axis=1))
    found = []
    for number, user in enumerate(users):
        scores = vectors[there] @ user
        most = min(len(there), count + len(questions.visited(number)))
        near = np.argpartition(-scores, most - 1)[:most]
        order = there[near[np.lexsort((there[near], -scores[near]))]].tolist()
        visited = questions.visited(number)
        found.append([item for item in order if item not in visited][:count])
    return found


def fused(
    one: Sequence[Sequence[int]], two: Sequence[Sequence[int]], count: int, weight: float = 1.0
) -> list[list[int]]:
    """Fuses two lists of each user by reciprocal ranks, as a server does.

    Args:
        one: M lists, which weigh 1.
        two: M lists.
        count: Most items of a fused list.
        weight: Weight of the second list. If it is 0, the first one answers alone.
    """
    if not weight:
        return [list(own[:count]) for own in one]
    pairs = zip(one, two, strict=True)
    return [fuse_scores([np.array(a, int), np.array(b, int)], count, (1.0, weight))[0].tolist() for a, b in pairs]


def measured(lists: Sequence[Sequence[int]], goals: Sequence[int]) -> dict[str, Any]:
    """Measures lists of items, best first, by the one item that each user visited next.

    recall@50 is the share of users whose item is among the first 50. NDCG@10 is the mean of 1 / log2(place + 1) of the
    item's place from 1, 0 beyond the tenth.
    """
    found, gain = 0, 0.0
    for items, goal in zip(lists, goals, strict=True):
        if goal not in items[:RECALL_AT]:
            continue
        place = list(items).index(goal) + 1
        found += 1
        if place <= GAIN_AT:
            gain += 1 / log2(place + 1)
    count = len(goals)
    return {
        "users": count,
        "recall_50": found / count if count else None,
        "ndcg_10": gain / count if count else None,
    }
