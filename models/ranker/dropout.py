"""Hides values in training, so that the network learns to score without values that are not admitted yet.

A new item lacks its id and its deep prefixes together, so they are hidden together. An id hidden alone would teach the
network to know the item by its deep prefixes instead, which a new item lacks as well.

Shape letters: B batch, F features.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.table.schema import SEMANTIC_ID, Feature, Schema

_ALL = 255
# Number of a Semantic ID's tokens that remain, by chance: deeper tokens are hidden more often.
_LEFT = (0.7, 0.3)


@dataclass(frozen=True)
class DropoutConfig:
    """Shares of the training examples that are shown with new values; histories and exact features stay whole.

    Attributes:
        value: Share in which a hashed feature of the user or the event, each by itself, reads nothing.
        item: Share in which the item's id reads nothing, and its Semantic ID at most one token.
    """

    value: float = 0.05
    item: float = 0.3


class ValueDropout:
    """Draws the values that training hides.

    Args:
        schema: Schema whose features are hidden; without admission nothing is hidden, since every value then reads
            rows.
        config: Shares of the examples.
    """

    def __init__(self, schema: Schema, config: DropoutConfig) -> None:
        self._rates = np.array([config.value if _by_itself(feature) else 0.0 for feature in schema.features])
        item = [feature.of == "item" and not feature.exact for feature in schema.features]
        columns = np.array([feature.column for feature in schema.features])
        self._ids = np.flatnonzero(item & (columns == "item_id"))
        self._codes = np.flatnonzero(item & (columns == SEMANTIC_ID))
        self._item = config.item if len(self._ids) + len(self._codes) else 0.0
        self._any = bool(schema.admission) and (self._rates.any() or self._item > 0)

    def limits(self, rng: np.random.Generator, size: int) -> NDArray[np.uint8] | None:
        """Returns the most values of each feature that B = `size` examples read, (B, F) uint8; None for all values."""
        if not self._any:
            return None
        limits = np.where(rng.random((size, len(self._rates))) < self._rates, 0, _ALL).astype(np.uint8)
        as_new = np.flatnonzero(rng.random(size) < self._item)
        left = rng.choice(len(_LEFT), len(as_new), p=_LEFT)
        limits[np.ix_(as_new, self._ids)] = 0
        limits[np.ix_(as_new, self._codes)] = left[:, None]
        return limits


def _by_itself(feature: Feature) -> bool:
    return feature.of in ("user", "event") and not feature.exact
