"""Computes parts of a bundle from the training frame: item counts, histories, and the time of the newest event.

All are read block by block, so that memory follows users and items and not events.
"""

import time

import polars as pl

from features.dataset.descriptor import Dataset
from features.frame import Frame
from features.frame_blocks import shown_items
from features.hashing import fingerprint
from features.shown.consumed import PAGE, PAGES, SCHEMA
from models.bundle.contents import LABELLED_SCHEMA

_BY_TIME = ("user", "time", "event")


def with_train_positives(frame: Frame) -> pl.DataFrame:
    """Returns the frame's items with a column `train_positives`, the number of positive events in training."""
    counts = shown_items(frame.blocks("train"), frame.items.height, positive=True)
    return frame.items.with_columns(train_positives=pl.Series(counts, dtype=pl.UInt32))


def kept_history(frame: Frame, length: int) -> pl.DataFrame:
    """Returns the last visits of each user before the test part, oldest first.

    Twice the history's length is kept, which is enough for a read at any time; see `History`.

    Args:
        frame: The training frame.
        length: Length of the history in the schema.
    """
    return _kept(frame, length, pl.col("label") == 1).drop("label")


def kept_labels(frame: Frame, length: int) -> pl.DataFrame:
    """Returns the last labelled items of each user before the test part, as `kept_history` returns visits."""
    return _kept(frame, length, pl.lit(True))


def kept_consumed(frame: Frame) -> pl.DataFrame:
    """Returns the items that each user had a positive event with before the test part, in the order of the first one.

    Of each user the newest items are kept, as many as a stream keeps.
    """
    if not frame.users.height or not frame.items.height:
        return pl.DataFrame(schema=SCHEMA)
    found: pl.DataFrame | None = None
    for block in frame.all_blocks().frames(*_BY_TIME, "item", "label", "split"):
        chosen = block.filter((pl.col("label") == 1) & (pl.col("split") != "test")).select(*_BY_TIME, "item")
        both = chosen if found is None else pl.concat([found, chosen])
        found = both.sort(_BY_TIME).unique(["user", "item"], keep="first", maintain_order=True)
    assert found is not None
    newest = found.filter(pl.int_range(pl.len()).reverse().over("user") < PAGE * PAGES)
    keys = fingerprint(frame.items["item_id"].to_list())
    return pl.DataFrame(
        {"user_id": frame.users["user_id"][newest["user"]], "key": keys[newest["item"].to_numpy()]}, schema=SCHEMA
    )


def _kept(frame: Frame, length: int, chosen: pl.Expr) -> pl.DataFrame:
    if not frame.users.height or not frame.items.height:
        return pl.DataFrame(schema=LABELLED_SCHEMA)
    events: pl.DataFrame | None = None
    for block in frame.all_blocks().frames(*_BY_TIME, "item", "label", "split"):
        found = block.filter(chosen & (pl.col("split") != "test")).select(*_BY_TIME, "item", "label")
        # An event that is among the last of its user is among the last of its block, too.
        events = _last(found if events is None else pl.concat([events, found]), 2 * length)
    assert events is not None
    return pl.DataFrame(
        {
            "user_id": frame.users["user_id"][events["user"]],
            "item_id": frame.items["item_id"][events["item"]],
            "time": events["time"],
            "label": events["label"].cast(pl.UInt8),
        }
    )


def _last(visits: pl.DataFrame, count: int) -> pl.DataFrame:
    """Returns the last visits of each user; of equal times the later event is later."""
    return visits.sort(*_BY_TIME, maintain_order=True).group_by("user", maintain_order=True).tail(count)


def trained_until(frame: Frame, dataset: Dataset) -> int | None:
    """Returns the time of the newest event outside the test part, Unix microseconds.

    The result is None if events have no clock or the time is in the future, since such a clock cannot be compared with
    the clock of the log.
    """
    if dataset.events.time is None:
        return None
    before_test = (block.filter(pl.col("split") != "test") for block in frame.all_blocks().frames("time", "split"))
    newest = max((int(block["time"].to_numpy().max()) for block in before_test if block.height), default=None)
    return newest if newest is not None and newest <= time.time_ns() // 1_000 else None
