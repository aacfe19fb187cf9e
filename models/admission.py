"""Admission: a value reads rows of its own only after enough sightings, by one rule offline, in the stream and served.

Sightings are counted in a count-min sketch (Cormode & Muthukrishnan, J. Algorithms 2005): never too few, sometimes a
few too many where values share cells. A value is admitted when the published sketch has seen it often enough, or when
the stream has admitted it since; until then it reads no row, so its vector is zero and its colliding rows learn
nothing from it.

Shape letters: N values, W cells of a sketch's row.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from features.hashing import fingerprint, splitmix64

_DEPTH: Final = 4
_CELLS_PER_VALUE: Final = 4
_MIN_WIDTH: Final = 1_024
MOST_SIGHTINGS: Final = 255
"""Counters saturate here, so no threshold lies above."""


def value_keys(salt: str, fingerprints: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """What identifies a feature's values (N,) to the sketch: uint64, equal for equal salt and value."""
    with np.errstate(over="ignore"):
        return splitmix64(fingerprints ^ fingerprint([salt])[0])


class Sketch:
    """A count-min sketch of saturating bytes.

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
        """An empty sketch with four cells a row for each of so many values, so that few are counted too high."""
        width = 1 << (max(_MIN_WIDTH, _CELLS_PER_VALUE * values) - 1).bit_length()
        return Sketch(np.zeros((_DEPTH, width), dtype=np.uint8))

    def copy(self) -> "Sketch":
        return Sketch(self.cells.copy())

    def add(self, keys: NDArray[np.uint64], sightings: NDArray[np.int64]) -> None:
        """Adds the sightings (N,) of keys (N,), which may repeat."""
        for row, places in zip(self.cells, self._places(keys), strict=True):
            place, inverse = np.unique(places, return_inverse=True)
            more = np.bincount(inverse, weights=sightings).astype(np.int64)
            row[place] = np.minimum(row[place] + more, MOST_SIGHTINGS).astype(np.uint8)

    def count(self, keys: NDArray[np.uint64]) -> NDArray[np.uint8]:
        """Sightings (N,) uint8, saturated; never below the true number."""
        found = np.full(len(keys), MOST_SIGHTINGS, dtype=np.uint8)
        for row, places in zip(self.cells, self._places(keys), strict=True):
            np.minimum(found, row[places], out=found)
        return found

    def _places(self, keys: NDArray[np.uint64]) -> list[NDArray[np.int64]]:
        with np.errstate(over="ignore"):
            mixed = [splitmix64(keys + np.uint64(0x9E3779B97F4A7C15) * np.uint64(row + 1)) for row in range(_DEPTH)]
        mixed = mixed[: len(self.cells)]
        return [np.zeros(len(keys), np.int64) if self._one_cell else (m >> self._shift).astype(np.int64) for m in mixed]


class Admission:
    """Which values may read rows.

    Args:
        published: the sketch after training; never changed here.
        threshold: sightings k that admit a value; 0 admits every value.
    """

    def __init__(self, published: Sketch, threshold: int) -> None:
        if not 0 <= threshold <= MOST_SIGHTINGS:
            raise ValueError(f"admission: expected a threshold from 0 to {MOST_SIGHTINGS}, got {threshold}")
        self.threshold = threshold
        self.published = published
        self._live = published.copy()
        self._added = np.zeros(0, dtype=np.uint64)

    @staticmethod
    def off() -> "Admission":
        """Admits every value."""
        return Admission(Sketch.sized(0), 0)

    @property
    def added(self) -> NDArray[np.uint64]:
        """Keys admitted since the sketch was published, sorted."""
        return self._added

    @property
    def live(self) -> NDArray[np.uint8]:
        """Cells of the sketch with what the stream has sighted since."""
        return self._live.cells

    def restore(self, live: NDArray[np.uint8], added: NDArray[np.uint64]) -> None:
        """Goes back to where `live` and `added` were taken."""
        self._live = Sketch(live.copy())
        self._added = added.copy()

    def admits(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which of the values (N,) are admitted."""
        if not self.threshold:
            return np.ones(len(keys), dtype=np.bool_)
        return (self.published.count(keys) >= self.threshold) | np.isin(keys, self._added)

    def sight(self, keys: NDArray[np.uint64], sightings: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Adds sightings (N,) of keys (N,) and returns the keys they admit, sorted: the stream's part of the rule."""
        if not self.threshold or not len(keys):
            return keys[:0]
        self._live.add(keys, sightings)
        distinct = np.unique(keys)
        new = distinct[(self._live.count(distinct) >= self.threshold) & ~self.admits(distinct)]
        self.admit(new)
        return new

    def admit(self, keys: NDArray[np.uint64]) -> None:
        """Takes over what another one's `sight` returned: the server's part of the rule."""
        if len(keys):
            self._added = np.union1d(self._added, keys)
