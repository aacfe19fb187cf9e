"""Columns of users and items that features of several tables read, by number, while the stream changes them.

Shape letters: N entities, M gathered entities.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from models.table.column_rows import Growable

_NO_TIME = np.iinfo(np.int64).min


class CrossingInputs:
    """Kept columns of one table, such as `item.price`.

    Numbers and times are arrays in which NaN and the smallest integer are missing values, so a change of one entity
    copies no column.

    Args:
        frame: (N, …) rows of the entities.
        names: Names of the columns.
    """

    def __init__(self, frame: pl.DataFrame, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._types = {name: frame.schema[name] for name in names}
        self._columns: dict[str, Growable[Any]] = {name: Growable(_array(frame[name])) for name in names}

    def take(self, index: NDArray[np.int64]) -> list[pl.Series]:
        """Returns the columns of entities (M,), each (M,) as tables keep it."""
        return [self._series(name, own.array[index]) for name, own in self._columns.items()]

    def nothing(self, count: int) -> list[pl.Series]:
        """Returns the columns of `count` entities without values."""
        return [pl.Series(name, [None] * count, dtype=dtype) for name, dtype in self._types.items()]

    def append(self, frame: pl.DataFrame) -> None:
        """Adds entities after the last one."""
        for name, own in self._columns.items():
            own.extend(_array(frame[name]))

    def replace(self, index: NDArray[np.int64], frame: pl.DataFrame) -> None:
        """Gives the entities `index` (M,) new values; if an entity occurs twice, its last values count."""
        for name, own in self._columns.items():
            own.array[index] = _array(frame[name])

    def _series(self, name: str, values: NDArray[Any]) -> pl.Series:
        dtype = self._types[name]
        if dtype == pl.Float64:
            return pl.Series(name, values, nan_to_null=True)
        if dtype == pl.Int64:
            known = pl.Series(values != _NO_TIME)
            return pl.Series(name, values).zip_with(known, pl.Series([None], dtype=pl.Int64))
        return pl.Series(name, values.tolist(), dtype=dtype)


def _array(values: pl.Series) -> NDArray[Any]:
    """Returns a writable array of a kept column."""
    if values.dtype == pl.Float64:
        return values.fill_null(float("nan")).to_numpy().copy()
    if values.dtype == pl.Int64:
        return values.fill_null(_NO_TIME).to_numpy().copy()
    return np.array(values.to_list(), dtype=object)
