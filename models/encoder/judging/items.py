"""The items on which spaces are judged: their texts, their likes by part, and the values of their columns.

Shape letter: N items.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.frame import Frame
from models.encoder.likes import Likes
from models.encoder.meaning.aspects import parts

_LATER = ("validation", "test")
# A column with more values than half of the items names items, and is no respect in which items are alike.
_MOST_VALUES = 0.5


@dataclass(frozen=True)
class JudgedItems:
    """Items with everything that the tasks ask for.

    Attributes:
        texts: N texts, "" for an item without text.
        train: Likes of the training part.
        later: Likes of the later parts, which no fit has read.
        values: N sets of values for each column in which items can be alike.
    """

    texts: Sequence[str]
    train: Likes
    later: Likes
    values: Mapping[str, Sequence[frozenset[str]]] = field(default_factory=dict)

    @cached_property
    def known(self) -> NDArray[np.bool_]:
        """(N,) True if the item has text, so that it may ask and be found."""
        return np.array([bool(text.strip()) for text in self.texts], dtype=np.bool_)

    @cached_property
    def new(self) -> NDArray[np.bool_]:
        """(N,) True if the item has text and no like in the training part."""
        return np.asarray(self.known & (self.train.fans == 0))


def judged_items(frame: Frame, ids: Sequence[str], texts: Sequence[str]) -> JudgedItems:
    """Returns the items of a frame, in the order of some ids.

    Args:
        frame: Training frame of a run.
        ids: N ids.
        texts: N texts of the items.
    """
    order = pl.DataFrame({"item_id": ids})
    rows = frame.items.select("item_id").join(
        order.with_row_index("row"), on="item_id", how="left", maintain_order="left"
    )["row"]
    table = order.join(frame.items, on="item_id", how="left", maintain_order="left")
    return JudgedItems(
        texts,
        _likes(frame, ("train",), rows, len(ids)),
        _likes(frame, _LATER, rows, len(ids)),
        {
            name: found
            for name, kind in table.schema.items()
            if name not in ("item_id", "text", "semantic_id") and kind in (pl.String, pl.List(pl.String))
            if (found := _values(table[name]))
        },
    )


def _likes(frame: Frame, of: Sequence[str], rows: pl.Series, size: int) -> Likes:
    """Returns the likes of some parts of the frame, by the rows (frame's items,) of the N items."""
    examples = pl.concat([frame.blocks(part).whole("user", "item", "label") for part in of])
    liked = examples.filter(pl.col("label") == 1)
    events = liked.with_columns(row=rows[liked["item"]]).drop_nulls("row")
    return Likes(events["user"].to_numpy(), events["row"].to_numpy().astype(np.int64), size)


def _values(column: pl.Series) -> list[frozenset[str]]:
    """Returns the set of values of each item, or nothing if the column's values are shared by too few items."""
    found = [frozenset(parts(value)) for value in column.to_list()]
    distinct = frozenset().union(*found)
    return found if 1 < len(distinct) <= _MOST_VALUES * len(found) else []
