"""Admission: a value reads rows only after enough sightings. One rule holds offline, in the stream and in serving.

Sightings are counted in count-min sketches (Cormode & Muthukrishnan, J. Algorithms 2005) with conservative update
(Estan & Varghese, TOCS 2003). A count is never too low, and sometimes slightly too high if values share cells. A value
is admitted when the published sketch and the stream's recent sightings together reach the threshold. It stays admitted.
Until then it reads no row, so its vector is zero and rows that collide with it learn nothing from it.

The published sketch never changes. The stream's sightings are counted in two generations, so that no sketch fills up:
when one generation holds the sightings of as many values as it has room for, the older generation is dropped. A value
is therefore admitted when enough sightings fall among the last `RecentSightings.capacity` new values. Only values that
are not admitted yet are counted. The sightings alone decide when a generation is dropped, so all processes with the
same sightings agree bit for bit.

Shape letters: N values, W cells of a sketch's row.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from features.hashing import splitmix64
from models.table.key_set import KeySet

_DEPTH: Final = 4
_CELLS_PER_VALUE: Final = 4
_MIN_WIDTH: Final = 1_024
_MIN_RECENT_WIDTH: Final = 1 << 19
_RECENT_CELLS_PER_VALUE: Final = 8
MOST_SIGHTINGS: Final = 255
"""Largest count: counters saturate here, so no threshold may be higher."""
FALSE_SIGHTINGS: Final = 0.001
"""Bound on the share of never-seen values that `RecentSightings` counts by mistake, however many it has counted.

A full generation has W / 8 values in rows of W cells, so a new value finds all four of its cells taken with probability
(1 - exp(-1/8)) ** 4 = .0002; there are two generations.
"""


class Sketch:
    """Count-min sketch of saturating bytes.

    Args:
        cells: (depth, W) uint8, W a power of two.
    """

    def __init__(self, cells: NDArray[np.uint8]) -> None:
        width = cells.shape[1] if cells.ndim == 2 else 0
        if cells.dtype != np.uint8 or width < 1 or width & (width - 1):
            raise ValueError(f"sketch: expected (depth, power of two) uint8, got {cells.shape} {cells.dtype}")
        self.cells = cells
        self._shift = np.uint64(64 - int(width).bit_length() + 1)
        self._one_cell = width == 1

    @staticmethod
    def sized(values: int) -> "Sketch":
        """Returns an empty sketch with four cells a row for each of this many values, so few counts are too high."""
        return Sketch.wide(1 << (max(_MIN_WIDTH, _CELLS_PER_VALUE * values) - 1).bit_length())

    @staticmethod
    def wide(width: int) -> "Sketch":
        """Returns an empty sketch with this many cells a row, a power of two."""
        return Sketch(np.zeros((_DEPTH, width), dtype=np.uint8))

    @property
    def width(self) -> int:
        """W, the cells of a row."""
        return int(self.cells.shape[1])

    def add(self, keys: NDArray[np.uint64], sightings: NDArray[np.int64]) -> None:
        """Adds the sightings (N,) of keys (N,), which may repeat.

        Only cells of a key that are below its new count are raised. So a value that shares some of its cells adds
        nothing to the others' counts.
        """
        distinct, times = _summed(keys, sightings)
        count = np.minimum(self.count(distinct) + times, MOST_SIGHTINGS).astype(np.uint8)
        for row, places in zip(self.cells, self._places(distinct), strict=True):
            np.maximum.at(row, places, count)

    def count(self, keys: NDArray[np.uint64]) -> NDArray[np.uint8]:
        """Returns sightings (N,) uint8, saturated; never below the true number."""
        found = np.full(len(keys), MOST_SIGHTINGS, dtype=np.uint8)
        for row, places in zip(self.cells, self._places(keys), strict=True):
            np.minimum(found, row[places], out=found)
        return found

    def _places(self, keys: NDArray[np.uint64]) -> list[NDArray[np.int64]]:
        with np.errstate(over="ignore"):
            mixed = [splitmix64(keys + np.uint64(0x9E3779B97F4A7C15) * np.uint64(row + 1)) for row in range(_DEPTH)]
        mixed = mixed[: len(self.cells)]
        return [np.zeros(len(keys), np.int64) if self._one_cell else (m >> self._shift).astype(np.int64) for m in mixed]


class RecentSightings:
    """Recent sightings of values, in two generations of fixed size.

    Args:
        width: W of a generation, a power of two.
    """

    def __init__(self, width: int) -> None:
        self.capacity = width // _RECENT_CELLS_PER_VALUE
        self._width = width
        # The first sighting allocates the memory; a server never has one.
        self._older = self._newer = Sketch.wide(1)
        self._held = self.capacity

    def count(self, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Returns sightings (N,) int64 of keys among the last `capacity` additions of a value, or up to twice that."""
        return self._older.count(keys).astype(np.int64) + self._newer.count(keys)

    def add(self, keys: NDArray[np.uint64], sightings: NDArray[np.int64]) -> None:
        """Adds the sightings (N,) of distinct keys (N,), in their order."""
        start = 0
        while start < len(keys):
            if self._held >= self.capacity:
                self._older, self._newer, self._held = self._newer, Sketch.wide(self._width), 0
            stop = min(len(keys), start + self.capacity - self._held)
            self._newer.add(keys[start:stop], sightings[start:stop])
            self._held += stop - start
            start = stop

    def state(self) -> dict[str, NDArray[Any]]:
        """Returns copies of both generations, and the number of additions the newer one holds."""
        return {
            "older": self._older.cells.copy(),
            "newer": self._newer.cells.copy(),
            "held": np.array([self._held], dtype=np.int64),
        }

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Restores the state that `state` returned."""
        self._older, self._newer = Sketch(state["older"].copy()), Sketch(state["newer"].copy())
        self._held = int(state["held"][0])


class Admission:
    """Rule that decides which values may read rows.

    Args:
        published: Sketch after training; it never changes here.
        threshold: Sightings k that admit a value; 0 admits every value.
    """

    def __init__(self, published: Sketch, threshold: int) -> None:
        if not 0 <= threshold <= MOST_SIGHTINGS:
            raise ValueError(f"admission: expected a threshold from 0 to {MOST_SIGHTINGS}, got {threshold}")
        self.threshold = threshold
        self.published = published
        self._recent = RecentSightings(max(_MIN_RECENT_WIDTH, published.width))
        self._added = KeySet()

    @staticmethod
    def off() -> "Admission":
        """Returns an admission that admits every value."""
        return Admission(Sketch.sized(0), 0)

    @property
    def added(self) -> NDArray[np.uint64]:
        """Keys admitted since the sketch was published, sorted."""
        return self._added.sorted()

    def state(self) -> dict[str, NDArray[Any]]:
        """Returns copies of everything that changed since the sketch was published, by name."""
        return {"admitted": self.added} | {f"recent_{name}": found for name, found in self._recent.state().items()}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Restores the state that `state` returned.

        A state from before generations existed has the published sketch and the stream's sightings in one array,
        `sketch`; the stream's part becomes the older generation.
        """
        self._added = KeySet(state["admitted"])
        if "sketch" in state:
            older = state["sketch"] - np.minimum(self.published.cells, state["sketch"])
            empty = np.zeros((_DEPTH, 1), dtype=np.uint8)
            held = np.array([self._recent.capacity], dtype=np.int64)
            # The next sighting turns the generation that is called newer here into the older one.
            self._recent.restore({"older": empty, "newer": older, "held": held})
        else:
            self._recent.restore({name: state[f"recent_{name}"] for name in ("older", "newer", "held")})

    def admits(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Returns whether each of the values (N,) is admitted."""
        if not self.threshold:
            return np.ones(len(keys), dtype=np.bool_)
        return (self.published.count(keys) >= self.threshold) | self._added.holds(keys)

    def admitted_since(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Returns whether the stream has admitted each of the values (N,) since the sketch was published."""
        return self._added.holds(keys)

    def sight(
        self, keys: NDArray[np.uint64], sightings: NDArray[np.int64], *, admitted: NDArray[np.uint64] | None = None
    ) -> NDArray[np.uint64]:
        """Adds sightings (N,) of keys (N,) and returns the keys they admit, sorted; the stream calls this.

        Args:
            admitted: Keys that these sightings admitted according to the log, during a replay of the past; by default
                the rule decides.
        """
        if not self.threshold or not len(keys):
            return keys[:0]
        distinct, times = _summed(keys, sightings)
        pending = ~self.admits(distinct)
        distinct, times = distinct[pending], times[pending]
        if admitted is None:
            seen = self.published.count(distinct) + self._recent.count(distinct) + times
            admitted = distinct[seen >= self.threshold]
        waiting = ~np.isin(distinct, admitted)
        self._recent.add(distinct[waiting], times[waiting])
        self.admit(admitted)
        return admitted

    def admit(self, keys: NDArray[np.uint64]) -> None:
        """Admits keys that the `sight` of another process returned; the server calls this."""
        if len(keys):
            self._added.add(keys)


def _summed(keys: NDArray[np.uint64], sightings: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Returns the distinct keys, sorted, and the sightings of each."""
    distinct, place = np.unique(keys, return_inverse=True)
    return distinct, np.bincount(place, weights=sightings, minlength=len(distinct)).astype(np.int64)
