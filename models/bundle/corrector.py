"""Corrects the scores of a request's new candidates by the user's labelled items.

A candidate is new if its id reads no row of the table, since its sightings have not admitted it. The rows of a request
say so, and the labelled items are in the record of the user's history. A request without a new candidate costs one
comparison.

Shape letters: n candidates, m new ones among them, L labelled items of the user.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from features import tracing as trace
from models.bundle.catalogue import Catalogue
from models.bundle.contents import BundleContents
from models.bundle.record import HistoryRecord
from models.bundle.scorer import Lookups
from models.encoder.meaning.neighbours import LABELLED, LabelledItems, NeighbourCorrection, corrected
from models.table.schema import Schema

MOST_NAMED = 3
"""Neighbours that an explanation names."""


@dataclass(frozen=True)
class Neighbour:
    """Labelled item that voted.

    Attributes:
        item: Id of the item.
        label: 1 if the user liked the item, 0 if not.
        log_odds: Part of the correction that the item caused.
    """

    item: str
    label: int
    log_odds: float


@dataclass(frozen=True)
class Correction:
    """Change of a new candidate's score.

    Attributes:
        log_odds: Change of the log-odds.
        neighbours: Labelled items with the largest parts of it, the largest absolute value first.
    """

    log_odds: float
    neighbours: tuple[Neighbour, ...]


@dataclass(frozen=True)
class NewCandidates:
    """Inputs of one correction. Later changes of the catalogue do not change them.

    Attributes:
        correction: Correction of the bundle.
        size: n.
        places: (m,) positions of the new candidates.
        asked: (m,) places of the new candidates in `vectors`.
        labelled: The user's labelled items, as places in `vectors`.
        names: Ids of the labelled items.
        residuals: (1, L) as `NeighbourCorrection.residuals` returns them.
        vectors: Vectors of the distinct items.
    """

    correction: NeighbourCorrection
    size: int
    places: NDArray[np.int64]
    asked: NDArray[np.int64]
    labelled: LabelledItems
    names: Sequence[str]
    residuals: NDArray[np.float64]
    vectors: NDArray[np.float32]

    def votes(self) -> NDArray[np.float64]:
        """Returns the change of each candidate's log-odds, (n,); 0 for a candidate that is not new."""
        found = np.zeros(self.size)
        found[self.places], _ = self._votes(self.asked)
        return found

    def apply(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the corrected probabilities (n,) float32."""
        with trace.span("correct", candidates=len(self.places)):
            return corrected(scores, self.votes())

    def explain(self, chosen: NDArray[np.int64]) -> list[Correction | None]:
        """Returns the correction of candidates at positions (k,); None where the score is the ranker's own."""
        place = {position: number for number, position in enumerate(self.places.tolist())}
        totals, parts = self._votes(self.asked)
        found: list[Correction | None] = []
        for position in chosen.tolist():
            number = place.get(position)
            vote = 0.0 if number is None else float(totals[number])
            found.append(None if number is None or not vote else Correction(vote, self._named(parts[number])))
        return found

    def _named(self, parts: NDArray[np.float64]) -> tuple[Neighbour, ...]:
        largest = np.argsort(-np.abs(parts), kind="stable")[:MOST_NAMED]
        labels = self.labelled.labels[0]
        return tuple(
            Neighbour(self.names[place], int(labels[place]), float(parts[place]))
            for place in largest.tolist()
            if parts[place]
        )

    def _votes(self, asked: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return self.correction.votes(asked, self.labelled, self.vectors, residuals=self.residuals)


class Corrector:
    """Correction of one bundle over one catalogue.

    Args:
        schema: Schema of the bundle.
        correction: Correction of the bundle.
        catalogue: Items and their vectors.
    """

    def __init__(self, schema: Schema, correction: NeighbourCorrection, catalogue: Catalogue) -> None:
        self._correction, self._catalogue = correction, catalogue
        own = [feature.column for feature in schema.of("item")]
        before = own.index("item_id")
        features = schema.of("item")
        self._first = sum(schema.slots(one) * one.chunks for one in features[:before])

    def new(self, lookups: Lookups) -> NDArray[np.bool_]:
        """Returns whether each candidate (n,) is new."""
        size = lookups.own.size
        found: NDArray[np.bool_] = lookups.own.lengths.numpy()[self._first * size : (self._first + 1) * size] == 0
        return found

    def gather(
        self, items: NDArray[np.int64], lookups: Lookups, names: Sequence[str], labels: bytes
    ) -> NewCandidates | None:
        """Returns the inputs of a request's correction, None if it has no new candidate or the user no labelled item.

        The catalogue must not change during the call.

        Args:
            items: (n,) numbers of the candidates.
            lookups: Lookups of the candidates.
            names, labels: Labelled items of the user's record, oldest first.
        """
        places = np.flatnonzero(self.new(lookups))
        if not len(places) or not names:
            return None
        numbers = self._catalogue.item_numbers
        known = [(name, numbers[name], label) for name, label in zip(names, labels, strict=True) if name in numbers]
        if not known:
            return None
        known = known[-LABELLED:]
        own = np.array([number for _, number, _ in known], dtype=np.int64)
        labelled = LabelledItems.of(own, np.array([label for *_, label in known], dtype=np.int64))
        distinct, inverse = np.unique(np.concatenate([items[places], own]), return_inverse=True)
        local = LabelledItems(labelled.items.copy(), labelled.labels)
        local.items[0, : len(own)] = inverse[len(places) :]
        return NewCandidates(
            correction=self._correction,
            size=len(items),
            places=places,
            asked=inverse[: len(places)].astype(np.int64),
            labelled=local,
            names=[name for name, *_ in known],
            residuals=self._correction.residuals(labelled),
            vectors=self._catalogue.ranker_vectors[distinct],
        )


def corrector_of(bundle: BundleContents, catalogue: Catalogue) -> Corrector | None:
    """Returns the corrector of a bundle over a catalogue of it, None if the bundle has no correction."""
    correction = bundle.correction
    return None if correction is None else Corrector(bundle.schema, correction, catalogue)


def labelled_of(record: HistoryRecord | None) -> tuple[Sequence[str], bytes]:
    """Returns the labelled items of a user's record and their labels, oldest first."""
    return ((), b"") if record is None else (record.labelled, record.labels)
