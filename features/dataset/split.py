"""Assigns each event to a part of the experiment: train, validation or test.

Training, evaluation and `tessera check` all use this module, so they mean the same events by a part.
Shape letter: R events.
"""

from typing import Literal, Self

import numpy as np
import polars as pl
from pydantic import Field, model_validator

from features.config import Config

PARTS = ("train", "validation", "test")


class Split(Config):
    """Division of events into train, validation and test.

    Attributes:
        by: `time` and `order` keep the last events for testing, `random` draws them, `leave-one-out` takes the last
            two events of each user and uses no fractions.
        train: Fraction of the events.
        validation: Fraction of the events.
        test: Fraction of the events; the three fractions sum to 1.
        seed: Seed of a random split.
    """

    by: Literal["time", "random", "leave-one-out", "order"]
    train: float = Field(0.8, gt=0, lt=1)
    validation: float = Field(0.1, gt=0, lt=1)
    test: float = Field(0.1, gt=0, lt=1)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        total = self.train + self.validation + self.test
        if abs(total - 1) > 1e-9:
            raise ValueError(f"train + validation + test must be 1, got {total:g}; change one of the fractions")
        return self


def assign_split(events: pl.DataFrame, split: Split) -> pl.Series:
    """Returns the part of each event: (R,) String of train, validation and test, aligned with the rows.

    By time: the thresholds are the times at the train and the train + validation quantiles. An event exactly at a
    threshold belongs to the later part, so equal times are never divided and parts never overlap in time.
    By order: the rows in their present order. By random: a seeded permutation of the rows. Leave-one-out: per user by
    (time, event), the last event is test and the last but one validation; a user with fewer than three events is all
    train.

    Args:
        events: Frame of `features.dataset.tables.read_events`. By time uses `time`; leave-one-out uses `user_id`,
            `time` and `event`.
        split: Method and fractions. A part's size is within one event of its fraction, except for ties.
    """
    if split.by == "leave-one-out":
        return _leave_one_out(events)
    size = events.height
    first_later = [round(size * split.train), round(size * (split.train + split.validation))]
    if split.by == "time":
        ordered = events["time"].sort()
        later = [events["time"] >= ordered[k] if k < size else pl.repeat(False, size, eager=True) for k in first_later]
        return _named(later[0], later[1])
    position = np.arange(size)
    if split.by == "random":
        # The permutation is the order in which rows are dealt. Its inverse maps a row to its place.
        position[np.random.default_rng(split.seed).permutation(size)] = np.arange(size)
    place = pl.Series(position)
    return _named(place >= first_later[0], place >= first_later[1])


def _leave_one_out(events: pl.DataFrame) -> pl.Series:
    place = events.select("user_id", "time", "event", row=pl.int_range(pl.len())).sort("user_id", "time", "event")
    ranked = place.select(
        "row",
        from_end=pl.len().over("user_id") - 1 - pl.int_range(pl.len()).over("user_id"),
        count=pl.len().over("user_id"),
    ).sort("row")
    later = ranked.select(
        validation=(pl.col("from_end") <= 1) & (pl.col("count") >= 3),
        test=(pl.col("from_end") == 0) & (pl.col("count") >= 3),
    )
    return _named(later["validation"], later["test"])


def _named(not_train: pl.Series, is_test: pl.Series) -> pl.Series:
    """Names the part of each row from two masks: rows after train, and rows after validation."""
    flags = pl.DataFrame({"not_train": not_train, "is_test": is_test})
    train, validation, test = (pl.lit(part) for part in PARTS)
    part = pl.when("is_test").then(test).when("not_train").then(validation).otherwise(train)
    return flags.select(part.alias("split")).to_series()
