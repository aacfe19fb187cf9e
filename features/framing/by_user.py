"""Jobs by user: events get their row numbers and part, then histories and negatives, a partition of users at a time.

Shape letters: E events, P partitions of users, T ranges of time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.dataset.descriptor import Dataset
from features.dataset.split import PARTS, assign_split
from features.durable import write_file
from features.frame import list_column, with_negatives
from features.frame_blocks import block_of
from features.framing.numbers import Numbers
from features.framing.split import SplitRule
from features.history import EventColumns, History, Jagged, history_frame
from features.jobs.shuffle import gather, partition_of, write_scattered
from features.jobs.worklist import RowCounts

ORDER = ("time", "event", "ordinal")
"""Columns that order examples by time: an event's negatives follow it."""


class NumberCounts(msgspec.Struct, frozen=True):
    """Counts of a shard of numbered events.

    Attributes:
        unknown: Events whose item, or user, is not in its table, by kind.
        first: Row of the first such id, by kind; None without one.
    """

    unknown: dict[str, int]
    first: dict[str, int | None]


class PartCounts(msgspec.Struct, frozen=True):
    """Counts of a partition of users.

    Attributes:
        examples: Examples by part.
        positives: Positive ones among them.
        labelled: Examples with a known label among them.
        events: Events by part: examples without drawn negatives.
        files: Files by block, and by time, of the partition.
    """

    examples: dict[str, int]
    positives: dict[str, int]
    labelled: dict[str, int]
    events: dict[str, int]
    files: int


@dataclass(frozen=True)
class NumberEvents:
    """Task that numbers the events of a shard and scatters them by user.

    Args:
        numbers: Row numbers of `user` and `item`, of those that the events have.
        listed: Rows of the tables of users and items.
        starts: Rows of the files before each shard.
        places: Labelled events before each shard.
        rule: Split of the events.
        lists: Categorical columns that hold lists in any shard.
        count: P.
        out: Directory of the scattered files.
    """

    numbers: Mapping[str, Numbers]
    listed: Mapping[str, int]
    starts: tuple[int, ...]
    places: tuple[int, ...]
    rule: SplitRule
    lists: tuple[str, ...]
    count: int
    out: Path

    def __call__(self, shard: Path) -> RowCounts:
        number, path = partition_of(shard), self.out / f"{shard.stem}.arrow"
        events = pl.read_parquet(shard)
        if path.exists():
            return RowCounts(events.height, events.height, 0)
        unknown: dict[str, int] = {}
        first: dict[str, int | None] = {}
        rows = {kind: pl.repeat(0, events.height, dtype=pl.UInt32, eager=True) for kind in ("user", "item")}
        for kind, numbers in self.numbers.items():
            rows[kind] = numbers.of(events[f"{kind}_id"])
            strange = rows[kind] >= self.listed[kind]
            unknown[kind] = int(strange.sum())
            first[kind] = rows[kind].filter(strange).first()  # type: ignore[assignment]
        events = events.drop("user_id", "item_id", strict=False).with_columns(
            (pl.col("event") + self.starts[number]).cast(pl.UInt32),
            *(_as_list(events[name]) for name in self.lists),
            part=pl.Series(self.rule.parts(events, self.places[number])),
            **rows,
        )
        of = events["user" if "user" in self.numbers else "event"].to_numpy().astype(np.int64) % self.count
        write_file(counts_path(path), msgspec.json.encode(NumberCounts(unknown, first)))
        write_scattered(events, of, self.count, path)
        return RowCounts(events.height, events.height, 0)


def _as_list(column: pl.Series) -> pl.Series:
    if column.dtype == pl.List:
        return column
    lists = pl.when(pl.col(column.name).is_not_null()).then(pl.concat_list(column.name))
    return column.to_frame().select(lists.alias(column.name)).to_series()


@dataclass(frozen=True)
class ByUser:
    """Task that makes the examples of a partition of users.

    The columns of an example go to a file by block. The columns that aggregates read go to a file by time. A partition
    with a user of very many events is made in ranges of time, each with files of its own.

    Args:
        dataset: Descriptor of the events.
        named: Kinds of ids that the events have.
        numbered: Scattered files of `NumberEvents`.
        length: History length.
        items: Number of items.
        blocks: Blocks of each part.
        borders: First time of each range but the first, T - 1 in all; None if nothing is aggregated.
        out: Directory of the files by block, `blocks`, and by time, `timed`.
        rows: Events of a partition, about.
        read: Columns of the events that aggregates read.
    """

    dataset: Dataset
    named: tuple[str, ...]
    numbered: tuple[Path, ...]
    length: int
    items: int
    blocks: Mapping[str, int]
    borders: tuple[int, ...] | None
    out: Path
    rows: int
    read: tuple[str, ...] = ()

    def __call__(self, path: Path) -> RowCounts:
        done = counts_path(self.out / "blocks" / path.name)
        if not done.exists():
            made = self._make(gather(self.numbered, partition_of(path)), path.stem)
            write_file(done, msgspec.json.encode(made))
        counts = msgspec.json.decode(done.read_bytes(), type=PartCounts)
        return RowCounts(sum(counts.events.values()), sum(counts.examples.values()), 0)

    def _make(self, events: pl.DataFrame, name: str) -> PartCounts:
        events = self._left_out(events)
        columns = EventColumns(
            # Without a user column, no user has a history.
            user=events["user"].to_numpy().astype(np.int64) if "user" in self.named else np.arange(events.height),
            item=events["item"].to_numpy().astype(np.int64),
            time=events["time"].to_numpy(),
            # A label that is unknown is no positive.
            positive=(events["label"] == 1).fill_null(False).to_numpy() & ({"user", "item"} <= set(self.named)),
        )
        ranges = _ranges(columns.time, self.rows)
        lag = self.dataset.events.lag
        history = History(self.length, lag=lag)
        total = np.zeros((4, len(PARTS)), dtype=np.int64)
        for number, index in enumerate(ranges):
            own = EventColumns(*(column[index] for column in columns.arrays())) if len(ranges) > 1 else columns
            lists = history.advance(own)[0] if len(ranges) > 1 else history_frame(own, length=self.length, lag=lag)
            examples = self._examples(events[index] if len(ranges) > 1 else events, own, lists, columns)
            self._write(examples, file_name(name, number))
            part = examples["part"].to_numpy()
            positive = (examples["label"] == 1).fill_null(False).to_numpy()
            known, first = examples["label"].is_not_null().to_numpy(), examples["ordinal"].to_numpy() == 0
            for row, chosen in zip(total, (slice(None), positive, known, first), strict=True):
                row += np.bincount(part[chosen], minlength=len(PARTS))
        examples_of, positives, labelled, events_of = (dict(zip(PARTS, row.tolist(), strict=True)) for row in total)
        return PartCounts(examples_of, positives, labelled, events_of, len(ranges))

    def _write(self, examples: pl.DataFrame, name: str) -> None:
        if self.borders is not None:
            light = examples.select(*ORDER, "part", "label", "user", "item", *self.read)
            span = np.searchsorted(np.asarray(self.borders, dtype=np.int64), light["time"].to_numpy(), side="right")
            write_scattered(light, span, len(self.borders) + 1, self.out / "timed" / name)
        number = block_number(examples, self.blocks)
        write_scattered(examples, number, sum(self.blocks.values()), self.out / "blocks" / name)

    def _left_out(self, events: pl.DataFrame) -> pl.DataFrame:
        split = self.dataset.split
        if split.by != "leave-one-out":
            return events
        parts = assign_split(events.rename({"user": "user_id"}), split)
        numbers = parts.replace_strict(list(PARTS), [0, 1, 2], return_dtype=pl.UInt8)
        return events.with_columns(part=numbers)

    def _examples(self, events: pl.DataFrame, own: EventColumns, lists: Jagged, of_users: EventColumns) -> pl.DataFrame:
        examples = events.with_columns(history=list_column(lists), ordinal=pl.lit(0, dtype=pl.UInt16))
        label, seed = self.dataset.events.label, self.dataset.split.seed
        if not label.implicit:
            return examples
        examples = with_negatives(examples, own, size=self.items, each=label.negatives, seed=seed, of_users=of_users)
        return examples.with_columns(ordinal=pl.int_range(pl.len(), dtype=pl.UInt16).over("event"))


def _ranges(times: NDArray[np.int64], rows: int) -> list[NDArray[np.int64]]:
    """Returns the events of ranges of time, ascending in each; equal times are in one range. Few events are one range.

    A user's history at a time needs his visits before it alone, so ranges are made one after the other.
    """
    if len(times) <= 2 * rows:
        return [np.arange(len(times))]
    order = np.argsort(times, kind="stable")
    cuts = np.searchsorted(times[order], times[order[rows::rows]], side="left")
    parts = np.split(order, np.unique(cuts[cuts > 0]))
    return [np.sort(part) for part in parts]


def file_name(partition: str, number: int) -> str:
    """Returns the name of a file of a partition."""
    return f"{partition}-{number:03d}.arrow"


def block_number(examples: pl.DataFrame, blocks: Mapping[str, int]) -> NDArray[np.int64]:
    """Returns the block (E,) of each example, counted through the parts in their order."""
    events, parts = examples["event"].to_numpy(), examples["part"].to_numpy()
    found, before = np.zeros(len(events), dtype=np.int64), 0
    for number, part in enumerate(PARTS):
        own = parts == number
        found[own] = before + block_of(events[own], blocks[part])
        before += blocks[part]
    return found


def counts_path(path: Path) -> Path:
    """Returns the path of the counts beside a file of a job."""
    return path.with_suffix(".json")
