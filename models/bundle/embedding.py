"""Embeddings by feature value, for rankers that run elsewhere: the same rows by the same hash contract.

Shape letters: B values, c lookups of the feature, D dimension of the table.
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.dataset.descriptor import Dataset, TableSource
from features.errors import EventError
from features.value.canonical import VERSION, canonical_values
from models.table.admission import Admission
from models.table.column_rows import ColumnValues
from models.table.schema import Feature, Schema, Source

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]
Value = str | int | float | bool | None


class EmbeddingClient:
    """Looks values up in one bundle's table.

    Args:
        schema: of the bundle.
        admission: Rule which values read rows; shared with the code that applies new admissions.
        read_rows: Maps rows (M,) int64 of the table to vectors (M, D) float32.
        version: of the canonical form, the bundle's.
        of_csv: sources of features whose table is csv; see `features.value.canonical.cell`.
    """

    def __init__(
        self,
        schema: Schema,
        admission: Admission,
        read_rows: Callable[[Int64], Float32],
        *,
        version: int = VERSION,
        of_csv: Collection[Source] = (),
    ) -> None:
        self._schema = schema
        self._admission = admission
        self._read_rows = read_rows
        self._version = version
        self._of_csv = of_csv
        self._features = {feature.name: feature for feature in schema.features}

    def width(self, feature: str) -> int:
        """Numbers of a value's embedding: c times D.

        Raises:
            EventError: the bundle has no such feature.
        """
        return self._feature(feature).chunks * self._schema.dim

    def lookup(self, feature: str, values: Sequence[Value | Sequence[Value]]) -> Float32:
        """Embeddings of values, of several values pooled as the feature pools them: (B, c · D) float32.

        A value that is missing, not admitted yet, or unknown to an exact feature, is zero, as it is in the ranker. A
        feature that the network weighs by the candidate has no embedding of its own; its values are averaged.

        Raises:
            EventError: the bundle has no such feature, or a value is neither scalar nor a list of scalars.
            StoreError: the store does not answer.
        """
        found = self._feature(feature)
        try:
            column = _even(values, version=self._version, of_csv=found.of in self._of_csv)
        except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError) as error:
            raise EventError(f"values: expected text, numbers, booleans or lists of them: {error}") from error
        looked_up = ColumnValues(column, self._schema, found, self._admission)
        rows, lengths = looked_up.rows(np.arange(len(column)))
        distinct, place = np.unique(rows, return_inverse=True)
        width = self.width(feature)
        vectors = self._read_rows(distinct)[place.reshape(-1)].reshape(len(rows), width)
        pooled = np.zeros((len(column), width), dtype=np.float32)
        np.add.at(pooled, np.repeat(np.arange(len(column)), lengths), vectors)
        if found.pooling != "sum":
            pooled /= np.maximum(lengths, 1).astype(np.float32)[:, None]
        return pooled

    def _feature(self, name: str) -> Feature:
        if name not in self._features:
            raise EventError(f"feature {name!r} is unknown; the bundle has {', '.join(self._features)}")
        return self._features[name]


def _even(values: Sequence[Value | Sequence[Value]], *, version: int = VERSION, of_csv: bool = False) -> pl.Series:
    """Canonical text of values, or lists of it if one of the values is a list."""
    lists = [list(value) if isinstance(value, tuple) else value for value in values]
    return canonical_values("values", lists, version=version, of_csv=of_csv)


def csv_sources(dataset: Dataset) -> set[Source]:
    """Sources of features whose table is csv. An id of a user is in the events too, and follows their table."""
    tables: dict[Source, TableSource] = {"event": dataset.events}
    tables |= {"user": dataset.users or dataset.events, "item": dataset.items or dataset.events}
    found = {source for source, table in tables.items() if table.kind == "csv"}
    return found | ({"history"} if "item" in found else set())
