"""A suffix for items that share a Semantic ID: a number inside each group, as TIGER's fourth code.

Whoever has a suffix keeps it: numbers follow the order of arrival and are not handed out twice, so an append changes no
identifier. The suffix says nothing of the content; a ranker has the item's id for that.

Shape letters: N items, Q levels.
"""

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.error import DatasetError


def suffixes(codes: NDArray[np.uint16]) -> NDArray[np.int64]:
    """How many items before each one share its codes (N, Q): (N,), 0 for the first of a group."""
    found = np.zeros(len(codes), dtype=np.int64)
    if len(codes):
        group = np.unique(codes, axis=0, return_inverse=True)[1].ravel()
        order = np.argsort(group, kind="stable")
        found[order] = np.arange(len(codes)) - np.searchsorted(group[order], group[order])
    return found


def with_suffix(items: pl.DataFrame, before: pl.DataFrame | None = None) -> pl.DataFrame:
    """Adds the column `suffix` to items with `item_id` and `codes`.

    Args:
        items: in the order of arrival.
        before: an earlier result. Its items keep their suffix while they keep their codes, and count on also when they
            are gone from the catalogue: a number is not handed out again.

    Raises:
        DatasetError: an item is there twice, or `before` is of codes of another width.
    """
    for name, table in (("items", items), ("earlier items", before)):
        if table is not None and table["item_id"].is_duplicated().any():
            twice = table["item_id"].filter(table["item_id"].is_duplicated())[0]
            raise DatasetError(f"{name}: item {twice!r} is there twice; give each item once")
    if before is None:
        return items.with_columns(suffix=pl.Series(suffixes(_codes(items)), dtype=pl.UInt32))
    if before.height and items.height and _codes(before).shape[1] != _codes(items).shape[1]:
        raise DatasetError(
            f"earlier items have {_codes(before).shape[1]} codes each, these {_codes(items).shape[1]}; suffixes go on "
            "within one codebook"
        )
    named = pl.col("codes").cast(pl.List(pl.String)).list.join(".").alias("code")
    own = items.with_columns(named)
    old = before.with_columns(named).select("item_id", "code", "suffix")
    next_ = old.group_by("code").agg((pl.col("suffix").max() + 1).alias("next"))
    joined = own.join(old, on=["item_id", "code"], how="left", maintain_order="left")
    joined = joined.join(next_, on="code", how="left", maintain_order="left")
    # Newcomers number on from the last suffix of their group, in the order of arrival.
    place = pl.col("suffix").is_null().cast(pl.UInt32).cum_sum().over("code") - 1
    number = pl.coalesce("suffix", pl.col("next").fill_null(0) + place)
    return joined.with_columns(suffix=number.cast(pl.UInt32)).select(*items.columns, "suffix")


def _codes(items: pl.DataFrame) -> NDArray[np.uint16]:
    found: NDArray[np.uint16] = np.array(items["codes"].to_list(), dtype=np.uint16).reshape(items.height, -1)
    return found
