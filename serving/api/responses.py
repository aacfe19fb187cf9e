"""Converts answers of a service to the bodies of HTTP responses."""

from serving.api.bodies import (
    ItemResponse,
    PlanView,
    RankedItemBody,
    RankResponse,
    RetrievedItemBody,
    RetrieveResponse,
)
from serving.ranking.answer import ItemView, RankingAnswer, RetrievalAnswer
from serving.rollout.impression import Impression


def rank_response(answer: RankingAnswer, shown: Impression | None) -> RankResponse:
    """Converts a ranking.

    Args:
        answer: The ranking.
        shown: Recorded impression of the ranking. None if no impression was recorded.
    """
    reasons: list[dict[str, float] | None] = [*answer.reasons] or [None] * len(answer.items)
    return RankResponse(
        bundle=answer.bundle,
        items=[
            RankedItemBody(item=item, score=score, reasons=contributions)
            for (item, score), contributions in zip(answer.items, reasons, strict=True)
        ],
        known_user=answer.known_user,
        unknown_items=answer.unknown_items,
        retrieved=answer.retrieved,
        stale=answer.stale,
        impression=shown.id if shown is not None else None,
    )


def retrieve_response(answer: RetrievalAnswer) -> RetrieveResponse:
    """Converts the result of a retrieval."""
    plan = answer.plan
    return RetrieveResponse(
        bundle=answer.bundle,
        items=[RetrievedItemBody(item=item, score=score) for item, score in answer.items],
        plan=PlanView(method=plan.method, why=plan.why, share=plan.share, matches=plan.matches),
    )


def item_response(view: ItemView) -> ItemResponse:
    """Converts an item."""
    return ItemResponse(
        bundle=view.bundle,
        item=view.item,
        encoder=view.encoder,
        codebook=view.codebook,
        semantic_id=view.codes,
        vector=view.vector,
        attributes=view.attributes,
    )
