"""Numbers 64-bit keys in the order of their arrival, in numpy: open addressing with linear probing.

The keys are hashes already, so their low bits choose the slot. A table that is half full is replaced by one of twice
the size.

Shape letter: N keys.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
_LEAST_SLOTS: Final = 1_024
NOT_THERE: Final = -1
"""Number of a key that is not in the map."""


class KeyMap:
    """Map from uint64 keys to 0, 1, 2, … in the order in which they came."""

    def __init__(self) -> None:
        self._keys = np.zeros(_LEAST_SLOTS, dtype=np.uint64)
        # An empty slot has no number, so every key may be stored, 0 too.
        self._numbers = np.full(_LEAST_SLOTS, NOT_THERE, dtype=np.int64)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def keys(self) -> Keys:
        """Returns all keys (len(self),) in the order of their numbers."""
        held = self._numbers != NOT_THERE
        found = np.empty(self._size, dtype=np.uint64)
        found[self._numbers[held]] = self._keys[held]
        return found

    def find(self, keys: Keys) -> NDArray[np.int64]:
        """Returns the numbers (N,) of keys (N,), `NOT_THERE` where the map lacks the key."""
        last = np.uint64(len(self._keys) - 1)
        slot = keys & last
        out: NDArray[np.int64] = self._numbers[slot]
        # A slot with another key sends its key to the next slot.
        further = ((self._keys[slot] != keys) & (out != NOT_THERE)).nonzero()[0]
        place, wanted = further, keys
        while place.size:
            slot, wanted = (slot[further] + np.uint64(1)) & last, wanted[further]
            number = self._numbers[slot]
            out[place] = number
            further = ((self._keys[slot] != wanted) & (number != NOT_THERE)).nonzero()[0]
            place = place[further]
        return out

    def put(self, keys: Keys) -> NDArray[np.int64]:
        """Returns the numbers (N,) of keys (N,), which may repeat; new keys get the next numbers in their order."""
        numbers = self.find(keys)
        new = (numbers == NOT_THERE).nonzero()[0]
        if not new.size:
            return numbers
        fresh, first, inverse = np.unique(keys[new], return_index=True, return_inverse=True)
        order = np.empty(len(fresh), dtype=np.int64)
        order[np.argsort(first, kind="stable")] = np.arange(len(fresh))
        numbers[new] = self._size + order[inverse]
        self._make_room(len(fresh))
        self._insert(fresh, self._size + order)
        self._size += len(fresh)
        return numbers

    def _make_room(self, more: int) -> None:
        slots = len(self._keys)
        while 2 * (self._size + more) > slots:
            slots *= 2
        if slots == len(self._keys):
            return
        held = self._numbers != NOT_THERE
        keys, numbers = self._keys[held], self._numbers[held]
        self._keys = np.zeros(slots, dtype=np.uint64)
        self._numbers = np.full(slots, NOT_THERE, dtype=np.int64)
        self._insert(keys, numbers)

    def _insert(self, keys: Keys, numbers: NDArray[np.int64]) -> None:
        """Writes distinct keys that are not there yet."""
        last = np.uint64(len(self._keys) - 1)
        slot = keys & last
        while len(keys):
            free = self._numbers[slot] == NOT_THERE
            self._keys[slot[free]], self._numbers[slot[free]] = keys[free], numbers[free]
            # If several keys want one slot, the last one written has it.
            lost = (self._numbers[slot] != numbers) | (self._keys[slot] != keys)
            keys, numbers, slot = keys[lost], numbers[lost], (slot[lost] + np.uint64(1)) & last
