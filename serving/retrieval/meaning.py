"""Concepts and aspects in retrieval: queries that steer away, filters on concepts, and near items in one aspect.

An item carries a concept if its column says so. Where the column is empty, or no column declares the concept, the head
predicts it from the item's vector. Answers mark a predicted concept.

Shape letters: M items, D dim.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from features.errors import DatasetError, EventError
from features.value.filter import Filter
from models.encoder.meaning.aspects import parts
from models.encoder.meaning.concepts import ConceptHead, steer
from serving.retrieval.rows import Floats

PREDICTED, CARRIED = "predicted_concepts", "carried_concepts"
"""Filterable columns: concepts that the head predicts, and concepts that items carry by column or by prediction."""
SHARED = 3


@dataclass(frozen=True)
class PolicyRequest:
    """Part of a request that names its policy.

    Attributes:
        name: Name of the policy.
        draw: Text that decides what chance draws, such as the id of the request.
        shown_to: Id of the user to whom retrieved items are shown, if the request does not ask by a user.
    """

    name: str
    draw: str
    shown_to: str | None = None


@dataclass(frozen=True)
class Meant:
    """Part of a request that speaks of aspects, concepts, channels and the policy.

    Attributes:
        aspect: Aspect in which items must be near; None for a view.
        avoid: Concepts from which the query steers away.
        without: Concepts that no answer may carry.
        explain: True if each answer names the concepts that it shares most with the query.
        channels: Channels of a text search; empty for all that fit the request.
        sources: Sources of a user's candidates; empty for all that fit the request.
        policy: Policy that arranges the answer; None if scores order the items.
    """

    aspect: str | None = None
    avoid: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    explain: bool = False
    channels: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    policy: PolicyRequest | None = None


NOTHING = Meant()


class SharedConcept(NamedTuple):
    """Concept that a query and an answer share.

    Attributes:
        concept: Name of the concept.
        share: Probability that both carry the concept.
        predicted: False if both items declare the concept in a column.
    """

    concept: str
    share: float
    predicted: bool


class Meaning:
    """Concepts of a bundle's items.

    Args:
        head: Concepts that vectors predict; None if the bundle has none.
        bundle: Id of the bundle, for errors.
    """

    def __init__(self, head: ConceptHead | None, bundle: str) -> None:
        self._head, self._bundle = head, bundle
        self._columns = sorted({one.column for one in head.concepts if one.column}) if head else []
        self._column_of = {one.name: one.column for one in head.concepts} if head else {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the concepts; empty if the bundle has none."""
        return self._head.names if self._head else ()

    @property
    def filterable(self) -> tuple[str, ...]:
        """Columns that filters may name; none without concepts."""
        return (PREDICTED, CARRIED) if self._head else ()

    def columns(self, vectors: Floats, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, list[str] | None]]:
        """Returns the filterable columns of M items, as rows.

        Args:
            vectors: (M, D) content vectors.
            rows: M items' columns by name.
        """
        if self._head is None:
            return [{} for _ in rows]
        names = np.array(self._head.names, dtype=object)
        found: list[dict[str, list[str] | None]] = []
        for carried, row in zip(self._head.carries(vectors), rows, strict=True):
            predicted = names[carried].tolist()
            declared = {column: parts(row.get(column)) for column in self._columns}
            kept = [name for name in predicted if not declared.get(self._column_of[name])]
            stated = [name for column in self._columns for name in declared[column]]
            found.append({PREDICTED: predicted, CARRIED: sorted({*kept, *stated})})
        return found

    def with_columns(self, items: pl.DataFrame, vectors: Floats) -> pl.DataFrame:
        """Returns the items with the filterable columns."""
        if self._head is None:
            return items
        rows = self.columns(vectors, items.select(self._columns).to_dicts() if self._columns else [{}] * items.height)
        return items.with_columns(
            pl.Series(name, [row[name] for row in rows], dtype=pl.List(pl.String)) for name in self.filterable
        )

    def steered(self, query: Floats | None, avoided: Sequence[str]) -> Floats | None:
        """Returns a query (D,) that steers away from concepts.

        Raises:
            EventError: The bundle has no such concept.
        """
        head = self._known("avoid", avoided)
        if head is None or query is None or not query.any():
            return query
        try:
            return steer(head, query, avoided)
        except DatasetError as error:
            raise EventError(f"avoid: {error}") from error

    def excluding(self, refused: Sequence[str], wanted: Filter | None) -> Filter | None:
        """Returns a filter with the further condition that items carry none of some concepts.

        Raises:
            EventError: The bundle has no such concept.
        """
        if self._known("without", refused) is None:
            return wanted
        none = Filter.model_validate({"not": {"column": CARRIED, "in": list(refused)}})
        return none if wanted is None else Filter.model_validate({"and": [wanted, none]})

    def shared(self, query: Floats, item: Floats, declared: Sequence[Mapping[str, Any]]) -> list[SharedConcept]:
        """Returns the concepts that a query (D,) and an item (D,) share most.

        Args:
            query, item: Content vectors.
            declared: Columns of the item, and those of the item that asked if one did.
        """
        if self._head is None:
            return []
        stated = [{name for column in self._columns for name in parts(row.get(column))} for row in declared]
        both = set.intersection(*stated) if len(stated) == 2 else set()
        return [
            SharedConcept(name, round(share, 4), name not in both)
            for name, share in self._head.shared(query, item, SHARED)
        ]

    def _known(self, field: str, asked: Sequence[str]) -> ConceptHead | None:
        """Returns the head, or None if nothing is asked."""
        if not asked:
            return None
        unknown = [name for name in asked if name not in self.names]
        if unknown:
            known = ", ".join(self.names) or "none; declare concepts in [items] and run again"
            raise EventError(f"{field}: bundle {self._bundle} has no concept {unknown[0]!r}; choose of {known}")
        return self._head
