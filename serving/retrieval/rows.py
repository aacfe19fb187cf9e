"""Vectors of an index by number, as float32 or in a quarter of the bytes.

Shape letters: N items, D dim, M items.
"""

from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from features.content.bits import Int8Rows
from models.table.column_rows import Growable

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
RowKind = Literal["float32", "int8"]
ROW_KINDS: tuple[RowKind, ...] = ("float32", "int8")
_AT_ONCE = 10_000


class StoredVectors(Protocol):
    """Vectors of the numbers 0..N-1. A number without a vector has a zero row."""

    kind: RowKind
    width: int

    def __len__(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        ...

    def extend(self, count: int) -> None:
        """Adds zero rows."""
        ...

    def put(self, numbers: Ints, vectors: Floats) -> None:
        """Stores vectors (M, D). If a number occurs twice, the last vector counts."""
        ...

    def take(self, numbers: Ints) -> Floats:
        """Returns the vectors (M, D) as they are stored."""
        ...

    def products(self, numbers: Ints, query: Floats) -> Floats:
        """Returns the products (M,) of stored vectors with a query (D,)."""
        ...

    def filled(self) -> NDArray[np.bool_]:
        """Returns True for each row (N,) that is not zero."""
        ...

    def copy(self, present: NDArray[np.bool_]) -> "StoredVectors":
        """Returns a copy in which numbers are zero that are not `present` (≤ N,)."""
        ...


class FloatRows:
    """Rows as they are, 4 D bytes."""

    kind: RowKind = "float32"

    def __init__(self, vectors: Floats) -> None:
        self._vectors = Growable(vectors)
        self.width = int(vectors.shape[1])

    def __len__(self) -> int:
        return len(self._vectors.array)

    @property
    def array(self) -> Floats:
        """All rows, (N, D)."""
        return self._vectors.array

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    def extend(self, count: int) -> None:
        self._vectors.extend(np.zeros((count, self.width), dtype=np.float32))

    def put(self, numbers: Ints, vectors: Floats) -> None:
        self._vectors.array[numbers] = vectors

    def take(self, numbers: Ints) -> Floats:
        return self._vectors.array.take(numbers, axis=0)

    def products(self, numbers: Ints, query: Floats) -> Floats:
        return self.take(numbers) @ query

    def filled(self) -> NDArray[np.bool_]:
        return np.asarray(self.array.any(axis=1), dtype=bool)

    def copy(self, present: NDArray[np.bool_]) -> "FloatRows":
        vectors = self._vectors.array
        copied = np.zeros((min(len(vectors), len(present)), self.width), dtype=np.float32)
        for start in range(0, len(copied), _AT_ONCE):
            part = slice(start, min(start + _AT_ONCE, len(copied)))
            copied[part] = np.where(present[part, None], vectors[part], np.float32(0))
        return FloatRows(copied)


class EightBitRows:
    """Rows as int8 values with a scale each, D + 4 bytes. A value's error is at most half its row's scale.

    A product with a query q is off by at most half the scale times the sum of |q|.
    """

    kind: RowKind = "int8"

    def __init__(self, values: NDArray[np.int8], scales: Floats) -> None:
        self._values, self._scales = Growable(values), Growable(scales)
        self.width = int(values.shape[1])

    @classmethod
    def of(cls, vectors: Floats) -> "EightBitRows":
        """Rounds vectors (N, D), some at a time."""
        rows = cls(np.zeros(vectors.shape, dtype=np.int8), np.zeros(len(vectors), dtype=np.float32))
        for start in range(0, len(vectors), _AT_ONCE):
            part = np.arange(start, min(start + _AT_ONCE, len(vectors)))
            rows.put(part, vectors[part])
        return rows

    def __len__(self) -> int:
        return len(self._scales.array)

    @property
    def nbytes(self) -> int:
        return self._values.array.nbytes + self._scales.array.nbytes

    def extend(self, count: int) -> None:
        self._values.extend(np.zeros((count, self.width), dtype=np.int8))
        self._scales.extend(np.zeros(count, dtype=np.float32))

    def put(self, numbers: Ints, vectors: Floats) -> None:
        rounded = Int8Rows.of(vectors)
        self._values.array[numbers], self._scales.array[numbers] = rounded.values, rounded.scales

    def scales(self, numbers: Ints) -> Floats:
        """Returns the scales (M,) of rows."""
        return self._scales.array[numbers]

    def take(self, numbers: Ints) -> Floats:
        values: Floats = self._values.array.take(numbers, axis=0).astype(np.float32)
        values *= self._scales.array[numbers, None]
        return values

    def products(self, numbers: Ints, query: Floats) -> Floats:
        scores = np.empty(len(numbers), dtype=np.float32)
        for start in range(0, len(numbers), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            scores[part] = self._values.array.take(numbers[part], axis=0).astype(np.float32) @ query
        scores *= self._scales.array[numbers]
        return scores

    def filled(self) -> NDArray[np.bool_]:
        return self._scales.array > 0

    def copy(self, present: NDArray[np.bool_]) -> "EightBitRows":
        count = min(len(self), len(present))
        values, scales = self._values.array[:count].copy(), self._scales.array[:count].copy()
        absent = np.flatnonzero(~present[:count])
        values[absent], scales[absent] = 0, 0
        return EightBitRows(values, scales)


def open_rows(kind: RowKind, vectors: Floats) -> StoredVectors:
    """Returns rows of a kind that hold a copy of vectors (N, D)."""
    if kind == "int8":
        return EightBitRows.of(np.asarray(vectors, dtype=np.float32))
    return FloatRows(np.ascontiguousarray(vectors, dtype=np.float32).copy())
