"""Hides values in training, so that the network learns to score without values that are not admitted yet.

A new item lacks its id and its deep prefixes together, so they are hidden together. An id hidden alone would teach the
network to know the item by its deep prefixes instead, which a new item lacks as well. For the same reason a user's id
is hidden together with the user's values that few users share: a postcode names the user.

Shape letters: B batch, F features.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.table.batch import Assembler
from models.table.schema import SEMANTIC_ID, Feature, Schema

_ALL = 255
# Number of a Semantic ID's tokens that remain, by chance: deeper tokens are hidden more often.
_LEFT = (0.7, 0.3)
# With fewer users for a value, the value is as good as an id. A postcode of MovieLens has 1.8, an occupation 288.
_FEW_USERS = 10


@dataclass(frozen=True)
class DropoutConfig:
    """Shares of the training examples that are shown with new values; histories and exact features stay whole.

    Attributes:
        value: Share in which a hashed feature of the user or the event, each by itself, reads nothing.
        item: Share in which the item's id reads nothing, and its Semantic ID at most one token.
        user: Share in which the user's id, and every hashed feature of the user whose values name users, read nothing.
            A value names users if under ten users have it, in the mean over the feature's values.
    """

    value: float = 0.05
    item: float = 0.3
    user: float = 0.1


class ValueDropout:
    """Draws the values that training hides.

    Args:
        schema: Schema whose features are hidden; without admission nothing is hidden, since every value then reads
            rows.
        config: Shares of the examples.
        users_per_value: Users over distinct values, by column of the user; a column that is not given names users.
    """

    def __init__(
        self, schema: Schema, config: DropoutConfig, users_per_value: Mapping[str, float] | None = None
    ) -> None:
        self._rates = np.array([config.value if _by_itself(feature) else 0.0 for feature in schema.features])
        item = [feature.of == "item" and not feature.exact for feature in schema.features]
        columns = np.array([feature.column for feature in schema.features])
        self._ids = np.flatnonzero(item & (columns == "item_id"))
        self._codes = np.flatnonzero(item & (columns == SEMANTIC_ID))
        self._item = config.item if len(self._ids) + len(self._codes) else 0.0
        shared = users_per_value or {}
        names = [
            feature.of == "user" and not feature.exact and shared.get(feature.column, 1.0) < _FEW_USERS
            for feature in schema.features
        ]
        self._users = np.flatnonzero(names)
        self._user = config.user if len(self._users) else 0.0
        self.any = bool(schema.admission) and (bool(self._rates.any()) or self._item > 0 or self._user > 0)

    def limits(self, rng: np.random.Generator, size: int) -> NDArray[np.uint8] | None:
        """Returns the most values of each feature that B = `size` examples read, (B, F) uint8; None for all values."""
        if not self.any:
            return None
        limits = np.where(rng.random((size, len(self._rates))) < self._rates, 0, _ALL).astype(np.uint8)
        as_new = np.flatnonzero(rng.random(size) < self._item)
        left = rng.choice(len(_LEFT), len(as_new), p=_LEFT)
        limits[np.ix_(as_new, self._ids)] = 0
        limits[np.ix_(as_new, self._codes)] = left[:, None]
        limits[np.ix_(np.flatnonzero(rng.random(size) < self._user), self._users)] = 0
        return limits


def users_per_value(source: Assembler) -> dict[str, float]:
    """Returns the number of users over the number of distinct values, by column of the user."""
    columns = {feature.column for feature in source.schema.of("user")}
    return {column: source.users.size / max(source.users.values(column), 1) for column in columns}


def _by_itself(feature: Feature) -> bool:
    return feature.of in ("user", "event") and not feature.exact
