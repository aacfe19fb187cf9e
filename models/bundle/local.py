"""Ranks by a bundle alone: its published table, catalogue and histories, without a server or a store."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.errors import BundleError, DatasetError, EventError
from features.message import context_row
from models.bundle.catalogue import Catalogue
from models.bundle.contents import BundleContents
from models.bundle.request_aggregates import published_columns
from models.bundle.scorer import Scorer
from models.table.batch import Entities


class LocalRanker:
    """Scores items for users with a bundle as published.

    Args:
        bundle: Bundle whose table, network, catalogue and histories are read on construction.

    Raises:
        BundleError: The bundle was trained on events without items.
    """

    def __init__(self, bundle: BundleContents) -> None:
        self._bundle = bundle
        self._catalogue = Catalogue(bundle)
        if not self._catalogue.item_ids:
            raise BundleError(f"bundle {bundle.id} was trained on events without items, so it ranks no items")
        self._unknown = self._catalogue.add_default_item()
        self._scorer = Scorer(bundle.schema, bundle.network(), self._catalogue)
        self._rows = bundle.rows()
        self._aggregator = bundle.aggregates()
        visits = bundle.history.group_by("user_id", maintain_order=True).agg("item_id")
        self._visits: dict[str, list[str]] = dict(zip(visits["user_id"], visits["item_id"].to_list(), strict=True))

    def rank(self, user: str, items: Sequence[str], context: Mapping[str, Any]) -> NDArray[np.float32]:
        """Returns probabilities (N,) float32 of N items; see `Bundle.rank`."""
        if not len(items):
            return np.zeros(0, dtype=np.float32)
        numbers = self._catalogue.item_numbers
        chosen = np.array([numbers.get(name, self._unknown) for name in items], dtype=np.int64)
        visited = [numbers[name] for name in self._visits.get(user, ()) if name in numbers]
        history = np.array(visited[-self._bundle.schema.history_length :], dtype=np.int64)
        event = context_frame(self._bundle, context)
        events = Entities(self._bundle.schema, "event", event, self._catalogue.admission)
        aggregates = published_columns(self._aggregator, self._scorer, user, chosen)
        lookups = self._scorer.lookups(user, chosen, history, events, aggregates)
        return self._scorer.score(lookups, self._rows[lookups.rows])


def context_frame(bundle: BundleContents, context: Mapping[str, Any], *, at_us: int | None = None) -> pl.DataFrame:
    """Returns the context of a request as a row of the events' features. Absent columns are null.

    Args:
        bundle: Bundle whose dataset declares the columns.
        context: Values by column.
        at_us: Time that expressions over the events' clock read, microseconds since 1970. None: the time is null.

    Raises:
        EventError: A column is unknown, or a value is of a wrong type.
    """
    events = bundle.dataset.events
    known = (*events.categorical, *events.numeric, *events.read)
    unknown = [name for name in context if name not in known]
    if unknown:
        valid = ", ".join(known) or "none"
        raise EventError(f"context: unknown column {unknown[0]!r}; the dataset's event columns are: {valid}")
    if not (events.categorical_features or events.numeric_features):
        return pl.DataFrame({"nothing": [0]})
    try:
        return context_row(context, events, version=bundle.canonical, at_us=at_us)
    except (DatasetError, pl.exceptions.PolarsError, TypeError, ValueError, OverflowError) as error:
        raise EventError(f"context: {error}") from error
