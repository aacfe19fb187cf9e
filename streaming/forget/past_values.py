"""Keeps the values that items had before their updates, so that a removal finds the aggregates of a user by them.

The key of an aggregate by a user and a column of the items is one hash of both. A removal searches the user's keys
with the values that the published and the present items have. An event between two updates of an item was counted by
a value that neither of them has.

The memory is one key for each distinct value that was ever replaced, of the columns that are combined with users.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.aggregate.key_map import KeyMap, Keys
from features.aggregate.plan import AggregatePlan, column_of
from models.bundle.catalogue import Catalogue
from streaming.snapshot import PAST


class PastValues:
    """Keys of the values that updates of items replaced, by part of a plan of aggregates.

    Args:
        plan: Plan of the aggregates.
        catalogue: Catalogue whose items are updated.
    """

    def __init__(self, plan: AggregatePlan, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        parts = [part for group in plan.groups if "user" in group.by for part in group.by]
        self._maps = {part: KeyMap() for part in dict.fromkeys(parts) if part.startswith("item.")}

    def add(self, items: Iterable[str]) -> None:
        """Keeps the values of items that an update is about to replace. Unknown ids have none.

        Args:
            items: Ids of the items.
        """
        numbers = self._catalogue.item_numbers
        index = np.array([numbers[name] for name in items if name in numbers], dtype=np.int64)
        for part, known in self._maps.items():
            known.put(self._catalogue.items.keys(column_of(part)[1], index).values.view(np.uint64))

    def keys(self, part: str) -> Keys:
        """Returns the keys (N,) of the replaced values of a part."""
        return self._maps[part].keys() if part in self._maps else np.zeros(0, dtype=np.uint64)

    def arrays(self) -> dict[str, NDArray[np.int64]]:
        """Returns the keys as arrays by name. A part without a key has no array."""
        return {f"{PAST}{part}": known.keys().view(np.int64) for part, known in self._maps.items() if len(known)}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Sets the keys to arrays that `arrays` returned. A snapshot of an earlier version has none."""
        for part in self._maps:
            self._maps[part] = KeyMap()
            if (keys := arrays.get(f"{PAST}{part}")) is not None:
                self._maps[part].put(keys.view(np.uint64))
