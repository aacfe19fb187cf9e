"""Scores candidates: looks up the rows of a user and the candidates, and applies the network to the rows' vectors.

Shape letters: n candidates, M distinct rows, D dimension of a row, W pooled columns.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from features import tracing as trace
from features.errors import AnswerError
from features.history import Jagged
from features.value.score import ScoreFormula
from models.ranker.network import DensePart
from models.table.admission import Admission
from models.table.batch import Assembler, Batch, Entities, Examples, aggregate_keys
from models.table.reference import pool
from models.table.schema import Feature, Schema

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Lookups:
    """Lookups of one request. Later changes of the catalogue do not change them.

    Attributes:
        rows: (M,) distinct rows of the table, which are read at once.
        shared: Lookups of the user, the history and the context, which all candidates share.
        own: Lookups of the candidates, and the other inputs of the network.
    """

    rows: Ints
    shared: Batch
    own: Batch


class ScoredEntities(Protocol):
    """Users and items whose rows a scorer looks up. `models.bundle.catalogue.Catalogue` is a bundle's."""

    @property
    def users(self) -> Entities:
        """Values of the users, by number."""

    @property
    def items(self) -> Entities:
        """Values of the items, by number."""

    @property
    def user_numbers(self) -> Mapping[str, int]:
        """Numbers of the users by id."""

    @property
    def admission(self) -> Admission:
        """Admission of values."""

    @property
    def ranker_vectors(self) -> Floats:
        """(N, E) content vectors by item number, as the ranker reads them."""

    def user_frame(self, ids: Sequence[str]) -> pl.DataFrame:
        """Returns a frame of users for whom only the id is known."""


class Scorer:
    """Network of one bundle over one catalogue.

    Args:
        schema, network: Schema and dense part of the bundle.
        catalogue: Users, items and their vectors.
        varying: Names of the events' features that differ between the candidates of a request.
        formula: Score of several tasks; None for one label.
    """

    def __init__(
        self,
        schema: Schema,
        network: DensePart,
        catalogue: ScoredEntities,
        varying: Collection[str] = (),
        formula: ScoreFormula | None = None,
    ) -> None:
        self._schema = schema
        self._network = network
        self._catalogue = catalogue
        self.formula = formula
        self._own, self._shared = divided(schema, varying)
        self._order = _column_order(schema, (*self._shared, *self._own))

    def aggregate_keys(self, user: str, items: Ints) -> dict[str, Jagged]:
        """Returns the keys that candidates (n,) read of aggregates. The catalogue must not change during the call."""
        users, number = self._user(user)
        examples = _examples(number, items, np.zeros(0, dtype=np.int64), None)
        return aggregate_keys(self._schema.aggregates, users, self._catalogue.items, examples)

    def lookups(
        self, user: str, items: Ints, history: Ints, events: Entities, aggregates: Floats | None = None
    ) -> Lookups:
        """Returns the lookups of a request. The catalogue must not change during the call.

        Args:
            user: Id of the user. An unknown user has no value but the id.
            items: (n,) numbers of the candidates, n ≥ 1.
            history: Numbers of the items in the user's history, oldest first.
            events: Context of the request: one row, or a row for each candidate.
            aggregates: (n, A) columns of the schema's plan. None if the plan has no columns.
        """
        catalogue = self._catalogue
        users, number = self._user(user)
        assembler = Assembler(self._schema, users, catalogue.items, events, catalogue.ranker_vectors)
        first = None if aggregates is None else aggregates[:1]
        shared = assembler.batch(_examples(number, items[:1], history, first), self._shared, unread=True)
        candidates = _examples(number, items, history, aggregates)
        if events.size > 1:
            candidates = replace(candidates, context=np.arange(len(items), dtype=np.int64))
        own = assembler.batch(candidates, self._own, unread=True)
        rows, inverse = np.unique(np.concatenate([shared.values, own.values]), return_inverse=True)
        local = torch.from_numpy(inverse)
        return Lookups(
            rows,
            replace(shared, values=local[: len(shared.values)]),
            replace(own, values=local[len(shared.values) :]),
        )

    def _user(self, user: str) -> tuple[Entities, int]:
        """Returns the entities that have the user, and its number among them."""
        catalogue = self._catalogue
        number = catalogue.user_numbers.get(user)
        if number is not None:
            return catalogue.users, number
        return Entities(self._schema, "user", catalogue.user_frame([user]), catalogue.admission), 0

    def score(self, lookups: Lookups, vectors: Floats) -> Floats:
        """Returns the score of each candidate, (n,): the probability of a positive event, or the tasks' formula.

        Args:
            lookups: Lookups of the request.
            vectors: (M, D) vectors of `lookups.rows`.

        Raises:
            AnswerError: A probability is not a number.
        """
        return self.combined(self.probabilities(lookups, vectors))

    def combined(self, probabilities: Floats) -> Floats:
        """Returns scores (n,) of probabilities (n,) of one label, or (n, T) of several tasks."""
        return probabilities if self.formula is None else self.formula(probabilities)

    def shares(self, scores: Floats) -> NDArray[np.float64]:
        """Returns scores (n,) on the scale of probabilities, in the same order."""
        return scores.astype(np.float64) if self.formula is None else self.formula.shares(scores)

    def by_task(self, probabilities: Floats) -> dict[str, float]:
        """Returns the probabilities (T,) of one candidate by the names of the tasks; empty for one label."""
        return {} if self.formula is None else dict(zip(self.formula.tasks, probabilities.tolist(), strict=True))

    def probabilities(self, lookups: Lookups, vectors: Floats) -> Floats:
        """Returns the probability of a positive event for each candidate, (n,), or (n, T) of several tasks.

        Args:
            lookups: Lookups of the request.
            vectors: (M, D) vectors of `lookups.rows`.

        Raises:
            AnswerError: A probability is not a number.
        """
        with torch.no_grad(), trace.span("network", candidates=lookups.own.size):
            logits = self._network(self._pooled(lookups, vectors), lookups.own)
        found: Floats = torch.sigmoid(logits).numpy()
        _check_numbers(found)
        return found

    def explain(self, lookups: Lookups, vectors: Floats, chosen: Ints) -> list[dict[str, float]]:
        """Returns each feature's contribution to candidates' scores, by ablation.

        A contribution is the log-odds with the feature minus the log-odds without the feature. Without a categorical
        feature, its lookups are zero, as for a value that is not admitted. Without a numeric feature, its value is the
        mean. Contributions need not sum to the score, since features interact. Of several tasks, a contribution is the
        score with the feature minus the score without it, since a formula has no log-odds.

        Args:
            lookups: Lookups of the request.
            vectors: (M, D) vectors of `lookups.rows`.
            chosen: (k,) positions among the candidates.

        Returns:
            Contributions by feature for each position, the largest absolute value first.

        Raises:
            AnswerError: A score is not a number.
        """
        pooled, own = self._pooled(lookups, vectors)[chosen], _of(lookups.own, chosen)
        ablations: list[tuple[str, Tensor, Batch]] = [("", pooled, own)]
        for name, columns in _columns(self._schema).items():
            without = pooled.clone()
            without[:, columns] = 0
            ablations.append((name, without, own))
        for column, feature in enumerate(self._schema.numeric):
            numeric = own.numeric.clone()
            numeric[:, column] = 0
            ablations.append((feature.name, pooled, replace(own, numeric=numeric)))
        if own.content is not None:
            ablations.append(("content", pooled, replace(own, content=torch.zeros_like(own.content))))
        with torch.no_grad(), trace.span("explain", candidates=len(chosen)):
            batch = _stacked([batch for *_, batch in ablations])
            logits = self._network(torch.cat([rows for _, rows, _ in ablations]), batch)
        _check_numbers(logits.numpy())
        if self.formula is not None:
            logits = torch.from_numpy(self.formula(torch.sigmoid(logits).numpy()))
        by_feature = logits.view(len(ablations), len(chosen))
        differences = (by_feature[0] - by_feature[1:]).T.tolist()
        names = [name for name, *_ in ablations[1:]]
        contributions = [dict(zip(names, row, strict=True)) for row in differences]
        return [dict(sorted(row.items(), key=lambda pair: -abs(pair[1]))) for row in contributions]

    def _pooled(self, lookups: Lookups, vectors: Floats) -> Tensor:
        """Pools the rows into the network's input from the table, (n, W)."""
        rows = torch.from_numpy(vectors)
        parts = [pool(rows, lookups.shared).expand(lookups.own.size, -1), pool(rows, lookups.own)]
        return torch.cat(parts, dim=1)[:, self._order]


def divided(schema: Schema, varying: Collection[str]) -> tuple[tuple[Feature, ...], tuple[Feature, ...]]:
    """Returns the features that each candidate of a request looks up, and those that all candidates share.

    Args:
        schema: Schema of the features.
        varying: Names of the events' features that differ between candidates.
    """
    own = [*schema.of("item"), *(feature for feature in schema.of("event") if feature.column in varying)]
    return tuple(own), tuple(feature for feature in schema.features if feature not in own)


def _check_numbers(scores: Floats) -> None:
    """Raises AnswerError if a score is not a finite number, since JSON has no such value and cannot be sorted by it."""
    invalid = int((~np.isfinite(scores)).sum())
    if invalid:
        raise AnswerError(f"{invalid:,} of {scores.size:,} scores of the network are no numbers; train it again")


def _examples(user: int, items: Ints, history: Ints, aggregates: Floats | None) -> Examples:
    same = np.zeros(len(items), dtype=np.int64)
    one = Jagged(history, np.array([0, len(history)], dtype=np.int64))
    return Examples(same + user, items, one.take(same), np.zeros(0, dtype=np.float32), same, aggregates)


def _of(batch: Batch, chosen: Ints) -> Batch:
    """Selects the chosen examples from the inputs of the network beside the table."""
    index = torch.from_numpy(chosen)
    return replace(
        batch,
        scale=batch.scale[index],
        numeric=batch.numeric[index],
        visits=None if batch.visits is None else batch.visits[index],
        content=None if batch.content is None else batch.content[index],
    )


def _stacked(batches: Sequence[Batch]) -> Batch:
    first = batches[0]
    return replace(
        first,
        scale=torch.cat([batch.scale for batch in batches]),
        numeric=torch.cat([batch.numeric for batch in batches]),
        visits=None if first.visits is None else first.visits.repeat(len(batches)),
        content=None if first.content is None else torch.cat([b.content for b in batches if b.content is not None]),
    )


def _columns(schema: Schema) -> dict[str, slice]:
    """Maps each feature to its columns of the network's input."""
    columns: dict[str, slice] = {}
    start = 0
    for feature in schema.features:
        width = schema.slots(feature) * feature.chunks * schema.dim
        columns[feature.name] = slice(start, start + width)
        start += width
    return columns


def _column_order(schema: Schema, looked_up: Sequence[Feature]) -> Tensor:
    """Returns the index of each column of the network's input among the columns in the order of `looked_up`."""
    widths = {name: columns.stop - columns.start for name, columns in _columns(schema).items()}
    starts: dict[str, int] = {}
    start = 0
    for feature in looked_up:
        starts[feature.name] = start
        start += widths[feature.name]
    ranges = [torch.arange(starts[f.name], starts[f.name] + widths[f.name]) for f in schema.features]
    return torch.cat(ranges) if ranges else torch.zeros(0, dtype=torch.int64)
