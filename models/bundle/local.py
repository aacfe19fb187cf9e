"""Ranks by a bundle alone: its published table, catalogue and histories, without a server or a store."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.errors import BundleError, EventError
from features.value.field import split_candidates
from models.bundle.catalogue import Catalogue
from models.bundle.contents import BundleContents
from models.bundle.corrector import corrector_of, labelled_of
from models.bundle.record import published_histories
from models.bundle.request_aggregates import published_columns
from models.bundle.request_features import request_events, sent_values
from models.bundle.scorer import Scorer


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
        self._scorer = Scorer(
            bundle.schema, bundle.network(), self._catalogue, bundle.dataset.events.varying, bundle.formula
        )
        self._rows = bundle.rows()
        self._aggregator = bundle.aggregates()
        self._corrector = corrector_of(bundle, self._catalogue)
        self._histories = dict(published_histories(bundle))

    def rank(
        self, user: str, candidates: Sequence[str | Mapping[str, Any]], context: Mapping[str, Any]
    ) -> NDArray[np.float32]:
        """Returns probabilities (N,) float32 of N items; see `Bundle.rank`."""
        try:
            items, fields = split_candidates(candidates)
        except ValueError as error:
            raise EventError(str(error)) from error
        sent = sent_values(self._bundle, context, fields, len(items))
        if not len(items):
            return np.zeros(0, dtype=np.float32)
        numbers = self._catalogue.item_numbers
        chosen = np.array([numbers.get(name, self._unknown) for name in items], dtype=np.int64)
        record = self._histories.get(user)
        visited = [numbers[name] for name in (record.items if record else ()) if name in numbers]
        history = np.array(visited[-self._bundle.schema.history_length :], dtype=np.int64)
        events = request_events(self._bundle, self._catalogue, sent, user, chosen)
        aggregates = published_columns(self._aggregator, self._scorer, user, chosen)
        lookups = self._scorer.lookups(user, chosen, history, events, aggregates)
        scores = self._scorer.score(lookups, self._rows[lookups.rows])
        if self._corrector is None:
            return scores
        new = self._corrector.gather(chosen, lookups, *labelled_of(record))
        return scores if new is None else new.apply(scores)
