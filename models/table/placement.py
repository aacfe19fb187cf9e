"""Columns of the placement as numbers: the cell of each column that an example reads in the position path.

Cell 0 is a value that is unknown. A position reads the cell after its number, and positions beyond the last read the
last cell. A word reads the cell after its place in the vocabulary, and an unknown word reads cell 0.

Shape letters: N examples, C columns of the placement.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

MOST_POSITIONS = 64
"""Number of positions with a cell of their own."""


@dataclass(frozen=True)
class PlacementColumn:
    """Column of the placement.

    Attributes:
        column: Name of the column.
        positions: Number of positions with a cell. 0 for a column of words.
        vocabulary: Words with a cell.
    """

    column: str
    positions: int = 0
    vocabulary: tuple[str, ...] = ()

    @property
    def cells(self) -> int:
        """Number of cells, with the cell of an unknown value."""
        return 1 + (self.positions or len(self.vocabulary))

    @property
    def values(self) -> tuple[str, ...]:
        """Value of each cell as text; "" for an unknown value."""
        return ("", *(map(str, range(self.positions)) if self.positions else self.vocabulary))


def placement_cells(columns: Sequence[PlacementColumn], frame: pl.DataFrame) -> NDArray[np.int64] | None:
    """Returns the cells (N, C) of N rows. None without a placement, or if the frame lacks the columns, as at a server.

    Args:
        columns: C columns.
        frame: N rows. A position is a number from 0.
    """
    if not columns or any(one.column not in frame.columns for one in columns):
        return None
    out = np.zeros((frame.height, len(columns)), dtype=np.int64)
    for place, one in enumerate(columns):
        values = frame[one.column]
        if one.positions:
            out[:, place] = (values.cast(pl.Int64).clip(0, one.positions - 1) + 1).fill_null(0).to_numpy()
        else:
            words = pl.DataFrame({"word": pl.Series(one.vocabulary, dtype=pl.String), "cell": np.arange(1, one.cells)})
            read = values.cast(pl.String).to_frame("word").join(words, on="word", how="left", maintain_order="left")
            out[:, place] = read["cell"].fill_null(0).to_numpy()
    return out


def place_numbers(columns: Sequence[PlacementColumn], frame: pl.DataFrame) -> NDArray[np.int64] | None:
    """Returns a number (N,) of the place of each row, equal for rows with equal cells; None as for `placement_cells`.

    Args:
        columns: C columns.
        frame: N rows.
    """
    cells = placement_cells(columns, frame)
    if cells is None:
        return None
    found = np.ravel_multi_index(tuple(cells.T), [one.cells for one in columns])
    return np.unique(found, return_inverse=True)[1].astype(np.int64)
