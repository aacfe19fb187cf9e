"""Adds a suffix to items that share a Semantic ID: a number inside each group, as TIGER's fourth code.

An item keeps its suffix: numbers follow the order of arrival and are never reused, so an append changes no identifier.
Rows without an item store the numbers of removed items from one export to the next. The suffix carries no content; a
ranker uses the item's id for that.

Shape letters: N items, Q levels.
"""

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.errors import DatasetError


def suffixes(codes: NDArray[np.uint16]) -> NDArray[np.int64]:
    """Counts for each item the items before it that share its codes (N, Q): (N,), 0 for the first of a group."""
    found = np.zeros(len(codes), dtype=np.int64)
    if len(codes):
        group = np.unique(codes, axis=0, return_inverse=True)[1].ravel()
        order = np.argsort(group, kind="stable")
        found[order] = np.arange(len(codes)) - np.searchsorted(group[order], group[order])
    return found


def with_suffix(items: pl.DataFrame, before: pl.DataFrame | None = None) -> pl.DataFrame:
    """Adds the column `suffix` to items with `item_id` and `codes`.

    Args:
        items: Items in the order of arrival.
        before: Earlier result. Its items keep their suffix while they keep their codes. Numbering continues after their
            numbers even if the items were removed from the catalogue: a number is never reused.

    Returns:
        Items in their order. After them, for each group of codes whose highest number no item has any more, a row with
        a null `item_id` and that number.

    Raises:
        DatasetError: An item occurs twice, or `before` has codes of another width.
    """
    for name, table in (("items", items), ("earlier items", before)):
        ids = pl.Series(dtype=pl.String) if table is None else table["item_id"].drop_nulls()
        if ids.is_duplicated().any():
            raise DatasetError(f"{name}: item {ids.filter(ids.is_duplicated())[0]!r} is there twice; give each once")
    if before is None:
        return items.with_columns(suffix=pl.Series(suffixes(_codes(items)), dtype=pl.UInt32))
    if before.height and items.height and _codes(before).shape[1] != _codes(items).shape[1]:
        raise DatasetError(
            f"earlier items have {_codes(before).shape[1]} codes each, these {_codes(items).shape[1]}; "
            "suffixes continue only within one codebook"
        )
    named = pl.col("codes").cast(pl.List(pl.String)).list.join(".").alias("code")
    own, old = items.with_columns(named), before.with_columns(named)
    next_ = old.group_by("code").agg((pl.col("suffix").max() + 1).alias("next"))
    kept = old.filter(pl.col("item_id").is_not_null()).select("item_id", "code", "suffix")
    joined = own.join(kept, on=["item_id", "code"], how="left", maintain_order="left")
    joined = joined.join(next_, on="code", how="left", maintain_order="left")
    # New items are numbered after the last suffix of their group, in the order of arrival.
    place = pl.col("suffix").is_null().cast(pl.UInt32).cum_sum().over("code") - 1
    number = pl.coalesce("suffix", pl.col("next").fill_null(0) + place)
    numbered = joined.with_columns(suffix=number.cast(pl.UInt32))
    highest = numbered.group_by("code").agg(pl.col("suffix").max().alias("highest"))
    last = old.sort("suffix", maintain_order=True).unique("code", keep="last", maintain_order=True)
    retired = last.join(highest, on="code", how="left", maintain_order="left").filter(
        pl.col("highest").is_null() | (pl.col("highest") < pl.col("suffix"))
    )
    rows = retired.select(pl.lit(None, dtype=items.schema["item_id"]).alias("item_id"), "codes", "suffix")
    return pl.concat([numbered.select(*items.columns, "suffix"), rows], how="diagonal_relaxed")


def _codes(items: pl.DataFrame) -> NDArray[np.uint16]:
    found: NDArray[np.uint16] = np.array(items["codes"].to_list(), dtype=np.uint16)
    return found.reshape(items.height, -1 if items.height else 0)
