"""Maps the values of one column to rows of the table: each distinct value is hashed once, then gathered by number.

Shape letters: N entities, n values in all, m distinct values, c chunks.
"""

from collections.abc import Sequence
from typing import Final, Generic, TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.hashing import fingerprint, value_keys
from models.table.admission import Admission
from models.table.schema import Feature, Schema

Scalar = TypeVar("Scalar", bound=np.generic)
# Codes (n,), lengths (N,), rows (m, c), and True for each value (m,) with rows.
Coded = tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]
_NO_CODE: Final = np.int32(-1)
# Number of values or codes that may be unused before any is dropped, whatever the size.
_SPARE: Final = 1_024


class Growable(Generic[Scalar]):
    """Numpy array that grows along its first axis at amortised constant cost."""

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


def gather(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the positions (n,) of all elements of M lists that begin at `starts` (M,) and have `lengths` (M,)."""
    ends = np.cumsum(lengths)
    found = np.arange(int(ends[-1]) if len(ends) else 0)
    found += np.repeat(starts - ends + lengths, lengths)
    return found


def kept(mask: NDArray[np.bool_], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the lengths (M,) of lists that keep only the values where `mask` (n,) is true."""
    before = np.concatenate([[0], np.cumsum(mask)])
    ends = np.cumsum(lengths)
    found: NDArray[np.int64] = before[ends] - before[ends - lengths]
    return found


def coded(column: pl.Series) -> tuple[NDArray[np.int32], NDArray[np.int64], pl.Series]:
    """Numbers the distinct values of strings or lists of strings (N,); null and the empty list hold no value.

    Returns:
        Codes (n,), list after list; the lists' lengths (N,); the m distinct values that the codes number.
    """
    if column.dtype == pl.List:
        lengths = column.list.len().fill_null(0).to_numpy().astype(np.int64)
        flat = column.filter(column.list.len().fill_null(0) > 0).explode()
    else:
        lengths = column.is_not_null().to_numpy().astype(np.int64)
        flat = column.drop_nulls()
    distinct = flat.unique(maintain_order=True)
    codes = flat.cast(pl.Enum(distinct)).to_physical().to_numpy() if len(flat) else np.zeros(0, dtype=np.int32)
    return codes.astype(np.int32), lengths, distinct


class CodeLists:
    """List of codes for each of N entities, changed in place: memory follows the entities, not their updates.

    While no list is longer than one, as in most columns, a list is one number of one array. Otherwise the lists are
    stored one after another. A changed list is written after all others; gaps are closed when they are the larger part.

    Not safe for concurrent use: a caller that changes the lists must exclude readers.
    """

    def __init__(self) -> None:
        self._codes: Growable[np.int32] = Growable(np.zeros(0, dtype=np.int32))
        # Start of each list among the codes; None while code i is the list of entity i.
        self._starts: Growable[np.int64] | None = None
        self._lengths: Growable[np.int64] = Growable(np.zeros(0, dtype=np.int64))
        self._live = 0

    @property
    def size(self) -> int:
        """N, the number of entities."""
        return len(self._codes.array if self._starts is None else self._starts.array)

    @property
    def room(self) -> int:
        """Codes for which memory is held."""
        return len(self._codes.array)

    def put(self, index: NDArray[np.int64], codes: NDArray[np.int32], lengths: NDArray[np.int64]) -> None:
        """Gives distinct entities `index` (M,) new lists.

        An index beyond the last adds entities; those between are empty.
        """
        if not len(index):
            return
        if self._starts is None and (lengths > 1).any():
            self._spread()
        self._grow(int(index.max()) + 1 - self.size)
        if self._starts is None:
            single = np.full(len(index), _NO_CODE, dtype=np.int32)
            single[lengths == 1] = codes
            self._codes.array[index] = single
            return
        self._live += len(codes) - int(self._lengths.array[index].sum())
        self._starts.array[index] = self.room + np.cumsum(lengths) - lengths
        self._lengths.array[index] = lengths
        self._codes.extend(codes)
        if self.room > 2 * self._live + _SPARE:
            self._close_gaps()

    def take(self, index: NDArray[np.int64] | slice) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Returns the lists of entities (M,): their codes (n,), list after list, and their lengths (M,)."""
        if self._starts is None:
            array = self._codes.array
            codes = array[index] if isinstance(index, slice) else array.take(index)
            held = codes != _NO_CODE
            if held.all():
                return codes, np.ones(len(codes), dtype=np.int64)
            return codes[held], held.astype(np.int64)
        lengths = self._lengths.array[index]
        return self._codes.array.take(gather(self._starts.array[index], lengths)), lengths

    def renumber(self) -> NDArray[np.int64]:
        """Numbers the m codes in use 0..m-1 in their order; returns the previous numbers, (m,)."""
        if self._starts is not None:
            self._close_gaps()
        codes = self._codes.array
        held = codes != _NO_CODE
        used = np.zeros(int(codes.max(initial=_NO_CODE)) + 1, dtype=np.bool_)
        used[codes[held]] = True
        codes[held] = (np.cumsum(used) - 1)[codes[held]]
        return np.flatnonzero(used)

    def _grow(self, more: int) -> None:
        if more <= 0:
            return
        if self._starts is None:
            self._codes.extend(np.full(more, _NO_CODE, dtype=np.int32))
            return
        self._starts.extend(np.zeros(more, dtype=np.int64))
        self._lengths.extend(np.zeros(more, dtype=np.int64))

    def _spread(self) -> None:
        codes, lengths = self.take(slice(None))
        self._lay(codes.copy(), lengths)

    def _close_gaps(self) -> None:
        self._lay(*self.take(slice(None)))

    def _lay(self, codes: NDArray[np.int32], lengths: NDArray[np.int64]) -> None:
        self._codes, self._live = Growable(codes), len(codes)
        self._starts, self._lengths = Growable(np.cumsum(lengths) - lengths), Growable(lengths.copy())


class ColumnValues:
    """One column of some entities: the values that each holds, and the rows that a value reads.

    A value is looked up when the column is made. A value that is not admitted yet, or that an exact feature does not
    know, is kept but reads no row. Values that no entity holds any more are dropped when they are the larger part.

    Args:
        column: (N,) strings or lists of strings; null and empty lists hold no value.
        schema, feature: Mapping from values to rows.
        admission: Rule that decides which hashed values read rows.
    """

    def __init__(self, column: pl.Series, schema: Schema, feature: Feature, admission: Admission) -> None:
        codes, lengths, distinct = coded(column)
        self._feature = feature
        self._admission = admission
        self._lists = CodeLists()
        self._lists.put(np.arange(len(column), dtype=np.int64), codes, lengths)
        values = distinct.to_list()
        prints = fingerprint(values)
        self._keys = Growable(value_keys(feature.salt, prints))
        if feature.exact:
            rows, known = _exact_rows(values, schema, feature)
        else:
            rows = schema.hash_spec.lookup(feature.salt, feature.chunks, prints)
            known = admission.admits(self._keys.array)
        self._rows = Growable(rows)
        self._known = Growable(known)
        self._all_known: bool | None = None
        self._most_values = 2 * len(values) + _SPARE

    @property
    def values(self) -> int:
        """Values for which memory is held: values in use, and at most as many again that are not."""
        return len(self._keys.array)

    def rows(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Gathers entities (M,): the rows of their admitted values (n, c) and how many each has (M,)."""
        return self.lookup(index)[:2]

    def lookup(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Gathers entities (M,): as `rows`, and how many values each holds (M,), those without rows among them."""
        codes, held = self._lists.take(index)
        if self._knows_all() or (known := self._known.array.take(codes)).all():
            return self._rows.array.take(codes, axis=0), held, held
        self._readmit(codes[~known])
        known = self._known.array.take(codes)
        return self._rows.array.take(codes[known], axis=0), kept(known, held), held

    def coded(self) -> Coded:
        """Returns all codes (n,), the lists' lengths (N,), and for each code its rows (m, c) and whether it has any."""
        codes, lengths = self._lists.take(slice(None))
        known = self._known.array
        if not known.all():
            self._readmit(np.flatnonzero(~known).astype(np.int32))
        return codes, lengths, self._rows.array, self._known.array

    def keys(self, index: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Gathers entities (M,): the keys of all their values (n,), admitted or not, and how many each has (M,)."""
        codes, lengths = self._lists.take(index)
        return self._keys.array.take(codes), lengths

    def sightings(self, index: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Returns the keys of the distinct hashed values that entities (M,), repeated or not, hold, and counts."""
        if self._feature.exact:
            return self._keys.array[:0], np.zeros(0, dtype=np.int64)
        return self._counted(self._lists.take(index)[0])

    def waiting(self, index: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Returns the part of `sightings` whose values read no row yet. An admission ignores the others."""
        if self._feature.exact or self._knows_all():
            return self._keys.array[:0], np.zeros(0, dtype=np.int64)
        codes, _ = self._lists.take(index)
        return self._counted(codes[~self._known.array.take(codes)])

    def _counted(self, codes: NDArray[np.int32]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        distinct, times = np.unique(codes, return_counts=True) if len(codes) < len(self._keys.array) else _counts(codes)
        return self._keys.array[distinct], times

    def _knows_all(self) -> bool:
        """Returns whether every value reads rows. The answer holds until values or their admission change."""
        if self._all_known is None:
            self._all_known = bool(self._known.array.all())
        return self._all_known

    def put(self, index: NDArray[np.int64], more: "ColumnValues") -> None:
        """Gives distinct entities `index` (M,), or new ones behind the last, the values of the M entities of `more`."""
        codes, lengths = more._lists.take(slice(None))
        self._lists.put(index, (codes + self.values).astype(np.int32), lengths)
        self._keys.extend(more._keys.array)
        self._rows.extend(more._rows.array)
        self._known.extend(more._known.array)
        self._all_known = None
        if self.values > self._most_values:
            self._drop_unused()

    def admit(self, admission: Admission) -> None:
        """Replaces the admission for every value, now and from now on."""
        self._admission = admission
        if not self._feature.exact:
            self._known, self._all_known = Growable(self._admission.admits(self._keys.array)), None

    def _drop_unused(self) -> None:
        used = self._lists.renumber()
        self._keys, self._rows = Growable(self._keys.array[used]), Growable(self._rows.array[used])
        self._known, self._all_known = Growable(self._known.array[used]), None
        self._most_values = 2 * len(used) + _SPARE

    def _readmit(self, pending: NDArray[np.int32]) -> None:
        if self._feature.exact:
            return
        distinct = np.unique(pending)
        self._known.array[distinct] = self._admission.admitted_since(self._keys.array[distinct])
        self._all_known = None


def _exact_rows(
    distinct: Sequence[str], schema: Schema, feature: Feature
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Returns rows (m, c), and whether the vocabulary has the value."""
    numbers = {value: number for number, value in enumerate(feature.vocabulary)}
    found = np.array([numbers.get(value, -1) for value in distinct], dtype=np.int64)
    start, stride = schema.exact_region(feature.salt)
    rows = start + np.maximum(found, 0)[:, None] * stride + np.arange(feature.chunks)
    return rows, found >= 0


def _counts(codes: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    counts = np.bincount(codes)
    distinct = np.flatnonzero(counts)
    return distinct, counts[distinct]
