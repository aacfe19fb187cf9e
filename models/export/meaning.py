"""Meaning of each exported column, in a sentence, from the descriptor and the plan of the aggregates."""

from typing import Final

from features.aggregate.plan import AggregatePlan, Aggregation
from features.dataset.descriptor import Dataset, Events, Items, Users
from features.dataset.label import TASK

_SINCE = "Time since which the row is valid, UTC: 1970, since this table has no clock."
_FIXED: Final = {
    "examples": {
        "event": "Row of the event in the events' files, from 0. A drawn negative has the row of its positive.",
        "user_id": "Id of the user.",
        "item_id": "Id of the item.",
        "event_timestamp": "Time of the event, UTC. History and aggregates are as of strictly before this time.",
        "event_order": "Position of the event in time; the events have no clock.",
        "label": "1 for a positive event, 0 for a negative one.",
        "split": "Part of the data: train, validation or test.",
        "history": "Ids of the user's last positive items strictly before the event, oldest first.",
    },
    "items": {
        "item_id": "Id of the item.",
        "event_timestamp": _SINCE,
        "text": "Text that the encoder read.",
        "listed": "True if the catalogue has the item, false if it occurs in events alone.",
        "content_vector": "Content vector of the item's text.",
        "ranker_vector": "Content vector that codebook and ranker read, in a bundle of a re-embedded catalogue.",
        "semantic_codes": "Semantic ID: the code of each level, coarse to fine.",
        "semantic_id": "Tokens of the Semantic ID, as the ranker reads them.",
        "train_positives": "Number of positive events of the item in training.",
    },
    "users": {
        "user_id": "Id of the user.",
        "event_timestamp": _SINCE,
        "listed": "True if the users table has the user, false if the user occurs in events alone.",
    },
    "histories": {
        "user_id": "Id of the user.",
        "event_timestamp": "Time since which the history holds, UTC: a microsecond after its newest visit.",
        "event_order": "Position since which the history holds; the events have no clock.",
        "history": "Ids of the user's last positive items before the test part, oldest first.",
    },
}
_MODELS: Final = {
    "content_vector": ("encoder",),
    "semantic_codes": ("encoder", "codebook"),
    "semantic_id": ("encoder", "codebook", "tokens"),
}
_KINDS: Final = {
    "count": "log(1 + n) of the number of events",
    "positive": "log(1 + n) of the number of positive events",
    "recency": "log(1 + n) of the seconds since the last event, NaN before the first",
}


def meaning_of(table: str, column: str, dataset: Dataset, aggregates: AggregatePlan) -> str:
    """Returns the meaning of a column of an exported table; empty if the column is unknown."""
    if table == "examples":
        for aggregation in aggregates.aggregations:
            if column in aggregation.columns:
                return _aggregate(aggregation, column)
        if column.startswith(TASK):
            task = column.removeprefix(TASK)
            return f"1 for a positive event of the task {task}, 0 for a negative one, null if unknown."
    if known := _FIXED[table].get(column):
        return known
    source = {"examples": dataset.events, "items": dataset.items, "users": dataset.users}.get(table)
    return "" if source is None else _feature(source, column)


def models_of(table: str, column: str, models: dict[str, str]) -> dict[str, str]:
    """Returns the ids of the models that computed a column, by kind."""
    kinds = _MODELS.get(column, ()) if table == "items" else ()
    return {kind: models[kind] for kind in kinds if kind in models}


def _feature(source: Events | Items | Users, column: str) -> str:
    table = f"[{type(source).__name__.lower()}]"
    if column in source.categorical_features:
        return f"Categorical feature of {table} in the descriptor."
    if column in source.numeric_features:
        return f"Numeric feature of {table} in the descriptor."
    if isinstance(source, Items) and column in source.filterable:
        return f"Column of {table} in the descriptor on which retrieval filters."
    if isinstance(source, Items) and column in source.named_for_meaning:
        return f"Column of {source.named_for_meaning[column]} in the descriptor."
    return ""


def _aggregate(aggregation: Aggregation, column: str) -> str:
    opening = f"Aggregate {aggregation.name} by {' and '.join(aggregation.by)}, strictly before the event"
    of_column = f"sign(x) log(1 + |x|) of the {aggregation.kind} of {aggregation.column}"
    content = _KINDS.get(aggregation.kind, of_column)
    if aggregation.kind == "recency":
        return f"{opening}: {content}."
    place = aggregation.columns.index(column)
    if aggregation.kind == "rate":
        place, is_count = divmod(place, 2)
        content = f"log-odds of the share of positives, with a prior of {aggregation.prior:g} events"
        if is_count:
            content = "log(1 + n) of the number of events behind the rate"
    kind, horizon = aggregation.horizons[place]
    over = "of all time" if horizon == "all" else f"over {horizon}" if kind == "window" else f"half-life {horizon}"
    return f"{opening}, {over}: {content}."
