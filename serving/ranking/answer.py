"""Answers of a service, before they become HTTP."""

from dataclasses import dataclass
from typing import Any

from serving.retrieval.search_plan import SearchPlan


@dataclass(frozen=True)
class RankingAnswer:
    """An answer.

    Attributes:
        bundle: id of the bundle that answered.
        items: (item id, probability), best first.
        known_user: False when neither the bundle nor the stream knows the user.
        unknown_items: candidates nobody knows; they were scored without item features.
        retrieved: True if the candidates were found by vector.
        stale: True if the store did not answer, so that rows and history are as they were last seen.
        reasons: for each item, what each feature adds to its log-odds; empty where nobody asked.
    """

    bundle: str
    items: list[tuple[str, float]]
    known_user: bool
    unknown_items: list[str]
    retrieved: bool
    stale: bool
    reasons: list[dict[str, float]]


@dataclass(frozen=True)
class RetrievalAnswer:
    """Result of retrieval: (item id, inner product of unit vectors), best first, and the plan."""

    bundle: str
    items: list[tuple[str, float]]
    plan: SearchPlan


@dataclass(frozen=True)
class ItemView:
    """An item as the bundle and the stream know it.

    Attributes:
        codes: its Semantic ID, empty without content.
        vector: its content vector, empty without content.
        attributes: its feature and filterable columns.
    """

    bundle: str
    item: str
    encoder: str
    codebook: str
    codes: list[int]
    vector: list[float]
    attributes: dict[str, Any]
