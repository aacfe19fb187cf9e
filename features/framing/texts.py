"""Reads the texts of a large catalogue slice by slice, so that memory holds the ids and one slice."""

from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.content.content import FIELDS
from features.dataset.descriptor import Dataset, Items
from features.dataset.files import FileSlice
from features.dataset.tables import load_items, shape_items
from features.errors import DatasetError
from features.framing.parse import table_slices
from features.hashing import fingerprint
from features.jobs import sample
from features.value.vector import text_width

_SLICE_ROWS = 1 << 18


def large_item_slices(dataset: Dataset) -> list[FileSlice]:
    """Returns the slices of a catalogue of more items than a fit reads; none if it is smaller, or no parquet."""
    slices = [one for one in table_slices(dataset, "item", _SLICE_ROWS) if one is not None]
    return slices if sum(one.rows or 0 for one in slices) > sample.MOST_ITEMS else []


def item_texts(dataset: Dataset, slices: Sequence[FileSlice], *, fields: Sequence[str] = ()) -> Iterator[pl.DataFrame]:
    """Yields a frame with `item_id` and `text` for each slice, and with `FIELDS` if fields are named.

    Raises:
        DatasetError: A value cannot be used, or an id occurs twice; names it.
    """
    items = dataset.items
    assert items is not None
    known: list[pl.Series] = []
    keys: list[NDArray[np.uint64]] = []
    columns = ["item_id", "text", *([FIELDS] if fields else [])]
    for only in slices:
        table = load_items(dataset, only)
        assert table is not None
        frame = shape_items(table, items, unique=False, fields=fields).select(columns)
        # The first vector of the catalogue decides the width in every slice.
        items = items.with_widths(_widths(frame, items))
        known.append(frame["item_id"])
        keys.append(fingerprint(frame["item_id"].to_list()))
        yield frame
    if len(np.unique(np.concatenate(keys))) == sum(map(len, keys)):
        return
    ids = pl.concat(known)
    if ids.n_unique() < len(ids):
        twice = ids.filter(~ids.is_first_distinct())[0]
        first, second = (ids == twice).arg_true().to_list()[:2]
        raise DatasetError(
            f"{slices[0].file}: [items] column '{items.id}': id '{twice}' is in the rows {first + 1:,} and "
            f"{second + 1:,} of the table; keep one of them"
        )


def _widths(frame: pl.DataFrame, items: Items) -> dict[str, int]:
    """Returns the width of each of the vectors that a frame has."""
    fields = frame[FIELDS].struct if items.vectors and FIELDS in frame.columns else None
    found = {name: fields.field(name) for name in items.vectors if fields is not None and name in fields.fields}
    return {name: text_width(own.filter(own != "")[0]) for name, own in found.items() if (own != "").any()}
