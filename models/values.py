"""The values of one column as rows of the table: each distinct value is hashed once, then gathered by number.

Shape letters: N entities, n values in all, m distinct values, c chunks.
"""

from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.hashing import fingerprint
from models.admission import Admission, value_keys
from models.schema import Feature, Schema

Scalar = TypeVar("Scalar", bound=np.generic)


class Growable(Generic[Scalar]):
    """A numpy array that is appended to along its first axis, at amortised constant cost."""

    def __init__(self, start: NDArray[Scalar]) -> None:
        self._buffer = start
        self._size = len(start)

    @property
    def array(self) -> NDArray[Scalar]:
        return self._buffer[: self._size]

    def extend(self, more: NDArray[Scalar]) -> None:
        needed = self._size + len(more)
        if needed > len(self._buffer):
            grown = np.zeros((max(needed, 2 * len(self._buffer)), *self._buffer.shape[1:]), dtype=self._buffer.dtype)
            grown[: self._size] = self.array
            self._buffer = grown
        self._buffer[self._size : needed] = more
        self._size = needed


def gather(offsets: NDArray[np.int64], index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions (n,) and lengths (M,) of the lists at `index` (M,)."""
    starts = offsets[index]
    lengths = offsets[index + 1] - starts
    ends = np.cumsum(lengths)
    return np.repeat(starts - ends + lengths, lengths) + np.arange(int(lengths.sum())), lengths


def kept(mask: NDArray[np.bool_], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Lengths (M,) of lists that keep only the values where `mask` (n,) is true."""
    before = np.concatenate([[0], np.cumsum(mask)])
    ends = np.cumsum(lengths)
    found: NDArray[np.int64] = before[ends] - before[ends - lengths]
    return found


class ColumnValues:
    """One column of some entities: entity i holds the values `codes[offsets[i]:offsets[i + 1]]`.

    There are no offsets while every entity holds exactly one value: most columns are so, and then one gather is enough.

    A value is looked up when the column is made. One that is not admitted yet, or that an exact feature does not
    know, is there but reads no row.

    Args:
        column: (N,) strings or lists of strings; null and empty lists hold no value.
        schema, feature: how values become rows.
        admission: which hashed values read rows.
    """

    def __init__(self, column: pl.Series, schema: Schema, feature: Feature, admission: Admission) -> None:
        codes, offsets, distinct = _coded(column)
        self._feature = feature
        self._admission = admission
        self._codes = Growable(codes)
        self._offsets = None if offsets is None else Growable(offsets)
        prints = fingerprint(distinct)
        self._keys = Growable(value_keys(feature.salt, prints))
        if feature.exact:
            rows, known = _exact_rows(distinct, schema, feature)
        else:
            rows = schema.hash_spec.lookup(feature.salt, feature.chunks, prints)
            known = admission.admits(self._keys.array)
        self._rows = Growable(rows)
        self._known = Growable(known)

    def rows(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Gathers entities (M,): the rows of their admitted values (n, c) and how many each has (M,)."""
        codes, lengths = self._take(index)
        known = self._known.array[codes]
        if not known.all():
            self._readmit(codes[~known])
            known = self._known.array[codes]
            lengths = kept(known, lengths)
            codes = codes[known]
        return self._rows.array[codes], lengths

    def sightings(self, index: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Keys of the distinct hashed values that entities (M,), repeated or not, hold, and how often; any order."""
        if self._feature.exact:
            return self._keys.array[:0], np.zeros(0, dtype=np.int64)
        codes, _ = self._take(index)
        distinct, times = np.unique(codes, return_counts=True) if len(codes) < len(self._keys.array) else _counts(codes)
        return self._keys.array[distinct], times

    def extend(self, more: "ColumnValues") -> None:
        """Appends the entities of `more`."""
        distinct, singles = len(self._keys.array), len(self._codes.array)
        if self._offsets is None and more._offsets is not None:
            self._offsets = Growable(np.arange(singles + 1, dtype=np.int64))
        if self._offsets is not None:
            added = np.arange(len(more._codes.array) + 1) if more._offsets is None else more._offsets.array
            self._offsets.extend(added[1:] + self._offsets.array[-1])
        self._codes.extend((more._codes.array + distinct).astype(np.int32))
        self._keys.extend(more._keys.array)
        self._rows.extend(more._rows.array)
        self._known.extend(more._known.array)

    def admit(self, admission: Admission) -> None:
        """Asks another admission about every value, now and from now on."""
        self._admission = admission
        if not self._feature.exact:
            self._known = Growable(self._admission.admits(self._keys.array))

    def _take(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        if self._offsets is None:
            return self._codes.array[index], np.ones(len(index), dtype=np.int64)
        positions, lengths = gather(self._offsets.array, index)
        return self._codes.array[positions], lengths

    def _readmit(self, pending: NDArray[np.int32]) -> None:
        if self._feature.exact or not len(self._admission.added):
            return
        distinct = np.unique(pending)
        self._known.array[distinct] = np.isin(self._keys.array[distinct], self._admission.added)


def _coded(column: pl.Series) -> tuple[NDArray[np.int32], NDArray[np.int64] | None, list[str]]:
    """Codes (n,), offsets (N + 1,) or None where each entity has one value, and the m distinct values of the codes."""
    if column.dtype == pl.List:
        lengths = column.list.len().fill_null(0).to_numpy().astype(np.int64)
        flat = column.filter(column.list.len().fill_null(0) > 0).explode()
    else:
        lengths = column.is_not_null().to_numpy().astype(np.int64)
        flat = column.drop_nulls()
    distinct = flat.unique(maintain_order=True)
    codes = flat.cast(pl.Enum(distinct)).to_physical().to_numpy() if len(flat) else np.zeros(0, dtype=np.int32)
    offsets = None if (lengths == 1).all() else np.concatenate([[0], np.cumsum(lengths)])
    return codes.astype(np.int32), offsets, distinct.to_list()


def _exact_rows(
    distinct: Sequence[str], schema: Schema, feature: Feature
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Rows (m, c) and whether the vocabulary has the value."""
    numbers = {value: number for number, value in enumerate(feature.vocabulary)}
    found = np.array([numbers.get(value, -1) for value in distinct], dtype=np.int64)
    start, stride = schema.exact_region(feature.salt)
    rows = start + np.maximum(found, 0)[:, None] * stride + np.arange(feature.chunks)
    return rows, found >= 0


def _counts(codes: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    counts = np.bincount(codes)
    distinct = np.flatnonzero(counts)
    return distinct, counts[distinct]
