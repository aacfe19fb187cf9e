"""Ranks of users' next items among the catalogue, without the items that the user has visited.

Shape letters: M users asked, N items, K items of the catalogue, W width.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from models.table.column_rows import gather
from models.towers.sequences import Sequences
from models.towers.towers import Visits

_AT_ONCE = 1 << 24
"""Scores that are held at once."""


def visits_of(sequences: Sequences, asked: NDArray[np.int64], vectors: NDArray[np.float32], length: int) -> Visits:
    """Returns the newest visits of users at the times of their next items.

    Args:
        sequences: Events of all users.
        asked: (M, 3) as `Sequences.first_of` returns.
        vectors: (N, W) item vectors.
        length: L.
    """
    events, starts, ends = asked.T
    lengths = np.minimum(ends - starts, length)
    place = gather(ends - lengths, lengths)
    return Visits(vectors[sequences.items[place]], sequences.times[place], lengths, sequences.times[events])


def next_item_ranks(
    sequences: Sequences,
    asked: NDArray[np.int64],
    users: NDArray[np.float32],
    vectors: NDArray[np.float32],
    catalogue: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Returns the rank (M,) of each user's next item, from 0, and the catalogue's size where it cannot be found.

    Items that the user has visited are left out, so a next item that is a repetition cannot be found. Of equal scores
    the item of the smaller number comes first.

    Args:
        sequences, asked: As in `visits_of`; all known visits count, not the newest L alone.
        users: (M, W); vectors: (N, W).
        catalogue: (K,) item numbers to rank, ascending.
    """
    ranks = np.full(len(asked), len(catalogue), dtype=np.int64)
    place = np.full(len(vectors), -1, dtype=np.int64)
    place[catalogue] = np.arange(len(catalogue))
    among = vectors[catalogue]
    step = max(1, _AT_ONCE // max(1, len(catalogue)))
    for low in range(0, len(asked), step):
        events, starts, ends = asked[low : low + step].T
        scores = users[low : low + step] @ among.T
        held = gather(starts, ends - starts)
        row, visited = np.repeat(np.arange(len(events)), ends - starts), place[sequences.items[held]]
        scores[row[visited >= 0], visited[visited >= 0]] = -np.inf
        goal = place[sequences.items[events]]
        own = scores[np.arange(len(events)), goal]
        tied = (scores == own[:, None]) & (np.arange(len(among)) < goal[:, None])
        before = (scores > own[:, None]).sum(1) + tied.sum(1)
        found = (goal >= 0) & np.isfinite(own)
        ranks[low : low + step][found] = before[found]
    return ranks


def top_items(
    sequences: Sequences,
    asked: NDArray[np.int64],
    users: NDArray[np.float32],
    vectors: NDArray[np.float32],
    count: int,
) -> list[NDArray[np.int64]]:
    """Returns each user's best items by inner product, without visited items and items without a vector.

    Of equal scores the item of the smaller number comes first.

    Args:
        sequences, asked: As in `visits_of`.
        users: (M, W); a user without a vector has an empty list.
        vectors: (N, W).
        count: Most items of a list.
    """
    there = np.flatnonzero(vectors.any(axis=1))
    place = np.full(len(vectors), -1, dtype=np.int64)
    place[there] = np.arange(len(there))
    found: list[NDArray[np.int64]] = []
    step = max(1, _AT_ONCE // max(1, len(there)))
    for low in range(0, len(asked), step):
        _, starts, ends = asked[low : low + step].T
        scores = users[low : low + step] @ vectors[there].T
        row, visited = (
            np.repeat(np.arange(len(starts)), ends - starts),
            place[sequences.items[gather(starts, ends - starts)]],
        )
        scores[row[visited >= 0], visited[visited >= 0]] = -np.inf
        scores[~users[low : low + step].any(axis=1)] = -np.inf
        # Of the items that tie at the end of a list, the partition may keep any.
        near = np.sort(np.argpartition(-scores, min(count, len(there) - 1), axis=1)[:, :count], axis=1)
        own = np.take_along_axis(scores, near, axis=1)
        order = np.argsort(-own, axis=1, kind="stable")
        near, own = np.take_along_axis(near, order, axis=1), np.take_along_axis(own, order, axis=1)
        found += [there[items[np.isfinite(score)]] for items, score in zip(near, own, strict=True)]
    return found


def rank_gain(ranks: NDArray[np.int64] | Sequence[int]) -> float:
    """Returns the mean of 1 / log2(rank + 2): NDCG without a cut, for one next item each."""
    return float(np.mean(1 / np.log2(np.asarray(ranks) + 2.0))) if len(ranks) else 0.0
