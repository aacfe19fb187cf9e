"""Parts of a bundle that follow from the training frame: item counts, histories, and the time of the newest event."""

import time

import numpy as np
import polars as pl

from features.dataset.descriptor import Dataset
from features.frame import Frame


def with_train_positives(frame: Frame) -> pl.DataFrame:
    """The frame's items with how many positive events each has in training."""
    positives = frame.part("train").filter(pl.col("label") == 1)["item"].to_numpy().astype(np.int64)
    counts = np.bincount(positives, minlength=frame.items.height)
    return frame.items.with_columns(train_positives=pl.Series(counts[: frame.items.height], dtype=pl.UInt32))


def kept_history(frame: Frame, length: int) -> pl.DataFrame:
    """Visits before the test part; twice the length is more than any time can ask for (see `History`)."""
    empty = pl.DataFrame(schema={"user_id": pl.String, "item_id": pl.String, "time": pl.Int64})
    if not frame.users.height or not frame.items.height:
        return empty
    visits = (
        frame.examples.filter((pl.col("label") == 1) & (pl.col("split") != "test"))
        .sort("user", "time", maintain_order=True)
        .group_by("user", maintain_order=True)
        .tail(2 * length)
    )
    return pl.DataFrame(
        {
            "user_id": frame.users["user_id"][visits["user"]],
            "item_id": frame.items["item_id"][visits["item"]],
            "time": visits["time"],
        }
    )


def trained_until(frame: Frame, dataset: Dataset) -> int | None:
    """Returns the time of the newest event that a bundle is made of, in microseconds since 1970.

    None where events have no clock, and where that time has not come yet: such a clock says nothing of the log's.
    """
    times = frame.examples.filter(pl.col("split") != "test")["time"]
    newest = times.max() if dataset.events.time is not None else None
    return newest if isinstance(newest, int) and newest <= time.time_ns() // 1_000 else None
