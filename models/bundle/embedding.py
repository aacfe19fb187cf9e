"""Embeddings by feature value, for rankers that run elsewhere.

The hash contract is that of the ranker, so a value reads the same rows. Shape letters: B values, c lookups of the
feature, D dimension of the table.
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.dataset.descriptor import Dataset
from features.dataset.source import TableSource
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
        schema: Schema of the bundle.
        admission: Rule that decides which values read rows. Shared with the code that applies new admissions.
        read_rows: Maps rows (M,) int64 of the table to vectors (M, D) float32.
        version: Version of the canonical form of the bundle's ids and categories.
        of_csv: Sources of features whose table is a csv file; see `features.value.canonical.cell`.
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
        """Returns the width of an embedding, c times D.

        Args:
            feature: Name of a feature of the schema.

        Raises:
            EventError: The bundle has no such feature.
        """
        return self._feature(feature).chunks * self._schema.dim

    def lookup(self, feature: str, values: Sequence[Value | Sequence[Value]]) -> Float32:
        """Returns the embeddings of values, (B, c · D) float32.

        The embedding is zero if a value is missing, not admitted yet, or unknown to an exact feature, as in the ranker.
        If the network weighs a feature's values by the candidate, the values are averaged here.

        Args:
            feature: Name of a feature of the schema.
            values: B values or lists of values. Lists are pooled as the feature pools them.

        Raises:
            EventError: The bundle has no such feature, or a value is neither a scalar nor a list of scalars.
            StoreError: The store does not answer.
        """
        schema_feature = self._feature(feature)
        try:
            column = _canonical_column(values, version=self._version, of_csv=schema_feature.of in self._of_csv)
        except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError) as error:
            raise EventError(f"values: expected text, numbers, booleans or lists of them: {error}") from error
        looked_up = ColumnValues(column, self._schema, schema_feature, self._admission)
        rows, lengths = looked_up.rows(np.arange(len(column)))
        distinct, inverse = np.unique(rows, return_inverse=True)
        width = self.width(feature)
        vectors = self._read_rows(distinct)[inverse.reshape(-1)].reshape(len(rows), width)
        pooled = np.zeros((len(column), width), dtype=np.float32)
        np.add.at(pooled, np.repeat(np.arange(len(column)), lengths), vectors)
        if schema_feature.pooling != "sum":
            pooled /= np.maximum(lengths, 1).astype(np.float32)[:, None]
        return pooled

    def _feature(self, name: str) -> Feature:
        if name not in self._features:
            raise EventError(f"feature {name!r} is unknown; the bundle has {', '.join(self._features)}")
        return self._features[name]


def _canonical_column(
    values: Sequence[Value | Sequence[Value]], *, version: int = VERSION, of_csv: bool = False
) -> pl.Series:
    """Returns the canonical texts of values. If any value is a list, each element is a list of texts."""
    lists = [list(value) if isinstance(value, tuple) else value for value in values]
    return canonical_values("values", lists, version=version, of_csv=of_csv)


def csv_sources(dataset: Dataset) -> set[Source]:
    """Returns the sources of features whose table is a csv file.

    If a dataset has no table of users or items, their ids come from the events, so the events' table decides.
    """
    tables: dict[Source, TableSource] = {"event": dataset.events}
    tables |= {"user": dataset.users or dataset.events, "item": dataset.items or dataset.events}
    sources = {source for source, table in tables.items() if table.kind == "csv"}
    return sources | ({"history"} if "item" in sources else set())
