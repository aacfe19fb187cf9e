"""Aggregates of a training frame: each example's columns as of its time, and the state after all events.

Shape letters: E examples, A columns.
"""

import math
from collections.abc import Collection
from dataclasses import replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.aggregate.aggregator import Aggregator, Occasions, group_keys
from features.aggregate.plan import NOTHING, AggregatePlan, Group, column_of, with_base_rate
from features.aggregate.stored import aggregate_arrays, restore_aggregates
from features.errors import DatasetError
from features.frame import Frame
from features.hashing import fingerprint, value_keys
from features.history import Jagged

# Examples that are answered at once: memory follows this number and not the number of examples. With four times as many
# the rows of states with windows leave the processor's caches, and an example takes twice as long.
_AT_ONCE = 65_536


def with_aggregates(frame: Frame, plan: AggregatePlan, *, base_rate: float | None = None) -> tuple[Frame, Aggregator]:
    """Adds the columns of a plan to a frame's examples.

    Events count in order of time, and in the frame's order among equal times. A drawn negative is answered and never
    counts.

    Args:
        frame: Examples with `time`, `label`, `split`, and the columns that the plan reads.
        plan: The plan.
        base_rate: Rate that a rate starts with; by default the share of positives in training.

    Returns:
        The frame with the plan's columns as Float32, and the state after the last event before the test part: a bundle
        starts there, as its histories do.

    Raises:
        DatasetError: A group has more keys than the plan allows.
    """
    if base_rate is None:
        train = frame.examples.filter(pl.col("split") == "train")["label"]
        base_rate = float(train.mean() or 0.0)  # type: ignore[arg-type]
    plan = with_base_rate(plan, base_rate)
    if not plan.columns:
        return frame, Aggregator(plan)
    events = _Events(frame, plan)
    is_test = (frame.examples["split"] == "test").to_numpy()
    test, before = np.flatnonzero(is_test), np.flatnonzero(~is_test)
    found = np.empty((len(is_test), len(plan.columns)), dtype=np.float32)
    aggregator, before_test = Aggregator(plan), Aggregator(plan)
    if events.in_order(before, test):
        # By time the test part comes last, so the state before the test part is a state on the way.
        found[before] = events.advance(aggregator, before)
        restore_aggregates(before_test, aggregate_arrays(aggregator))
        found[test] = events.advance(aggregator, test)
    else:
        found = events.advance(aggregator, np.arange(len(is_test)))
        events.advance(before_test, before)
    columns = [pl.Series(name, found[:, place]) for place, name in enumerate(plan.columns)]
    return frame.replace(examples=frame.examples.with_columns(columns), aggregates=plan), before_test


def aggregated_by(frame: Frame, plan: AggregatePlan) -> Frame:
    """Returns the frame with the columns of another plan in place of its own."""
    if frame.aggregates == plan:
        return frame
    bare = frame.replace(examples=frame.examples.drop(frame.aggregates.columns), aggregates=NOTHING)
    return with_aggregates(bare, plan, base_rate=plan.base_rate)[0]


def within_bounds(frame: Frame, plan: AggregatePlan, optional: Collection[str]) -> tuple[AggregatePlan, list[str]]:
    """Leaves out optional aggregates that have more keys than the plan allows.

    Args:
        frame: Examples, users and items that the aggregates are of.
        plan: The plan.
        optional: Names of the aggregates that may be left out.

    Returns:
        The plan without them, and the names of those that were left out.
    """
    bare = replace(plan, aggregations=tuple(one for one in plan.aggregations if not one.column))
    large = [
        one.name
        for group in bare.groups
        if _key_count(frame, group, plan.most_keys) > plan.most_keys
        for one in group.aggregations
        if one.name in optional
    ]
    kept = tuple(one for one in plan.aggregations if one.name not in large)
    return replace(plan, aggregations=kept), large


def _key_count(frame: Frame, group: Group, enough: int) -> int:
    """Returns the number of combinations of a group's parts that occur; any number up to `enough` if all fit."""
    tables = {"user": frame.users, "item": frame.items}
    keys = {part: part_keys(part, tables[column_of(part)[0]]) for part in group.by}
    if math.prod(len(np.unique(lists.values)) for lists in keys.values()) <= enough:
        return enough
    rows = frame.examples.select("user", "item").unique()
    chosen = {part: lists.take(rows[column_of(part)[0]].to_numpy().astype(np.int64)) for part, lists in keys.items()}
    return pl.Series(group_keys(group, chosen)[0]).n_unique()


class _Events:
    """Examples of a frame as aggregates read them."""

    def __init__(self, frame: Frame, plan: AggregatePlan) -> None:
        examples = frame.examples
        self._width = len(plan.columns)
        self._times = examples["time"].to_numpy()
        self._enters = examples["event"].is_first_distinct().to_numpy()
        self._labels = examples["label"].to_numpy().astype(np.float32)
        self._rows = {kind: examples[kind].to_numpy().astype(np.int64) for kind in ("user", "item")}
        self._tables = {"user": frame.users, "item": frame.items}
        self._keys = {part: part_keys(part, self._tables[column_of(part)[0]]) for part in plan.parts}
        self._met = {name: self._met_keys(examples, name) for name in plan.counted_columns}
        self._values = {name: _numbers(examples[name]) for name in plan.value_columns}

    def in_order(self, before: NDArray[np.int64], after: NDArray[np.int64]) -> bool:
        """Returns whether each of the examples `before` is earlier than each of the examples `after`."""
        times = self._times
        return not len(before) or not len(after) or int(times[before].max()) < int(times[after].min())

    def advance(self, aggregator: Aggregator, chosen: NDArray[np.int64]) -> NDArray[np.float32]:
        """Advances an aggregator by examples (M,) in order of time; returns their columns (M, A)."""
        order = np.argsort(self._times[chosen], kind="stable")
        out = np.empty((len(chosen), self._width), dtype=np.float32)
        for start in range(0, len(order), _AT_ONCE):
            place = order[start : start + _AT_ONCE]
            chunk = chosen[place]
            occasions = Occasions(
                times=self._times[chunk],
                keys={part: lists.take(self._rows[column_of(part)[0]][chunk]) for part, lists in self._keys.items()},
                labels=self._labels[chunk],
                enters=self._enters[chunk],
                values={name: numbers[chunk] for name, numbers in self._values.items()},
                values_keys={name: keys[chunk] for name, keys in self._met.items()},
            )
            out[place], _ = aggregator.advance(occasions)
            if (by := aggregator.full()) is not None:
                raise DatasetError(
                    f"aggregates by {', '.join(by)}: more than {aggregator.plan.most_keys:,} distinct keys; leave the "
                    "aggregate out, or allow more by aggregate_keys in [run], about 100 bytes each"
                )
        return out

    def _met_keys(self, examples: pl.DataFrame, name: str) -> NDArray[np.uint64]:
        if name not in self._rows:
            return event_keys(examples[name])
        keys: NDArray[np.uint64] = part_keys(name, self._tables[name]).values.view(np.uint64)
        met: NDArray[np.uint64] = keys[self._rows[name]]
        return met


def event_keys(column: pl.Series) -> NDArray[np.uint64]:
    """Returns a key (N,) of each value of an events' column, 0 for a missing one; a list is one value."""
    texts = column.list.join("\x1f") if column.dtype == pl.List else column
    distinct = texts.drop_nulls().unique(maintain_order=True)
    keys = pl.Series(value_keys(column.name, fingerprint(distinct.to_list())), dtype=pl.UInt64)
    found: NDArray[np.uint64] = texts.replace_strict(distinct, keys, default=0, return_dtype=pl.UInt64).to_numpy()
    return found


def part_keys(part: str, table: pl.DataFrame) -> Jagged:
    """Returns the keys of each row of users or items, as a list of uint64 in the place of int64.

    Args:
        part: `user`, `item` or a categorical column of them.
        table: The rows.
    """
    entity, name = column_of(part)
    column = table[name]
    if column.dtype == pl.List:
        lengths = column.list.len().fill_null(0).to_numpy().astype(np.int64)
        flat = column.filter(column.list.len().fill_null(0) > 0).explode(empty_as_null=False)
    else:
        lengths, flat = column.is_not_null().to_numpy().astype(np.int64), column.drop_nulls()
    distinct = flat.unique(maintain_order=True)
    keys = value_keys(name if part == entity else part, fingerprint(distinct.to_list()))
    codes = flat.cast(pl.Enum(distinct)).to_physical().to_numpy() if len(flat) else np.zeros(0, dtype=np.int64)
    return Jagged(keys[codes].view(np.int64), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def _numbers(column: pl.Series) -> NDArray[np.float64]:
    return column.cast(pl.Float64).fill_null(np.nan).to_numpy()
