"""Quality of retrieval: recall@50 and NDCG@10 of users' next items, beside popularity and content.

A user's question is asked once, for the user's first positive event of a part, with the visits that are known at its
time. All items are candidates but those that the user has visited. Ranks come from one function, whose slow twin is
`slow_rank`.

Shape letters: M users asked, N items, W width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.content.encoder import unit
from features.frame import Frame
from models.ranker.loading import content_vectors
from models.table.column_rows import gather
from models.towers.inputs import ReadRows
from models.towers.sequences import TEST, TRAIN, Sequences, sequences_of
from models.towers.towers import Towers
from models.towers.validation import next_item_ranks, visits_of

RECALL_AT, GAIN_AT = 50, 10


def measures(ranks: NDArray[np.int64]) -> dict[str, float | int | None]:
    """Returns recall@50 and NDCG@10 of ranks (M,) from 0, for one next item each; None without users."""
    if not len(ranks):
        return {"users": 0, "recall_50": None, "ndcg_10": None}
    gains = np.where(ranks < GAIN_AT, 1 / np.log2(ranks + 2.0), 0.0)
    return {"users": len(ranks), "recall_50": float((ranks < RECALL_AT).mean()), "ndcg_10": float(gains.mean())}


def slow_rank(scores: Sequence[float], goal: int, visited: set[int]) -> int:
    """Returns the rank of an item from 0: the candidates with a higher score, or an equal one and a smaller number.

    Visited items are no candidates. A goal that is no candidate has the rank of one behind all.
    """
    if goal in visited:
        return len(scores)
    rank = 0
    for item, score in enumerate(scores):
        if item in visited or item == goal:
            continue
        if score > scores[goal] or (score == scores[goal] and item < goal):
            rank += 1
    return rank


def asked_of(frame: Frame, *, lag: int, most: int, seed: int) -> tuple[Sequences, NDArray[np.int64]]:
    """Returns all sequences, and the users asked (M, 3) as `Sequences.first_of` does, at most `most` drawn ones."""
    sequences = sequences_of(frame)
    asked = sequences.first_of(TEST, lag=lag)
    if len(asked) > most:
        asked = asked[np.sort(np.random.default_rng(seed).choice(len(asked), most, replace=False))]
    return sequences, asked


def retrieval_quality(
    frame: Frame, towers: Towers, read_rows: ReadRows, *, lag: int = 0, most: int = 20_000, seed: int = 0
) -> dict[str, Any]:
    """Measures towers, popularity and content on a frame's test part.

    Returns:
        For each method and each part (`all`, `known` and `unseen` items, by a positive in training) the measures.
    """
    sequences, asked = asked_of(frame, lag=lag, most=most, seed=seed)
    everything = np.arange(frame.items.height)
    trained = np.bincount(sequences.items[sequences.parts == TRAIN], minlength=frame.items.height)
    goals = sequences.items[asked[:, 0]]
    found: dict[str, Any] = {}
    for name, (users, vectors) in spaces_of(frame, towers, read_rows, sequences, asked, trained).items():
        ranks = next_item_ranks(sequences, asked, users, vectors, everything)
        # A method without a vector of an item cannot find it.
        ranks = np.where(vectors[goals].any(axis=1), ranks, frame.items.height)
        known = trained[goals] > 0
        found[name] = {"all": measures(ranks), "known": measures(ranks[known]), "unseen": measures(ranks[~known])}
    return found


def spaces_of(
    frame: Frame,
    towers: Towers,
    read_rows: ReadRows,
    sequences: Sequences,
    asked: NDArray[np.int64],
    trained: NDArray[np.int64],
) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Returns vectors of the users asked and of the items by method."""
    vectors = towers.item_vectors(read_rows, frame.items)
    visits = visits_of(sequences, asked, vectors, towers.length)
    numbers = np.searchsorted(sequences.offsets, asked[:, 0], side="right") - 1
    found = {"towers": (towers.user_vectors(read_rows, frame.users[numbers], visits), vectors)}
    popular = trained.astype(np.float32)[:, None]
    found["popularity"] = np.ones((len(asked), 1), dtype=np.float32), popular
    if "content_vector" in frame.items.columns:
        content = unit(content_vectors(frame.items))
        found["content"] = tastes(sequences, asked, content, towers.length), content
    return found


def tastes(
    sequences: Sequences, asked: NDArray[np.int64], vectors: NDArray[np.float32], length: int
) -> NDArray[np.float32]:
    """Returns the mean vector (M, E) of each user's newest visits, as retrieval by content asks."""
    _, starts, ends = asked.T
    lengths = np.minimum(ends - starts, length)
    place = gather(ends - lengths, lengths)
    found = np.zeros((len(asked), vectors.shape[1]), dtype=np.float32)
    np.add.at(found, np.repeat(np.arange(len(asked)), lengths), vectors[sequences.items[place]])
    return unit(found)
