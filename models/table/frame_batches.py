"""Batches of a plain DataFrame, for a unified table inside a PyTorch model of your own: no descriptor, no bundle.

Shape letters: N rows of the frame, B batch, K lookups, D dim.
"""

from collections.abc import Mapping

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.errors import DatasetError
from features.history import Jagged
from features.value.canonical import canonical
from models.table.admission import Admission
from models.table.batch import Assembler, Batch, Entities, Examples
from models.table.schema import Feature, Schema, Source

_NOTHING = pl.DataFrame({"nothing": [0]})
_UNUSED: tuple[Source, ...] = ("user", "item")


def frame_schema(columns: Mapping[str, int], *, rows: int, dim: int = 16) -> Schema:
    """Makes the schema of a table that reads columns of a DataFrame.

    Args:
        columns: Lookups of each column, by name. More lookups make a column wider and its collisions rarer.
        rows: R, rows of the table that all columns share.
        dim: D, width of a row; a multiple of 4.

    Returns:
        A schema whose table gives (B, K · D); K is the sum of the lookups.

    Raises:
        BundleError: `rows` or `dim` cannot be used.

    Example:
        >>> frame_schema({"user": 2, "item": 2, "tags": 1}, rows=4_096).keys
        ('user#0', 'user#1', 'item#0', 'item#1', 'tags#0')
    """
    features = tuple(Feature(name, "event", name, name, chunks) for name, chunks in columns.items())
    return Schema(features, (), rows=rows, dim=dim, history_length=0)


class FrameBatches:
    """The columns of a DataFrame as rows of a table: each distinct value is hashed once.

    Values become text in canonical form, as everywhere in Tessera: 7, 7.0 and "7" read the same rows. A list holds
    several values, whose rows are averaged; null and an empty list hold none and give zeros.

    Args:
        schema: See `frame_schema`.
        frame: N rows with the schema's columns: text, numbers, or lists of them.

    Raises:
        DatasetError: A column is missing.

    Example:
        >>> import polars as pl
        >>> schema = frame_schema({"user": 1, "item": 2}, rows=64, dim=4)
        >>> batches = FrameBatches(schema, pl.DataFrame({"user": ["a", "b"], "item": [1, 2]}))
        >>> len(batches), batches.batch().size
        (2, 2)
    """

    def __init__(self, schema: Schema, frame: pl.DataFrame) -> None:
        names = list(schema.columns("event"))
        missing = [name for name in names if name not in frame.columns]
        if missing:
            raise DatasetError(f"frame: no column {missing[0]!r}; the columns are: {', '.join(frame.columns)}")
        texts = pl.DataFrame([canonical(frame[name]).alias(name) for name in names])
        everything = Admission.off()
        users, items = (Entities(schema, of, _NOTHING, everything) for of in _UNUSED)
        self._assembler = Assembler(schema, users, items, Entities(schema, "event", texts, everything))
        self._rows = frame.height

    def __len__(self) -> int:
        return self._rows

    def batch(self, index: NDArray[np.int64] | None = None) -> Batch:
        """Returns rows of the frame as a batch for the table.

        Args:
            index: (B,) int64 row numbers, repeated or not; None for all rows.

        Returns:
            A batch that `UnifiedTable` maps to (B, K · D) float32.
        """
        chosen = np.arange(self._rows, dtype=np.int64) if index is None else np.asarray(index, dtype=np.int64)
        zeros = np.zeros(len(chosen), dtype=np.int64)
        history = Jagged(zeros[:0], np.zeros(len(chosen) + 1, dtype=np.int64))
        return self._assembler.batch(Examples(zeros, zeros, history, np.zeros(0, dtype=np.float32), chosen))
