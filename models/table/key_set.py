"""A growing set of 64-bit keys in numpy: the cost of an addition or a query does not depend on the number of keys.

The set uses open addressing with linear probing; the keys are hashes already, so their low bits choose the slot. A
table that gets full is replaced by one of twice the size, and each addition moves a few slots, as in Redis: no single
addition moves all of them.

Shape letters: N queried keys, S slots of a table.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]

_LEAST_SLOTS: Final = 1_024
_MOST_FULL: Final = 0.5
# Slots read in one step: enough that one step nearly always decides, however full the table is.
_WINDOW: Final = np.arange(16, dtype=np.uint64)
# Slots moved for each key added: the old table is empty long before the new one, of twice the size, is full.
_MOVED_PER_KEY, _MOVED_AT_LEAST = 8, 1_024


class KeySet:
    """Set of uint64 keys that are evenly distributed. One thread may add while others query.

    Args:
        keys: (N,) uint64, the first members; may repeat.
    """

    def __init__(self, keys: Keys | None = None) -> None:
        first = np.zeros(0, dtype=np.uint64) if keys is None else np.unique(keys)
        slots = 1 << int(max(_LEAST_SLOTS, len(first) / _MOST_FULL) - 1).bit_length()
        self._table = np.zeros(slots, dtype=np.uint64)
        # Table that is being moved, and the first slot that is not moved yet; its keys stay until all are moved.
        self._old: Keys | None = None
        self._moved = 0
        # An empty slot is 0, so membership of the key 0 is a separate flag.
        self._has_zero = False
        self._size = 0
        self.add(first)

    def __len__(self) -> int:
        return self._size

    @property
    def slots(self) -> int:
        """Keys for which memory is held."""
        return len(self._table) + (0 if self._old is None else len(self._old))

    def holds(self, keys: Keys) -> NDArray[np.bool_]:
        """Returns whether each key (N,) is a member."""
        # The order matters: a reader that sees the new table also sees the old one, or a complete new one.
        table, old = self._table, self._old
        found = _held(table, keys)
        if old is not None:
            found |= _held(old, keys)
        found[keys == 0] = self._has_zero
        return found

    def add(self, keys: Keys) -> None:
        """Adds keys (N,), which may repeat."""
        fresh = np.unique(keys[~self.holds(keys)])
        if len(fresh) and fresh[0] == 0:
            self._has_zero, fresh, self._size = True, fresh[1:], self._size + 1
        self._make_room(len(fresh))
        _insert(self._table, fresh)
        self._size += len(fresh)

    def sorted(self) -> Keys:
        """Returns all keys (len(self),), ascending."""
        found = self._table[self._table != 0]
        if self._old is not None:
            rest = self._old[self._moved :]
            found = np.concatenate([found, rest[rest != 0]])
        found = np.concatenate([np.zeros(int(self._has_zero), dtype=np.uint64), found])
        return np.unique(found)

    def _make_room(self, more: int) -> None:
        while self._size + more > _MOST_FULL * len(self._table):
            self._move(self.slots)
            self._old, self._moved = self._table, 0
            self._table = np.zeros(2 * len(self._table), dtype=np.uint64)
        self._move(_MOVED_AT_LEAST + _MOVED_PER_KEY * more)

    def _move(self, slots: int) -> None:
        if self._old is None:
            return
        part = self._old[self._moved : self._moved + slots]
        _insert(self._table, part[part != 0])
        self._moved += len(part)
        if self._moved == len(self._old):
            self._old, self._moved = None, 0


def _held(table: Keys, keys: Keys) -> NDArray[np.bool_]:
    found = np.zeros(len(keys), dtype=np.bool_)
    place, last = np.arange(len(keys)), np.uint64(len(table) - 1)
    slot = keys & last
    while len(place):
        at = table[(slot[:, None] + _WINDOW) & last]
        here = (at == keys[place, None]).any(axis=1)
        found[place[here]] = True
        # A member is before the first empty slot.
        further = ~here & (at != 0).all(axis=1)
        place, slot = place[further], slot[further] + np.uint64(len(_WINDOW))
    return found


def _insert(table: Keys, keys: Keys) -> None:
    """Writes keys, none of them 0, into a table that has room; a key that is present keeps its slot."""
    last = np.uint64(len(table) - 1)
    slot = keys & last
    while len(keys):
        free = table[slot] == 0
        table[slot[free]] = keys[free]
        # If several keys want one slot, the last one written has it.
        lost = table[slot] != keys
        keys, slot = keys[lost], (slot[lost] + np.uint64(1)) & last
