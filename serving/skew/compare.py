"""Compares the inputs of one served answer with the states in which the server may have read them.

A server reads while the stream writes, so an answer has a window of states: from the position that the server names to
the last delta that was in the log when it answered. A value is right if it equals the value of any state of the window.

Shape letters: n candidates, M distinct rows, F features, N numeric features, K lookups.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from features.errors import AnswerError, EventError
from features.hashing import splitmix64
from models.bundle.scorer import Lookups, divided
from models.encoder.meaning.neighbours import corrected
from models.table.batch import Batch
from models.table.schema import Feature, Schema
from serving.skew.record import SkewRecord, digests
from serving.skew.report import SkewReport
from serving.skew.state import SkewState
from streaming.log.protocol import Offsets

SCORE_TOLERANCE = 1e-5
"""Largest difference of a probability that counts as equal, since processors add in different orders."""
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class WrongRow:
    """Row of the table whose vector no state of an answer's window has.

    Attributes:
        row: Number of the row.
        digest: Digest of the vector that the server read.
        storage: Format of the rows in the server's store.
        request: Id of the request.
        position: Position that the server named, an offset for each partition of the deltas.
        features: Names of the features that read the row.
    """

    row: int
    digest: int
    storage: str
    request: str
    position: Offsets
    features: tuple[str, ...]


class _Part:
    """Values of a group, such as the features of the candidates, and which of them matched a state."""

    def __init__(self, served: NDArray[Any]) -> None:
        self.served = served
        self.expected: NDArray[Any] | None = None
        self.matched: Bools = np.zeros(served.shape, dtype=np.bool_)
        self.varied: Bools = np.zeros(served.shape, dtype=np.bool_)

    def look(self, expected: NDArray[Any]) -> Bools:
        """Compares with the values of one state. Returns which values matched for the first time."""
        new: Bools = (self.served == expected) & ~self.matched
        if self.expected is not None:
            self.varied |= expected != self.expected
        self.matched |= new
        self.expected = expected
        return new

    @property
    def wrong(self) -> Bools:
        """Values that no state has, and that did not change in the window."""
        return ~self.matched & ~self.varied

    @property
    def undecided(self) -> int:
        """Number of values that no state has, and that changed in the window."""
        return int((~self.matched & self.varied).sum())


class ServedComparison:
    """Comparison of one record, state by state.

    Args:
        served: The record.
        schema: Schema of its bundle.
        varying: Names of the events' features that differ between candidates.
    """

    def __init__(self, served: SkewRecord, schema: Schema, varying: Collection[str] = ()) -> None:
        self.served = served
        self._schema = schema
        self._own, self._shared = divided(schema, varying)
        content = torch.zeros((len(served.candidates), schema.content)) if schema.content else None
        self._lookups = served.lookups(visits=len(served.history) if schema.attends else None, content=content)
        self._vectors = np.zeros((len(served.row_numbers), schema.dim), dtype=np.float32)
        self._parts = {
            "shared": _Part(feature_hashes(schema, self._lookups.shared, self._shared, self._lookups.rows)),
            "own": _Part(feature_hashes(schema, self._lookups.own, self._own, self._lookups.rows)),
            "numeric": _Part(served.numbers().view(np.uint32)),
            "content": _Part(served.content_digests),
            "rows": _Part(served.row_digests),
        }
        self._history: list[list[str]] = []
        self._labelled: list[tuple[list[str], bytes]] = []
        self._votes: list[NDArray[np.float64]] = []
        self._latest: Lookups | None = None
        self.context_error = ""

    @property
    def done(self) -> bool:
        """True if every value matched a state."""
        matched = all(part.matched.all() for part in self._parts.values())
        listed = self.served.history in self._history and self._served_labels in self._labelled
        # A later state of the window may have the vectors with which the server corrected.
        corrected_scores = any(votes.any() for votes in self._votes)
        return bool(self.context_error) or (matched and listed and not corrected_scores)

    @property
    def _served_labels(self) -> tuple[list[str], bytes]:
        return self.served.labelled, self.served.labels

    def look(self, state: SkewState) -> None:
        """Compares with a state of the window."""
        try:
            expected = state.expected(self.served)
        except EventError as error:
            self.context_error = str(error)
            return
        found, parts = expected.lookups, self._parts
        if expected.history not in self._history:
            self._history.append(expected.history)
        if expected.labelled not in self._labelled:
            self._labelled.append(expected.labelled)
        if not any(np.array_equal(expected.votes, votes) for votes in self._votes):
            self._votes.append(expected.votes)
        parts["shared"].look(feature_hashes(self._schema, found.shared, self._shared, found.rows))
        parts["own"].look(feature_hashes(self._schema, found.own, self._own, found.rows))
        parts["numeric"].look(found.own.numeric.numpy().view(np.uint32))
        if found.own.content is not None and self._lookups.own.content is not None:
            new = parts["content"].look(digests(found.own.content.numpy()))
            self._lookups.own.content[torch.from_numpy(new)] = found.own.content[torch.from_numpy(new)]
        new = parts["rows"].look(digests(expected.vectors))
        self._vectors[new] = expected.vectors[new]
        self._latest = found

    def close(self, state: SkewState, report: SkewReport) -> list[WrongRow]:
        """Adds the result to a report, except for rows whose vectors no state of the window has, which it returns."""
        served, before = self.served, report.different
        report.answered(served.time_ms)
        if self.context_error or self._latest is None:
            report.values += 1
            report.difference("context", "differs").add(1, [self._example("", served.context, self.context_error)])
            report.differing += 1
            return []
        report.values += 1 + bool(self.served.labelled) + sum(part.served.size for part in self._parts.values())
        report.undecided += sum(part.undecided for part in self._parts.values())
        self._close_history(report)
        self._close_labels(report)
        self._close_features(state, report)
        self._close_numbers(report)
        wrong = self._wrong_rows()
        self._close_scores(state, report)
        report.differing += bool(wrong) or report.different > before
        return wrong

    def _example(self, item: str, served: Any, expected: Any, **more: Any) -> dict[str, Any]:
        return {"request": self.served.id, "item": item, "served": served, "expected": expected, **more}

    def _close_history(self, report: SkewReport) -> None:
        served, expected = self.served.history, self._history[-1]
        if served in self._history:
            return
        if len(self._history) > 1:
            report.undecided += 1
            return
        kind = "cut" if len(served) < len(expected) and expected[len(expected) - len(served) :] == served else "differs"
        report.difference("history", kind).add(1, [self._example("", served, expected, user=self.served.user)])

    def _close_labels(self, report: SkewReport) -> None:
        served, expected = self._served_labels, self._labelled[-1]
        if served in self._labelled:
            return
        if len(self._labelled) > 1:
            report.undecided += 1
            return
        shown = [list(zip(names, labels, strict=False)) for names, labels in (served, expected)]
        report.difference("labelled items", "differs").add(1, [self._example("", *shown, user=self.served.user)])

    def _close_features(self, state: SkewState, report: SkewReport) -> None:
        assert self._latest is not None
        for name, features in (("shared", self._shared), ("own", self._own)):
            wrong = self._parts[name].wrong
            mine: Batch = getattr(self._lookups, name)
            theirs: Batch = getattr(self._latest, name)
            for place in np.flatnonzero(wrong.any(axis=1)).tolist():
                feature = features[place]
                for example in np.flatnonzero(wrong[place]).tolist():
                    served = rows_of(self._schema, mine, features, place, example, self._lookups.rows)
                    expected = rows_of(self._schema, theirs, features, place, example, self._latest.rows)
                    kind = "absent" if not served else "unexpected" if not expected else "differs"
                    item = self.served.candidates[example] if name == "own" else ""
                    entity = item if name == "own" else self.served.user
                    value = state.value(feature.of, feature.column, entity) if feature.of in ("user", "item") else None
                    shown = self._example(item, {"rows": served}, {"rows": expected, "value": value})
                    report.difference(feature.name, kind).add(1, [shown])

    def _close_numbers(self, report: SkewReport) -> None:
        assert self._latest is not None
        wrong, served = self._parts["numeric"].wrong, self.served.numbers()
        expected = self._latest.own.numeric.numpy()
        for column, numeric in enumerate(self._schema.numeric):
            for example in np.flatnonzero(wrong[:, column]).tolist():
                mine, theirs = float(served[example, column]), float(expected[example, column])
                # A missing value is the mean, 0.
                kind = "absent" if mine == 0 else "unexpected" if theirs == 0 else "differs"
                shown = self._example(self.served.candidates[example], mine, theirs)
                report.difference(numeric.name, kind).add(1, [shown])
        for example in np.flatnonzero(self._parts["content"].wrong).tolist():
            shown = self._example(self.served.candidates[example], "another vector", "the item's vector")
            report.difference("content", "differs").add(1, [shown])

    def _wrong_rows(self) -> list[WrongRow]:
        served = self.served
        return [
            WrongRow(
                row=int(self._lookups.rows[position]),
                digest=int(served.row_digests[position]),
                storage=served.storage,
                request=served.id,
                position=served.positions,
                features=tuple(self._readers(position)),
            )
            for position in np.flatnonzero(self._parts["rows"].wrong).tolist()
        ]

    def _readers(self, position: int) -> Iterator[str]:
        """Yields the features that read a row, by its position among the record's rows."""
        for batch, features in ((self._lookups.shared, self._shared), (self._lookups.own, self._own)):
            for place, feature in enumerate(features):
                start, stop = _span(self._schema, batch, features, place)
                if (batch.values[start:stop] == position).any():
                    yield feature.name

    def _close_scores(self, state: SkewState, report: SkewReport) -> None:
        """Recomputes the scores from what was served, where every row and content vector is right."""
        served, rows = self.served.probabilities, self._parts["rows"].matched
        report.values += len(served)
        shared, own = self._lookups.shared, self._lookups.own
        if not rows[shared.values.numpy()].all():
            return
        example = np.tile(np.arange(own.size), max(len(own.lengths) // max(own.size, 1), 1))
        of_value = np.repeat(example[: len(own.lengths)], own.lengths.numpy())
        usable = np.ones(own.size, dtype=np.bool_)
        usable[of_value[~rows[own.values.numpy()]]] = False
        if self._schema.content:
            usable &= self._parts["content"].matched
        try:
            ranked = state.scorer.score(self._lookups, self._vectors)
        except AnswerError:
            ranked = np.full(len(served), np.nan, dtype=np.float32)
        right = np.zeros(len(served), dtype=np.bool_)
        for votes in self._votes:
            expected = corrected(ranked, votes)
            right |= np.abs(served - expected) <= SCORE_TOLERANCE
        wrong = usable & ~right
        for position in np.flatnonzero(wrong).tolist():
            shown = self._example(self.served.candidates[position], float(served[position]), float(expected[position]))
            report.difference("score", "differs").add(1, [shown])


def feature_hashes(
    schema: Schema, batch: Batch, features: Sequence[Feature], rows: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """Returns a hash of the rows that each example of a batch reads for each feature, (F, B) uint64.

    Args:
        schema: Schema of the features.
        batch: Lookups of the features, whose values are positions in `rows`.
        features: Features in the order of the batch.
        rows: (M,) rows of the table.
    """
    size = batch.size
    out = np.zeros((len(features), size), dtype=np.uint64)
    if not len(features) or not size:
        return out
    lengths = batch.lengths.numpy()
    keys = splitmix64(rows[batch.values.numpy()].astype(np.uint64) + np.uint64(1))
    ends = np.cumsum(lengths)
    with np.errstate(over="ignore"):
        sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(keys, dtype=np.uint64)])
        bags = (sums[ends] - sums[ends - lengths] + lengths.astype(np.uint64)).reshape(-1, size)
        bags = splitmix64(bags + np.arange(1, len(bags) + 1, dtype=np.uint64)[:, None])
        start = 0
        for place, feature in enumerate(features):
            stop = start + schema.slots(feature) * feature.chunks
            out[place] = bags[start:stop].sum(axis=0, dtype=np.uint64)
            start = stop
    return out


def rows_of(
    schema: Schema,
    batch: Batch,
    features: Sequence[Feature],
    place: int,
    example: int,
    rows: NDArray[np.int64],
) -> list[int]:
    """Returns the rows that one example of a batch reads for the feature at `place`, lookup after lookup."""
    first = _first_lookup(schema, features, place)
    found: list[int] = []
    ends = np.cumsum(batch.lengths.numpy())
    values = batch.values.numpy()
    for lookup in range(first, first + schema.slots(features[place]) * features[place].chunks):
        bag = lookup * batch.size + example
        found += rows[values[ends[bag] - int(batch.lengths[bag]) : ends[bag]]].tolist()
    return found


def _first_lookup(schema: Schema, features: Sequence[Feature], place: int) -> int:
    return sum(schema.slots(feature) * feature.chunks for feature in features[:place])


def _span(schema: Schema, batch: Batch, features: Sequence[Feature], place: int) -> tuple[int, int]:
    """Returns the first and the last position + 1 of a feature's values in a batch."""
    first, stop = (_first_lookup(schema, features, number) * batch.size for number in (place, place + 1))
    ends = np.concatenate([[0], np.cumsum(batch.lengths.numpy())])
    return int(ends[first]), int(ends[stop])
