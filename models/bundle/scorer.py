"""Scores candidates: the lookups of a user and candidates, and the network over the table's vectors.

Shape letters: n candidates, K lookups, D dim, W pooled columns, F features that can be ablated.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from features import tracing as trace
from features.errors import AnswerError
from features.history import Jagged
from models.bundle.catalogue import Catalogue
from models.ranker.network import DensePart
from models.table.batch import Assembler, Batch, Entities, Examples
from models.table.reference import pool
from models.table.schema import Feature, Schema

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Lookups:
    """Reads of one request; they do not change when the catalogue does.

    Attributes:
        rows: Distinct rows of the table (M,), read at once.
        shared: Lookups of the user, history and context, made once for all candidates.
        own: Lookups of the candidates, and the other inputs of the network.
    """

    rows: Ints
    shared: Batch
    own: Batch


class Scorer:
    """Network of one bundle over one catalogue.

    Args:
        schema, network: Schema and dense part of the bundle.
        catalogue: Users, items and their vectors.
    """

    def __init__(self, schema: Schema, network: DensePart, catalogue: Catalogue) -> None:
        self._schema = schema
        self._network = network
        self._catalogue = catalogue
        self._own = tuple(schema.of("item"))
        self._shared = tuple(feature for feature in schema.features if feature.of != "item")
        self._places = _places(schema, (*self._shared, *self._own))

    def lookups(self, user: str, items: Ints, history: Ints, events: Entities) -> Lookups:
        """Returns the lookups for candidates (n,), n ≥ 1; the catalogue must not change meanwhile."""
        catalogue = self._catalogue
        users, number = catalogue.users, catalogue.user_numbers.get(user)
        if number is None:
            users, number = Entities(self._schema, "user", catalogue.user_frame([user]), catalogue.admission), 0
        assembler = Assembler(self._schema, users, catalogue.items, events, catalogue.vectors)
        shared = assembler.batch(_examples(number, items[:1], history), self._shared)
        own = assembler.batch(_examples(number, items, history), self._own)
        rows, place = np.unique(np.concatenate([shared.values, own.values]), return_inverse=True)
        local = torch.from_numpy(place)
        return Lookups(
            rows,
            replace(shared, values=local[: len(shared.values)]),
            replace(own, values=local[len(shared.values) :]),
        )

    def score(self, lookups: Lookups, vectors: Floats) -> Floats:
        """Returns probabilities (n,) from the rows' vectors (M, D).

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

        A contribution is the log-odds with the feature less the log-odds without it. Without a categorical feature, its
        lookups are zero, as for a value that is not admitted; without a numeric feature, its value is the mean.
        Contributions need not add up to the score, since features work together.

        Args:
            chosen: Positions (k,) among the candidates.

        Returns:
            For each position, contributions by feature, the largest first.
        """
        pooled, own = self._pooled(lookups, vectors)[chosen], _of(lookups.own, chosen)
        taken: list[tuple[str, Tensor, Batch]] = [("", pooled, own)]
        for name, columns in _columns(self._schema).items():
            without = pooled.clone()
            without[:, columns] = 0
            taken.append((name, without, own))
        for place, feature in enumerate(self._schema.numeric):
            numeric = own.numeric.clone()
            numeric[:, place] = 0
            taken.append((feature.name, pooled, replace(own, numeric=numeric)))
        if own.content is not None:
            taken.append(("content", pooled, replace(own, content=torch.zeros_like(own.content))))
        with torch.no_grad(), trace.span("explain", candidates=len(chosen)):
            logits = self._network(torch.cat([rows for _, rows, _ in taken]), _stacked([batch for *_, batch in taken]))
        _check_numbers(logits.numpy())
        by_feature = logits.view(len(taken), len(chosen))
        added = (by_feature[0] - by_feature[1:]).T.tolist()
        names = [name for name, *_ in taken[1:]]
        found = [dict(zip(names, row, strict=True)) for row in added]
        return [dict(sorted(row.items(), key=lambda pair: -abs(pair[1]))) for row in found]

    def _pooled(self, lookups: Lookups, vectors: Floats) -> Tensor:
        """Returns the network's input from the table, (n, W)."""
        rows = torch.from_numpy(vectors)
        parts = [pool(rows, lookups.shared).expand(lookups.own.size, -1), pool(rows, lookups.own)]
        return torch.cat(parts, dim=1)[:, self._places]


def _check_numbers(found: Floats) -> None:
    """Raises AnswerError if a score is not a number: JSON has no such value, and no order by it is meaningful."""
    wrong = int((~np.isfinite(found)).sum())
    if wrong:
        raise AnswerError(f"the network made {wrong:,} of {found.size:,} scores no numbers; train it again")


def _examples(user: int, items: Ints, history: Ints) -> Examples:
    same = np.zeros(len(items), dtype=np.int64)
    one = Jagged(history, np.array([0, len(history)], dtype=np.int64))
    return Examples(same + user, items, one.take(same), np.zeros(0, dtype=np.float32), same)


def _of(batch: Batch, chosen: Ints) -> Batch:
    """Returns the network's inputs beside the table, for some examples."""
    at = torch.from_numpy(chosen)
    return replace(
        batch,
        scale=batch.scale[at],
        numeric=batch.numeric[at],
        visits=None if batch.visits is None else batch.visits[at],
        content=None if batch.content is None else batch.content[at],
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
    found: dict[str, slice] = {}
    start = 0
    for feature in schema.features:
        width = schema.slots(feature) * feature.chunks * schema.dim
        found[feature.name] = slice(start, start + width)
        start += width
    return found


def _places(schema: Schema, looked_up: Sequence[Feature]) -> Tensor:
    """Returns the place of each column of the network's input when features are pooled in another order."""
    widths = {name: columns.stop - columns.start for name, columns in _columns(schema).items()}
    starts: dict[str, int] = {}
    position = 0
    for feature in looked_up:
        starts[feature.name] = position
        position += widths[feature.name]
    ranges = [torch.arange(starts[f.name], starts[f.name] + widths[f.name]) for f in schema.features]
    return torch.cat(ranges) if ranges else torch.zeros(0, dtype=torch.int64)
