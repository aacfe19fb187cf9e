"""Aggregates of a training frame: each example's columns as of its time, and the state after all events.

Shape letters: E examples, A columns.
"""

import math
from collections.abc import Collection
from dataclasses import replace

import numpy as np
import polars as pl

from features.aggregate.aggregator import Aggregator, group_keys
from features.aggregate.plan import NOTHING, AggregatePlan, Group, column_of, with_base_rate
from features.aggregate.reader import EntityKeys, EventReader, part_keys
from features.aggregate.stored import aggregate_arrays, restore_aggregates
from features.frame import Frame
from features.frame_blocks import Blocks


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
    examples = frame.examples
    tables = {"user": frame.users, "item": frame.items}
    keys = EntityKeys(plan, lambda part: part_keys(part, tables[column_of(part)[0]]))
    events = EventReader(examples, keys, plan, examples["event"].is_first_distinct().to_numpy())
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


def aggregated_part(frame: Frame, part: str, plan: AggregatePlan) -> Blocks:
    """Returns the blocks of a part with the columns of another plan in place of the frame's own.

    The columns are computed from all examples, of which neither histories nor features are held.
    """
    blocks = frame.blocks(part)
    if frame.aggregates == plan:
        return blocks
    read = {*plan.value_columns, *plan.counted_columns} - {"user", "item"}
    names = ["event", "user", "item", "time", "label", "split", *sorted(read)]
    narrow = frame.replace(examples=frame.all_blocks().whole(*names), aggregates=NOTHING)
    found, _ = with_aggregates(narrow, plan, base_rate=plan.base_rate)
    own = set(frame.aggregates.columns)
    bare = blocks.mapped(lambda block: block.drop(own & set(block.columns)), of=())
    return bare.with_columns(found.part(part).select(plan.columns)) if plan.columns else bare


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
