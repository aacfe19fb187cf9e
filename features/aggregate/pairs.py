"""Pairs of a key and a value that a distinct count has met, each with its key.

A pair is kept as one hash, so a count asks once whether a pair is new. The key beside the hash is the owner of the
pair. If a key is removed, its pairs are removed too, whatever their values were.

States of earlier versions have no owners. Their pairs get one as soon as they are met again.

Shape letters: M events with their keys, P pairs, N keys or values.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from features.aggregate.key_map import KeyMap, Keys
from features.hashing import splitmix64

_NO_OWNER: Final = np.uint64(0)


class CountedPairs:
    """Set of pairs with the owner of each, in the order in which the pairs came."""

    def __init__(self) -> None:
        self._map = KeyMap()
        self._owners = np.zeros(0, dtype=np.uint64)

    def __len__(self) -> int:
        return len(self._map)

    @property
    def hashes(self) -> Keys:
        """(P,) hash of each pair."""
        return self._map.keys()

    @property
    def owners(self) -> Keys:
        """(P,) key of each pair, 0 for a pair of an earlier version."""
        return self._owners[: len(self)]

    def meet(self, keys: Keys, values: Keys) -> NDArray[np.int64]:
        """Adds the pairs of keys (M,) and values (M,). Returns the place of the first event of each new pair."""
        before = len(self)
        numbers = self._put(splitmix64(keys ^ values), keys)
        new = np.flatnonzero(numbers >= before)
        _, first = np.unique(numbers[new], return_index=True)
        return new[first]

    def restore(self, hashes: Keys, owners: Keys | None) -> None:
        """Sets the pairs (P,) and their owners (P,), None for pairs of an earlier version."""
        self._map, self._owners = KeyMap(), self._owners[:0]
        self._put(hashes, np.full(len(hashes), _NO_OWNER) if owners is None else owners)

    def remove(self, keys: Keys, values: Keys) -> None:
        """Removes the pairs of keys (N,), and no others.

        Args:
            keys: Distinct keys.
            values: Values that a pair without an owner is searched for. Such a pair of another value stays.
        """
        removed = np.isin(self.owners, keys) & (self.owners != _NO_OWNER)
        unowned = np.flatnonzero(self.owners == _NO_OWNER)
        if len(unowned) and len(values):
            hashes = self.hashes[unowned]
            for key in keys:
                removed[unowned] |= np.isin(hashes, splitmix64(values ^ key))
        if removed.any():
            self.restore(self.hashes[~removed], self.owners[~removed])

    def _put(self, hashes: Keys, owners: Keys) -> NDArray[np.int64]:
        numbers = self._map.put(hashes)
        if len(self) > len(self._owners):
            more = max(len(self), 2 * len(self._owners)) - len(self._owners)
            self._owners = np.concatenate([self._owners, np.zeros(more, dtype=np.uint64)])
        self._owners[numbers] = owners
        return numbers
