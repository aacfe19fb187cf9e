"""Answers of a service, before they are encoded for HTTP."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from models.bundle.bundle import Bundle
from models.bundle.corrector import Correction
from models.bundle.record import ItemRecord
from models.bundle.request_aggregates import AsOf
from serving.policy.arrange import Arrangement
from serving.ranking.inputs import RankingInputs
from serving.retrieval.filter import attribute_json
from serving.retrieval.fusion import source_of
from serving.retrieval.meaning import SharedConcept
from serving.retrieval.search_plan import SearchPlan


@dataclass(frozen=True)
class RankingAnswer:
    """Result of a ranking.

    Attributes:
        bundle: Id of the bundle that ranked.
        items: Item id and probability of a positive event, best first.
        known_user: False if neither the bundle nor the stream knows the user.
        unknown_items: Candidates that neither the bundle nor the stream knows. They were scored without features.
        retrieved: True if retrieval chose the candidates.
        stale: True if the store did not answer, so that rows or history may be old.
        reasons: Contribution of each feature to the log-odds of each item. Empty unless the request asked for reasons.
        as_of: Time as of which aggregates were answered. None without aggregates.
        shared: Concepts that each item shares most with the items that the user liked. Empty unless the request asked
            for reasons and the bundle has concepts.
        inputs: Values and rows that the ranking read. None without a candidate.
        sent: Served values of the declared fields: of the request, and of `items`, a list for each field.
        corrections: Correction of each item by its neighbours, None for an item whose score is the ranker's own. Empty
            unless the request asked for reasons.
        policy: Name of the policy that arranged the items; "" without one.
        arrangement: Places of the items, and the rules that gave them; None without a policy.
        left_out: Candidates that the policy left out, by the rule, `consumed` or `cap`.
        tasks: Probability of each task by its name, for each item by its id. Empty for one label.
        judge: Name of the judged task. Empty for one label.
        found: Rank of each retrieved item in the list of each source that found it, from 1, by the item's id. Empty if
            the request gave the candidates.
    """

    bundle: str
    items: list[tuple[str, float]]
    known_user: bool
    unknown_items: list[str]
    retrieved: bool
    stale: bool
    reasons: Sequence[dict[str, float]] = ()
    as_of: AsOf | None = None
    shared: Sequence[Sequence[SharedConcept]] = ()
    inputs: RankingInputs | None = None
    sent: tuple[dict[str, Any], dict[str, list[Any]]] = field(default_factory=lambda: ({}, {}))
    corrections: Sequence[Correction | None] = ()
    policy: str = ""
    arrangement: Arrangement | None = None
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    judge: str = ""
    found: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def sources(self) -> list[str]:
        """Source of each item: `towers`, `content`, `both` or `popular`; empty if the request gave the candidates."""
        return [source_of(self.found[item]) for item, _ in self.items] if self.retrieved else []

    @property
    def judged(self) -> list[float]:
        """Probability of each item that a rollout judges: that of the judged task, or the score of one label."""
        return [self.tasks[item][self.judge] if self.tasks else score for item, score in self.items]


@dataclass(frozen=True)
class RetrievalAnswer:
    """Result of a retrieval.

    Attributes:
        bundle: Id of the bundle that answered.
        items: Item id and score, best first: the inner product of the unit vectors, BM25 of the words alone, or the sum
            of reciprocal ranks of both.
        plan: Search plan.
        view: View in which the items are nearest.
        aspect: Aspect in which the items are nearest, instead of the view; None if none was asked for.
        shared: Concepts that each item shares most with the query. Empty unless the request asked for them.
        channels: Channels of a text search. Empty for an item or a user.
        ranks: Rank of each item in each channel or source that found it, from 1.
        space: Id of the space in which vectors were compared. Empty if none were.
        policy: Name of the policy that arranged the items; "" without one.
        arrangement: Places of the items, and the rules that gave them; None without a policy.
        sources: Sources that ranked items for a user, none of them if the items are the most popular ones. None if no
            user asked.
    """

    bundle: str
    items: list[tuple[str, float]]
    plan: SearchPlan
    view: str
    aspect: str | None = None
    shared: Sequence[Sequence[SharedConcept]] = ()
    channels: Sequence[str] = ()
    ranks: Sequence[Mapping[str, int]] = ()
    space: str = ""
    policy: str = ""
    arrangement: Arrangement | None = None
    sources: Sequence[str] | None = None


@dataclass(frozen=True)
class ItemView:
    """Item as the bundle and the stream know it.

    Attributes:
        bundle: Id of the bundle that answered.
        item: Id of the item.
        encoder: Id of the encoder of `vector`, or "".
        codebook: Id of the codebook of `codes`, or "".
        codes: Semantic ID, empty without content.
        vector: Content vector, empty without content.
        attributes: Values of the feature columns and the filterable columns, by column.
    """

    bundle: str
    item: str
    encoder: str
    codebook: str
    codes: list[int]
    vector: list[float]
    attributes: dict[str, Any]


def stored_view(bundle: str, item: str, stored: ItemRecord, columns: Sequence[str]) -> ItemView:
    """Returns the view of an item's record in the store.

    Args:
        bundle: Id of the bundle.
        item: Id of the item.
        stored: Record of the item.
        columns: Columns of the view's attributes.
    """
    return ItemView(
        bundle,
        item,
        stored.encoder,
        stored.codebook,
        stored.codes,
        stored.content().tolist(),
        {column: attribute_json(stored.features.get(column)) for column in columns},
    )


def published_view(bundle: Bundle, number: int, columns: Sequence[str]) -> ItemView:
    """Returns the view of a published item.

    Args:
        bundle: Bundle with the item.
        number: Row of the item in `bundle.items`.
        columns: Columns of the view's attributes.
    """
    row = bundle.items.row(number, named=True)
    codes = row.get("semantic_codes")
    return ItemView(
        bundle.id,
        row["item_id"],
        bundle.manifest.encoder or "",
        bundle.manifest.codebook or "",
        list(codes) if codes is not None else [],
        list(row.get("content_vector") or []),
        {column: attribute_json(row.get(column)) for column in columns},
    )
