"""Tasks on the vectors of items: co-liked items, shared values, probes of values, and conditional similarity.

Every task has a score in [0, 1] for each query. The queries depend on the items and the seed alone, never on a space.

Shape letters: N items, D dim, n queries, C concepts.
"""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from features.content.encoder import unit
from models.encoder.judging.items import JudgedItems
from models.encoder.judging.measures import LEAST_QUERIES
from models.encoder.likes import COMMON_FANS, Likes, Neighbours
from models.encoder.measure import GOLD, nearest, recalls

Floats = NDArray[np.float32]
Scores = NDArray[np.float64]
_ASKED, _NEAREST = 1_000, 10
_LEAST_CARRIERS, _MOST_SHARE, _CONCEPTS = 10, 0.5, 30
_FOLDS, _RIDGE = 3, 1.0


class Composed(NamedTuple):
    """Scores of the conditional task by what the query is made of: the item and the value, or one of both alone."""

    both: Scores
    item: Scores
    value: Scores


class SpaceTasks:
    """Queries on the vectors of items, drawn once for all spaces.

    Args:
        items: The items.
        seed: Seed of the draws.
    """

    def __init__(self, items: JudgedItems, seed: int = 0) -> None:
        self.items = items
        self._seed = seed
        self._known = items.known

    def scores(self, vectors: Floats) -> dict[str, Scores]:
        """Returns the scores of the queries of each task, (n,), by measure; without queries the array is empty.

        Args:
            vectors: (N, D) unit vectors of the items.
        """
        tasks: dict[str, Callable[[Floats], Scores]] = {
            "recall_new": lambda found: recalls(found, self.gold_new, self._known & ~self.items.new),
            "recall_later": lambda found: recalls(found, self.gold_later, self._known),
            "aspects": self._aspects,
            "concepts": self._concepts,
            "conditional": lambda found: self.conditional(found).both,
        }
        return {name: task(vectors) for name, task in tasks.items()}

    @cached_property
    def gold_new(self) -> Neighbours:
        """Known items most co-liked with each item that training has not seen; the likes of all parts count."""
        train, later = self.items.train.matrix.tocoo(), self.items.later.matrix.tocoo()
        users, items = (np.concatenate(pair) for pair in ((train.row, later.row), (train.col, later.col)))
        every = Likes(users, items, len(self._known))
        return _gold(every, self.items.new, self._known & ~self.items.new)

    @cached_property
    def gold_later(self) -> Neighbours:
        """Items most co-liked with each item, by likes after training."""
        return _gold(self.items.later, self._known, self._known)

    def by_column(self, vectors: Floats) -> dict[str, Scores]:
        """Returns the share of the 10 nearest items that share a value with the query, (n,), for each column."""
        asked = self._asked
        found = _others(vectors, vectors[asked], asked, self._known)
        return {
            name: np.array(
                [
                    np.mean([not values[query].isdisjoint(values[row]) for row in rows])
                    for query, rows in zip(asked.tolist(), found.tolist(), strict=True)
                    if values[query] and rows
                ],
                dtype=np.float64,
            )
            for name, values in self.items.values.items()
        }

    def conditional(self, vectors: Floats) -> Composed:
        """Asks for items that have a value which the query's item lacks, and share a value with the item.

        A query by a value is the mean of the vectors of its carriers. Vaze et al., "GeneCIS" (CVPR 2023), ask the same
        of pictures.
        """
        carried = self.concepts[1]
        asked, condition = self._conditions
        if not len(asked):
            return Composed(*(np.empty(0) for _ in range(3)))
        means = unit(carried.T.astype(np.float32) @ vectors)
        queries = {
            "both": unit(vectors[asked] + means[condition]),
            "item": vectors[asked],
            "value": means[condition],
        }
        own = carried[asked]
        scores = {}
        for name, query in queries.items():
            found = _others(vectors, query, asked, self._known)
            has = carried[found, condition[:, None]]
            shares = (carried[found] & own[:, None, :]).any(axis=2)
            scores[name] = (has & shares).mean(axis=1).astype(np.float64)
        return Composed(**scores)

    @cached_property
    def concepts(self) -> tuple[list[str], NDArray[np.bool_]]:
        """The C most frequent values of the columns that 10 items and at most half of the items carry, and (N, C)."""
        size = len(self._known)
        counted: dict[tuple[str, str], list[int]] = {}
        for column, values in self.items.values.items():
            for row, of_item in enumerate(values):
                for value in of_item:
                    counted.setdefault((column, value), []).append(row)
        fitting = {key: rows for key, rows in counted.items() if _LEAST_CARRIERS <= len(rows) <= _MOST_SHARE * size}
        chosen = sorted(fitting, key=lambda key: (-len(fitting[key]), key))[:_CONCEPTS]
        carried = np.zeros((size, len(chosen)), dtype=np.bool_)
        for place, key in enumerate(chosen):
            carried[fitting[key], place] = True
        return [f"{column}: {value}" for column, value in chosen], carried

    def probed(self, vectors: Floats) -> NDArray[np.float64]:
        """Returns how much more than usual each item is like the carriers of each concept, (N, C).

        A ridge probe of each fold reads the items of the other folds.
        """
        carried = self.concepts[1].astype(np.float64)
        fold = np.random.default_rng([self._seed, 33]).integers(_FOLDS, size=len(vectors))
        found = np.zeros(carried.shape)
        wide = vectors.astype(np.float64)
        for number in range(_FOLDS):
            fitted, held = self._known & (fold != number), fold == number
            mean = wide[fitted].mean(axis=0) if fitted.any() else 0.0
            inputs, wanted = wide[fitted] - mean, carried[fitted] - carried[fitted].mean(axis=0)
            square = inputs.T @ inputs + _RIDGE * np.eye(wide.shape[1])
            found[held] = (wide[held] - mean) @ np.linalg.solve(square, inputs.T @ wanted)
        return found

    def _concepts(self, vectors: Floats) -> Scores:
        carried = self.concepts[1]
        asked = np.flatnonzero(self._known & carried.any(axis=1) & ~carried.all(axis=1))
        if not len(asked):
            return np.empty(0)
        values = self.probed(vectors)[asked]
        scores = np.empty(len(asked))
        for place, (shares, own) in enumerate(zip(values, carried[asked], strict=True)):
            difference = shares[own][:, None] - shares[~own][None, :]
            scores[place] = np.mean((difference > 0) + 0.5 * (difference == 0))
        return scores

    def _aspects(self, vectors: Floats) -> Scores:
        """Returns the mean over the filled columns of each query that has a value in any column."""
        asked = self._asked
        filled = [{name for name in self.items.values if self.items.values[name][row]} for row in asked.tolist()]
        sums, counts = np.zeros(len(asked)), np.array([len(names) for names in filled])
        for name, scores in self.by_column(vectors).items():
            if len(scores):
                sums[[name in names for names in filled]] += scores
        return np.asarray((sums / np.maximum(counts, 1))[counts > 0])

    @cached_property
    def _asked(self) -> NDArray[np.int64]:
        order = np.random.default_rng([self._seed, 34]).permutation(np.flatnonzero(self._known))
        return np.sort(order[:_ASKED])

    @cached_property
    def _conditions(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Draws for each asked item a concept that it lacks and that some item carries beside one of its own."""
        carried = self.concepts[1]
        together = (carried.T.astype(np.int64) @ carried) > 0
        rng = np.random.default_rng([self._seed, 35])
        asked, condition = [], []
        for row in self._asked.tolist():
            free = np.flatnonzero(~carried[row] & together[carried[row]].any(axis=0))
            if len(free):
                asked.append(row)
                condition.append(int(rng.choice(free)))
        return np.array(asked, dtype=np.int64), np.array(condition, dtype=np.int64)


def _gold(likes: Likes, asked: NDArray[np.bool_], among: NDArray[np.bool_]) -> Neighbours:
    """Returns the most co-liked items of each asked item, by as many common fans, 3 at most, as 20 items have."""
    found = likes.neighbours(np.flatnonzero(asked), among, count=GOLD, common=COMMON_FANS)
    for common in range(COMMON_FANS - 1, 0, -1):
        if len(np.unique(found.of)) >= LEAST_QUERIES:
            break
        found = likes.neighbours(np.flatnonzero(asked), among, count=GOLD, common=common)
    return found


def _others(vectors: Floats, queries: Floats, asked: NDArray[np.int64], among: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Returns the rows nearest to each query (n, D), without the row that asked: (n, 10), or fewer if there are few."""
    found = nearest(queries, vectors, among, _NEAREST + 1)
    itself = found == asked[:, None]
    if found.shape[1]:
        itself[~itself.any(axis=1), -1] = True
    others: NDArray[np.int64] = found[~itself].reshape(len(found), max(found.shape[1] - 1, 0))
    return others
