"""Computes parts of a bundle from the training frame: item counts, histories, and the time of the newest event."""

import time

import numpy as np
import polars as pl

from features.dataset.descriptor import Dataset
from features.frame import Frame


def with_train_positives(frame: Frame) -> pl.DataFrame:
    """Returns the frame's items with a column `train_positives`, the number of positive events in training."""
    positives = frame.part("train").filter(pl.col("label") == 1)["item"].to_numpy().astype(np.int64)
    counts = np.bincount(positives, minlength=frame.items.height)
    return frame.items.with_columns(train_positives=pl.Series(counts[: frame.items.height], dtype=pl.UInt32))


def kept_history(frame: Frame, length: int) -> pl.DataFrame:
    """Returns the last visits of each user before the test part, oldest first.

    Twice the history's length is kept, which is enough for a read at any time; see `History`.

    Args:
        frame: The training frame.
        length: Length of the history in the schema.
    """
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
    """Returns the time of the newest event outside the test part, Unix microseconds.

    The result is None if events have no clock or the time is in the future, since such a clock cannot be compared with
    the clock of the log.
    """
    times = frame.examples.filter(pl.col("split") != "test")["time"]
    newest = times.max() if dataset.events.time is not None else None
    return newest if isinstance(newest, int) and newest <= time.time_ns() // 1_000 else None
