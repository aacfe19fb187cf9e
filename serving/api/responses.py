"""Converts answers of a service to the bodies of HTTP responses."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from features.shown.message import Impression
from models.bundle.corrector import Correction
from models.bundle.request_aggregates import AsOf
from serving.api.bodies import (
    EPOCH,
    CorrectionBody,
    ItemResponse,
    LeftOutBody,
    MovedBody,
    NeighbourBody,
    PlanView,
    RankedItemBody,
    RankResponse,
    RetrievedItemBody,
    RetrieveResponse,
    SharedConceptBody,
)
from serving.policy.arrange import Arrangement
from serving.ranking.answer import ItemView, RankingAnswer, RetrievalAnswer
from serving.retrieval.fusion import source_of
from serving.retrieval.meaning import SharedConcept


def rank_response(answer: RankingAnswer, shown: Impression | None, *, clock: bool) -> RankResponse:
    """Converts a ranking.

    Args:
        answer: The ranking.
        shown: Recorded impression of the ranking. None if no impression was recorded.
        clock: True if times are in microseconds since 1970, False if they are positions.
    """
    reasons: list[dict[str, float] | None] = [*answer.reasons] or [None] * len(answer.items)
    shared = _shared(answer.shared, len(answer.items))
    corrections = [_correction(one) for one in answer.corrections] or [None] * len(answer.items)
    moved = _moved(answer.arrangement, len(answer.items), explain=bool(answer.reasons))
    left_out = LeftOutBody.model_validate(answer.left_out) if answer.left_out and answer.reasons else None
    tasks = [dict(answer.tasks[item]) if answer.tasks else None for item, _ in answer.items]
    sources: list[str | None] = [*answer.sources] or [None] * len(answer.items)
    ranked = zip(answer.items, tasks, reasons, shared, corrections, moved, sources, strict=True)
    return RankResponse(
        bundle=answer.bundle,
        items=[
            RankedItemBody(
                item=item,
                score=score,
                tasks=by_task,
                reasons=contributions,
                concepts=concepts,
                correction=correction,
                moved=own,
                source=source,
                ranks=dict(answer.found[item]) if answer.reasons and source is not None else None,
            )
            for (item, score), by_task, contributions, concepts, correction, own, source in ranked
        ],
        known_user=answer.known_user,
        unknown_items=answer.unknown_items,
        retrieved=answer.retrieved,
        stale=answer.stale,
        **_as_of(answer.as_of, clock=clock),
        impression=shown.id if shown is not None else None,
        policy=answer.policy or None,
        left_out=left_out,
    )


def retrieve_response(answer: RetrievalAnswer, *, explain: bool = False) -> RetrieveResponse:
    """Converts the result of a retrieval.

    Args:
        answer: Result of the retrieval.
        explain: True if the request asked for an explanation.
    """
    plan = answer.plan
    shared = _shared(answer.shared, len(answer.items))
    for_user = answer.sources is not None
    ranks = [dict(one) for one in answer.ranks] if answer.channels or for_user else [None] * len(answer.items)
    sources = [source_of(one) if for_user else None for one in answer.ranks]
    moved = _moved(answer.arrangement, len(answer.items), explain=explain)
    found = zip(answer.items, sources, ranks, shared, moved, strict=True)
    return RetrieveResponse(
        bundle=answer.bundle,
        items=[
            RetrievedItemBody(item=item, score=score, source=source, ranks=own, concepts=concepts, moved=places)
            for (item, score), source, own, concepts, places in found
        ],
        plan=PlanView(method=plan.method, why=plan.why, share=plan.share, matches=plan.matches),
        view=answer.view,
        aspect=answer.aspect,
        channels=list(answer.channels) or None,
        sources=None if answer.sources is None else list(answer.sources),
        space=answer.space or None,
        policy=answer.policy or None,
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


def _moved(arrangement: Arrangement | None, items: int, *, explain: bool) -> list[MovedBody | None]:
    """Returns how a policy gave each item its place, None for each without a policy or an explanation."""
    if arrangement is None or not explain:
        return [None] * items
    columns = (
        arrangement.places,
        arrangement.boosts,
        arrangement.pinned,
        arrangement.drawn,
        arrangement.propensities,
        arrangement.similarities,
    )
    names = ("place", "times", "pinned", "drawn", "propensity", "similarity")
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [MovedBody(**dict(zip(names, row, strict=True))) for row in rows]


def _correction(found: Correction | None) -> CorrectionBody | None:
    if found is None:
        return None
    neighbours = [NeighbourBody(item=one.item, label=one.label, log_odds=one.log_odds) for one in found.neighbours]
    return CorrectionBody(log_odds=found.log_odds, neighbours=neighbours)


def _shared(found: Sequence[Sequence[SharedConcept]], items: int) -> list[list[SharedConceptBody] | None]:
    """Returns the concepts of each item, None for each if no explanation was asked for."""
    return [[SharedConceptBody(**one._asdict()) for one in concepts] for concepts in found] or [None] * items


def _as_of(answered: AsOf | None, *, clock: bool) -> dict[str, Any]:
    """Returns the fields that say as of when aggregates were answered."""
    if answered is None:
        return {}
    moment = EPOCH + timedelta(microseconds=answered.time) if clock else answered.time
    return {"as_of": moment, "as_of_source": "request" if answered.asked else "stream"}
