"""Measures of a vector space of items: alike items found, texts found, spread, and what a simple ranker makes of it.

Every measure takes vectors (N, D) of all items in the order of the catalogue. New items are the items that
`tessera bench cold-start` holds out: no fit may read their events.

Shape letters: N items, D dim, n asked items, E examples.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.encoder.likes import Likes, Neighbours

NEW_SHARE = 0.1
"""Share of the items that are new."""
GOLD, NEAREST = 20, 50
COMPONENTS = 32
"""Principal components that the content ranker reads."""
_BLOCK = 1_024
_ROWS_AT_ONCE = 65_536


def new_items(size: int, seed: int, share: float = NEW_SHARE) -> NDArray[np.bool_]:
    """Returns (N,) True for each item that is held out in this seed."""
    return np.random.default_rng([seed, 1]).random(size) < share


def gold(likes: Likes, new: NDArray[np.bool_], count: int = GOLD) -> Neighbours:
    """Returns the known items most co-liked with each new item.

    The likes of all events count, since no fit reads the events of new items.
    """
    return likes.neighbours(np.flatnonzero(new), ~new, count=count)


def nearest(
    queries: NDArray[np.float32], vectors: NDArray[np.float32], among: NDArray[np.bool_], count: int
) -> NDArray[np.int64]:
    """Returns the rows of the nearest vectors of each query: (n, min(count, allowed rows)) int64, nearest first.

    Args:
        queries: (n, D) unit vectors.
        vectors: (N, D) unit vectors.
        among: (N,) True if the row may be found.
        count: Number of rows to find.
    """
    allowed = np.flatnonzero(among)
    count = min(count, len(allowed))
    found = np.empty((len(queries), count), dtype=np.int64)
    for start in range(0, len(queries), _BLOCK):
        scores = queries[start : start + _BLOCK] @ vectors[allowed].T
        top = np.argpartition(-scores, count - 1, axis=1)[:, :count] if count else np.empty((len(scores), 0), int)
        order = np.argsort(-np.take_along_axis(scores, top, axis=1), axis=1, kind="stable")
        found[start : start + _BLOCK] = allowed[np.take_along_axis(top, order, axis=1)]
    return found


def recall(
    vectors: NDArray[np.float32],
    wanted: Neighbours,
    known: NDArray[np.bool_],
    *,
    index: Any = None,
    count: int = NEAREST,
) -> float:
    """Returns the share of an item's wanted neighbours among its `count` nearest known items, in the mean over items.

    Args:
        vectors: (N, D) unit vectors of the items that ask.
        wanted: Neighbours to find, of `gold` for example.
        known: (N,) True if the item may be found. An item never finds itself.
        index: (N, D) unit vectors of the items that are found; by default `vectors`.
        count: Number of nearest items.
    """
    shares = recalls(vectors, wanted, known, index=index, count=count)
    return float(shares.mean()) if len(shares) else 0.0


def recalls(
    vectors: NDArray[np.float32],
    wanted: Neighbours,
    known: NDArray[np.bool_],
    *,
    index: Any = None,
    count: int = NEAREST,
) -> NDArray[np.float64]:
    """Returns the share of each asking item's wanted neighbours among its `count` nearest known items; see `recall`."""
    items, place = np.unique(wanted.of, return_inverse=True)
    if not len(items):
        return np.empty(0)
    found = nearest(vectors[items], vectors if index is None else index, known, count + 1)
    itself = found == items[:, None]
    # Without itself, or without the last one.
    itself[~itself.any(axis=1), -1] = found.shape[1] > count
    hits = (found[place] == wanted.item[:, None]) & ~itself[place]
    shares: NDArray[np.float64] = np.bincount(place, hits.any(axis=1)) / np.bincount(place)
    return shares


def alignment(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """Returns the mean squared distance of pairs (n, D): lower is better.

    Wang & Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity" (ICML 2020),
    eq. 1 with alpha = 2.
    """
    return float(np.square(first - second).sum(axis=1).mean()) if len(first) else 0.0


def uniformity(vectors: NDArray[np.float32], *, seed: int = 0, sample: int = 2_000) -> float:
    """Returns log of the mean of exp(-2 · squared distance) over pairs of rows: lower is more even; eq. 2 with t = 2.

    Args:
        vectors: (N, D) unit vectors; zero rows are left out.
        seed: Seed of the sample.
        sample: Most rows to compare.
    """
    rows = vectors[vectors.any(axis=1)]
    if len(rows) > sample:
        rows = rows[np.random.default_rng(seed).choice(len(rows), sample, replace=False)]
    if len(rows) < 2:
        return 0.0
    squared = 2 - 2 * (rows @ rows.T)
    apart = squared[np.triu_indices(len(rows), 1)]
    return float(np.log(np.exp(-2 * apart.astype(np.float64)).mean()))


@dataclass(frozen=True)
class LabelledPairs:
    """Examples of users and items.

    Attributes:
        user: (E,) user, from 0.
        item: (E,) row of the item.
        label: (E,) 0 or 1.
    """

    user: NDArray[np.int64]
    item: NDArray[np.int64]
    label: NDArray[np.int64]

    def where(self, kept: NDArray[np.bool_]) -> "LabelledPairs":
        """Returns the examples that are kept (E,)."""
        return LabelledPairs(self.user[kept], self.item[kept], self.label[kept])


class ContentRanker:
    """Logistic regression of a label on an item's content alone: the yardstick of a vector space for ranking.

    To judge an encoder, train on all events of the known items and predict all events of the new items.

    The ranker reads the mean cosine to the items that the user liked and to those that the user disliked, the user's
    share of likes, the numbers of both, and the principal components of the item's vector. A training example is left
    out of its own user's sums.

    Args:
        vectors: (N, D) unit vectors of all items.
        examples: Training examples; no new item among them.
        users: Number of users.
    """

    def __init__(self, vectors: NDArray[np.float32], examples: LabelledPairs, users: int) -> None:
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        self._vectors = vectors
        self._parts = _principal(vectors, np.unique(examples.item))
        self._sums = [_sums(vectors, examples.where(examples.label == label), users) for label in (0, 1)]
        self._rate = float(examples.label.mean())
        features = self._features(examples, own=True)
        self._scaler = StandardScaler().fit(features)
        self._model = LogisticRegression(max_iter=300).fit(self._scaler.transform(features), examples.label)

    def predict(self, examples: LabelledPairs, *, own: bool = False) -> NDArray[np.float64]:
        """Returns the probability of label 1 of each example (E,).

        Args:
            examples: Users and items. Their labels are read only with `own`.
            own: True for examples of the training, each of which is then left out of its own user's sums.
        """
        features = self._scaler.transform(self._features(examples, own=own))
        found: NDArray[np.float64] = self._model.predict_proba(features)[:, 1]
        return found

    def _features(self, examples: LabelledPairs, *, own: bool = False) -> NDArray[np.float32]:
        """Returns (E, 5 + COMPONENTS); with `own`, each example is left out of its user's sums."""
        blocks = range(0, max(len(examples.user), 1), _ROWS_AT_ONCE)
        return np.concatenate([self._block(examples, slice(start, start + _ROWS_AT_ONCE), own) for start in blocks])

    def _block(self, examples: LabelledPairs, rows: slice, own: bool) -> NDArray[np.float32]:
        user, item, label = examples.user[rows], examples.item[rows], examples.label[rows]
        vectors = self._vectors[item]
        columns, counts = [], []
        for of_label, (sums, seen) in enumerate(self._sums):
            is_own = (label == of_label).astype(np.float32) if own else np.zeros(len(user), dtype=np.float32)
            count = seen[user] - is_own
            dots = np.einsum("nd,nd->n", sums[user], vectors) - is_own * np.einsum("nd,nd->n", vectors, vectors)
            columns.append(dots / np.maximum(count, 1))
            counts.append(count)
        total = counts[0] + counts[1]
        rate = (counts[1] + 5 * self._rate) / (total + 5)
        columns += [np.log(rate / (1 - rate)), np.log1p(counts[0]), np.log1p(counts[1])]
        return np.column_stack([*columns, self._parts[item]]).astype(np.float32)


def auc(labels: NDArray[np.integer], scores: NDArray[np.floating]) -> float:
    """Returns the area under the ROC curve of scores (E,) for labels (E,) of 0 and 1."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, scores))


def _principal(vectors: NDArray[np.float32], fitted_on: NDArray[np.int64]) -> NDArray[np.float32]:
    """Returns the first principal components (N, min(D, COMPONENTS)), by the axes of some rows."""
    rows = vectors[fitted_on].astype(np.float64)
    mean = rows.mean(axis=0)
    _, axes = np.linalg.eigh((rows - mean).T @ (rows - mean))
    return np.asarray((vectors - mean) @ axes[:, ::-1][:, :COMPONENTS], dtype=np.float32)


def _sums(
    vectors: NDArray[np.float32], examples: LabelledPairs, users: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Returns the sum (U, D) of the vectors of each user's items, and their number (U,)."""
    from scipy import sparse

    ones = np.ones(len(examples.user), dtype=np.float32)
    chosen = sparse.csr_matrix((ones, (examples.user, examples.item)), shape=(users, len(vectors)))
    return np.asarray(chosen @ vectors), np.bincount(examples.user, minlength=users).astype(np.float32)
