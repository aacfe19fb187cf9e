"""Columns of vectors: reads npy files beside a catalogue, and makes each vector a field of the item's content.

Shape letters: R rows of a table, D width.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.dataset.column import texts
from features.dataset.descriptor import Items
from features.dataset.files import FileSlice, SourceTable
from features.errors import DatasetError
from features.storage.copy import local_file
from features.storage.location import Location, locate
from features.value.vector import GivenSpace, VectorFault, text_width, vector_texts


def vector_field(table: SourceTable, items: Items, name: str) -> pl.Series:
    """Returns the vectors of a name as text, (R,) String, "" where an item has none.

    Raises:
        DatasetError: A column is missing, or a vector cannot be used; names the file and the row, or the message.
    """
    given = items.vectors[name]
    spaces = None if given.space_column is None else texts(table, given.space_column)
    if spaces is not None and spaces.dtype != pl.String:
        raise table.error(given.space_column or "", f"vectors.{name}: holds {spaces.dtype}, names of spaces expected")
    try:
        return pl.Series(name, vector_texts(table.column(given.column), given, spaces), dtype=pl.String)
    except VectorFault as fault:
        place = fault.column or given.column
        raise table.error(place, f"vectors.{name}: {fault}", row=fault.row) from fault


def vector_counts(table: SourceTable, items: Items) -> dict[str, tuple[int, int]]:
    """Returns the width of the vectors, 0 if there is none, and the number of items without a vector, by name.

    Raises:
        DatasetError: A vector cannot be used; see `vector_field`.
    """
    found = {}
    for name in items.vectors:
        own = vector_field(table, items, name)
        filled = own.filter(own != "")
        found[name] = (text_width(filled[0]) if len(filled) else 0, len(own) - len(filled))
    return found


def with_vector_files(table: SourceTable, items: Items, directory: Path, only: FileSlice | None) -> SourceTable:
    """Returns a table with the columns of the vectors that npy files hold.

    Args:
        table: Catalogue, or a slice of its file.
        items: Descriptor of the items.
        directory: Directory to which the paths are relative.
        only: The slice; None for the whole catalogue.

    Raises:
        DatasetError: A file is missing or no array (R, D) of numbers, or its rows are not the rows of the catalogue.
    """
    columns = []
    for name, given in items.vectors.items():
        if given.file is None:
            continue
        if given.column in table.names:
            raise table.error(
                given.column, f"vectors.{name}: the column has the name of the vectors in {given.file}; remove one"
            )
        vectors = _rows(name, given, directory)
        start, end = table.first_row, table.first_row + table.frame.height
        total = _total(only) if only is not None else end
        if len(vectors) != total or len(table.files) > 1:
            held = f"{total:,} rows" if len(table.files) == 1 else f"{len(table.files)} files"
            raise DatasetError(
                f"{locate(given.file, directory)}: [items.vectors] {name}: holds {len(vectors):,} vectors, but the "
                f"catalogue has {held}; write one vector for each row of one file"
            )
        wide = np.float64 if vectors.dtype == np.float64 else np.float32
        values = np.ascontiguousarray(vectors[start:end], dtype=wide)
        columns.append(pl.Series(given.column, values))
    if not columns:
        return table
    names = (*table.names, *(column.name for column in columns))
    return replace(table, frame=table.frame.with_columns(columns), names=names)


def vector_files(items: Items, directory: Path) -> tuple[Location, ...]:
    """Returns the npy files of the vectors, in the order of their names.

    Raises:
        DatasetError: A file is missing.
    """
    found = {name: locate(given.file, directory) for name, given in items.vectors.items() if given.file is not None}
    for name, place in found.items():
        if not place.is_file():
            raise DatasetError(
                f"{place}: [items.vectors] {name}: no such file (relative to the descriptor); fix `file`"
            )
    return tuple(found.values())


def _rows(name: str, given: GivenSpace, directory: Path) -> NDArray[np.floating]:
    place = locate(given.file or "", directory)
    where = f"{place}: [items.vectors] {name}"
    try:
        found = np.load(local_file(place), mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise DatasetError(f"{where}: cannot be read as npy ({error}); write it with numpy.save") from error
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype.kind not in "fiu":
        shape = getattr(found, "shape", "several arrays")
        raise DatasetError(f"{where}: holds {getattr(found, 'dtype', '')} {shape}, numbers of shape (R, D) expected")
    return found


def _total(only: FileSlice) -> int:
    """Returns the rows of the file of a slice; only parquet is cut into slices."""
    return int(pl.scan_parquet(local_file(only.file)).select(pl.len()).collect().item())
