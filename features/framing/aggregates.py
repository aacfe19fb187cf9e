"""Jobs of aggregates: examples in order of time, then one task for each group of aggregates.

The tasks of groups are independent, since a group's sums depend on its own keys alone. Memory of a task is bounded by
the keys of its group, see `AggregatePlan.most_keys`, and by a range of time.

Shape letters: E examples, T ranges of time.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import polars as pl

from features.aggregate.aggregator import Aggregator
from features.aggregate.plan import NOTHING, AggregatePlan, Group, column_of
from features.aggregate.reader import EntityKeys, EventReader, TooManyKeysError, part_keys
from features.aggregate.stored import load_aggregates, save_aggregates
from features.durable import rename, write_file
from features.framing.by_user import ORDER, block_number, counts_path
from features.framing.dimension import Dimension
from features.hashing import value_keys
from features.history import Jagged
from features.jobs.shard import write_parquet
from features.jobs.shuffle import gather, partition_of, partition_path, write_scattered
from features.jobs.worklist import RowCounts

_TEST = 2
_STATE, _LARGE = "state.safetensors", "large"


class TimeCounts(msgspec.Struct, frozen=True):
    """Range of the times of a part's examples: the last one before the test part and the first one in it."""

    last_before: int | None
    first_in_test: int | None


@dataclass(frozen=True)
class SortByTime:
    """Task that sorts the examples of a range of time."""

    timed: tuple[Path, ...]

    def __call__(self, path: Path) -> RowCounts:
        if not path.exists():
            examples = gather(self.timed, partition_of(path)).sort(ORDER)
            is_test = pl.col("part") == _TEST
            before, test = (examples.filter(chosen)["time"] for chosen in (~is_test, is_test))
            counts = TimeCounts(before.max(), test.min())  # type: ignore[arg-type]
            write_file(counts_path(path), msgspec.json.encode(counts))
            write_parquet(examples, path, brief=True)
        height = pl.scan_parquet(path).select(pl.len()).collect().item()
        return RowCounts(height, height, 0)


def in_order(directory: Path, ranges: int) -> bool:
    """Returns whether each example before the test part is earlier than each example of the test part."""
    found = [counts_path(partition_path(directory, number)).read_bytes() for number in range(ranges)]
    counts = [msgspec.json.decode(content, type=TimeCounts) for content in found]
    before = [one.last_before for one in counts if one.last_before is not None]
    test = [one.first_in_test for one in counts if one.first_in_test is not None]
    return not before or not test or max(before) < min(test)


@dataclass(frozen=True)
class AggregateGroup:
    """Task that computes the columns of one group for all examples, range after range.

    Args:
        plan: The plan; the path names the number of the group.
        dimensions: Rows of users and items.
        timed: Directory of the examples by time.
        ranges: T.
        in_order: True if the test part comes last.
        optional: Aggregates that are left out if their group has too many keys.
    """

    plan: AggregatePlan
    dimensions: Mapping[str, Dimension]
    timed: Path
    ranges: int
    in_order: bool
    optional: frozenset[str]

    def __call__(self, path: Path) -> RowCounts:
        if not (path / _STATE).exists() and not (path / _LARGE).exists():
            path.mkdir(exist_ok=True)
            group = self.plan.groups[partition_of(path)]
            try:
                self._advance(group, path)
            except TooManyKeysError:
                if not {one.name for one in group.aggregations} <= self.optional:
                    raise
                (path / _LARGE).touch()
        return RowCounts(0, 0, 0)

    def _advance(self, group: Group, path: Path) -> None:
        plan = plan_of_group(self.plan, group)
        keys = EntityKeys(plan, self._keys)
        # A state may be most of the worker's memory, so a state on the way is written and not copied.
        on_the_way = path / f".{secrets.token_hex(8)}.{_STATE}"
        aggregator, before_test = Aggregator(plan), Aggregator(NOTHING if self.in_order else plan)
        in_test = False
        for number in range(self.ranges):
            examples = pl.read_parquet(partition_path(self.timed, number))
            reader = EventReader(examples, keys, plan, enters=(examples["ordinal"] == 0).to_numpy())
            is_test = (examples["part"] == _TEST).to_numpy()
            test, before = np.flatnonzero(is_test), np.flatnonzero(~is_test)
            if self.in_order:
                found = np.empty((len(is_test), len(plan.columns)), dtype=np.float32)
                found[before] = reader.advance(aggregator, before)
                if len(test) and not in_test:
                    write_file(on_the_way, partial(save_aggregates, aggregator))
                    in_test = True
                found[test] = reader.advance(aggregator, test)
            else:
                found = reader.advance(aggregator, np.arange(len(is_test)))
                reader.advance(before_test, before)
            columns = pl.DataFrame(found, schema=list(plan.columns))
            write_parquet(columns, partition_path(path, number), brief=True)
        if not in_test:
            write_file(on_the_way, partial(save_aggregates, aggregator if self.in_order else before_test))
        rename(on_the_way, path / _STATE)

    def _keys(self, part: str) -> Jagged:
        entity, column = column_of(part)
        dimension = self.dimensions[entity]
        if part == entity and dimension.numbers is not None:
            # The fingerprints of all ids are known, so the ids are not read.
            keys = value_keys(column, dimension.numbers.fingerprints)
            return Jagged(keys.view(np.int64), np.arange(len(keys) + 1))
        return part_keys(part, dimension.columns([column]))


def plan_of_group(plan: AggregatePlan, group: Group) -> AggregatePlan:
    """Returns the plan of one group alone."""
    return replace(plan, aggregations=group.aggregations)


def collect(plan: AggregatePlan, directory: Path) -> tuple[AggregatePlan, Aggregator, list[str]]:
    """Joins the states of all groups.

    Returns:
        The plan without the aggregates of groups that have too many keys, their joint state before the test part, and
        the names of the aggregates that were left out.
    """
    paths = {group.by: partition_path(directory, number).with_suffix("") for number, group in enumerate(plan.groups)}
    large = [one.name for one in plan.aggregations if (paths[one.by] / _LARGE).exists()]
    kept = replace(plan, aggregations=tuple(one for one in plan.aggregations if one.name not in large))
    joint = Aggregator(kept)
    for by in joint.states:
        own = load_aggregates(paths[by] / _STATE)
        joint.states[by] = own.states[by]
        joint.pairs |= own.pairs
        joint.watermark = max(joint.watermark, own.watermark)
    return kept, joint, large


@dataclass(frozen=True)
class SpreadColumns:
    """Task that scatters the aggregates of a range of time by block.

    Args:
        plan: The plan of the frame.
        groups: Directory of each group's columns, in the order of the groups.
        timed: Directory of the examples by time.
        blocks: Blocks of each part.
        out: Directory of the scattered files.
    """

    plan: AggregatePlan
    groups: tuple[Path, ...]
    timed: Path
    blocks: Mapping[str, int]
    out: Path

    def __call__(self, path: Path) -> RowCounts:
        number, made = partition_of(path), self.out / f"{path.stem}.arrow"
        if not made.exists():
            examples = pl.read_parquet(partition_path(self.timed, number), columns=["event", "ordinal", "part"])
            columns = [pl.read_parquet(partition_path(group, number)) for group in self.groups]
            joined = pl.concat([examples, *columns], how="horizontal").select(
                "event", "ordinal", "part", *self.plan.columns
            )
            write_scattered(joined, block_number(joined, self.blocks), sum(self.blocks.values()), made)
        return RowCounts(0, 0, 0)
