"""The training frame: events joined with users, items and Semantic IDs, and history as of each event's time.

The frame is a star: an example points at its user and its item by row number, so a feature of an item is stored, and
later hashed, once per item and not once per event. The join drops nothing: a user or item that occurs only in events
gets a row with null features.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from features.aggregate.plan import NOTHING, AggregatePlan
from features.dataset.descriptor import Dataset
from features.dataset.split import PARTS, Split, assign_split
from features.frame_blocks import DIRECTORY, Blocks, chained, held_blocks, stored_blocks, write_blocks
from features.hashing import splitmix64
from features.history import EventColumns, Jagged, history_by_user
from features.value.crossed import with_crossed

_NEGATIVE_ROUNDS = 20


Table = pl.DataFrame | pl.LazyFrame


class Frame:
    """Star of three tables, in memory or in files that are read when they are asked for.

    Args:
        users: One row per user: `user_id`, features, `listed` (True if the users table has the user). A lazy table is
            read when it is first used.
        items: One row per item: `item_id`, features, `listed`, and, if there is content, `content_vector`,
            `semantic_codes` and `semantic_id` (the prefixes of its code).
        examples: `event`, `user` and `item` (row numbers), `time`, `label` (0 or 1), `split`, `history` (item row
            numbers, oldest first), then the events' own columns, then those of the aggregates. Of several tasks,
            `label` is the judged task's and `label.TASK` each task's, null where unknown. Instead of a table, the
            blocks of each part.
        aggregates: Plan of the aggregates' columns.
    """

    def __init__(
        self, users: Table, items: Table, examples: Table | Mapping[str, Blocks], aggregates: AggregatePlan = NOTHING
    ) -> None:
        self._users = users
        self._items = items
        self._examples = examples
        self.aggregates = aggregates

    @property
    def users(self) -> pl.DataFrame:
        """The users, one row each."""
        self._users = found = _read(self._users)
        return found

    @property
    def items(self) -> pl.DataFrame:
        """The items, one row each."""
        self._items = found = _read(self._items)
        return found

    @property
    def examples(self) -> pl.DataFrame:
        """All examples, ascending by event. Each use reads all blocks in files; `blocks` takes less memory."""
        if isinstance(self._examples, Mapping):
            return self.all_blocks().whole()
        self._examples = table = _read(self._examples)
        return table

    def part(self, split: str) -> pl.DataFrame:
        """Returns the examples of `train`, `validation` or `test`, in order; not a copy if they are contiguous.

        Each use reads the part's blocks in files; `blocks` takes less memory.
        """
        if isinstance(self._examples, Mapping):
            return self._examples[split].whole()
        of_part = self.examples["split"] == split
        start, count = of_part.arg_max() or 0, int(of_part.sum())
        if of_part[start : start + count].all():
            return self.examples[start : start + count]
        return self.examples.filter(of_part)

    def blocks(self, split: str) -> Blocks:
        """Returns the blocks of `train`, `validation` or `test`."""
        return self._examples[split] if isinstance(self._examples, Mapping) else held_blocks(self.part(split))

    def all_blocks(self) -> Blocks:
        """Returns the blocks of all parts; examples in memory are one block."""
        if isinstance(self._examples, Mapping):
            return chained(list(self._examples.values()))
        table = self.examples
        return Blocks((table.height,), lambda number, columns: table if columns is None else table.select(columns))

    def height(self, split: str) -> int:
        """Returns the number of examples of `train`, `validation` or `test`, without a read of blocks in files."""
        stored = isinstance(self._examples, Mapping)
        return self.blocks(split).height if stored else int((self.examples["split"] == split).sum())

    def replace(
        self,
        *,
        users: Table | None = None,
        items: Table | None = None,
        examples: Table | Mapping[str, Blocks] | None = None,
        aggregates: AggregatePlan | None = None,
    ) -> "Frame":
        """Returns a frame with other tables in place of those given."""
        return Frame(
            self._users if users is None else users,
            self._items if items is None else items,
            self._examples if examples is None else examples,
            self.aggregates if aggregates is None else aggregates,
        )


def stored_frame(directory: Path, aggregates: AggregatePlan = NOTHING) -> Frame:
    """Opens the frame in a directory: `users.parquet`, `items.parquet`, and the examples in blocks.

    An earlier release wrote the examples into one file, which is read whole when examples are asked for.
    """
    users, items = (pl.scan_parquet(directory / f"{name}.parquet", glob=False) for name in ("users", "items"))
    if not (directory / DIRECTORY).is_dir():
        return Frame(users, items, pl.scan_parquet(directory / f"{DIRECTORY}.parquet", glob=False), aggregates)
    return Frame(users, items, stored_blocks(directory), aggregates)


def write_examples(frame: Frame, directory: Path) -> None:
    """Writes the examples of a frame, in blocks, below an existing directory."""
    write_blocks({part: frame.blocks(part) for part in PARTS}, directory)


def _read(table: Table) -> pl.DataFrame:
    return table.collect() if isinstance(table, pl.LazyFrame) else table


def build_frame(
    dataset: Dataset,
    tables: Mapping[str, pl.DataFrame],
    *,
    split: Split,
    history_length: int,
) -> Frame:
    """Joins a dataset's tables.

    Args:
        dataset: Descriptor of the events.
        tables: `events`, and if they exist `items` (with their content if encoded) and `users`.
        split: Usually the dataset's own split.
        history_length: L, the number of positive items an example sees.
    """
    events = tables["events"]
    users = _dimension(tables.get("users"), events, "user_id")
    items = _dimension(tables.get("items"), events, "item_id")
    examples = events.with_columns(
        split=assign_split(events, split),
        user=_row_numbers(events, users, "user_id"),
        item=_row_numbers(events, items, "item_id"),
    )
    columns = EventColumns(
        # Without a user column, no user has a history.
        user=(
            examples["user"].to_numpy().astype(np.int64) if "user_id" in events.columns else np.arange(len(examples))
        ),
        item=examples["item"].to_numpy().astype(np.int64),
        time=examples["time"].to_numpy(),
        # A label that is unknown is no positive.
        positive=(examples["label"] == 1).fill_null(False).to_numpy() & ({"user_id", "item_id"} <= set(events.columns)),
    )
    history = history_by_user(columns, length=history_length, lag=dataset.events.lag)
    examples = examples.with_columns(history=list_column(history)).drop("user_id", "item_id", strict=False)
    if dataset.events.label.implicit:
        examples = with_negatives(
            examples, columns, size=items.height, each=dataset.events.label.negatives, seed=split.seed
        )
    examples = with_crossed(examples, dataset.events.crossed, {"user": users, "item": items})
    return Frame(users, items, examples)


def _dimension(table: pl.DataFrame | None, events: pl.DataFrame, key: str) -> pl.DataFrame:
    """Returns a table's rows, then one row for each key that only the events have, in order of first appearance."""
    found = events.select(key).unique(maintain_order=True) if key in events.columns else pl.DataFrame({key: []})
    found = found.cast({key: pl.String})
    if table is None:
        return found.with_columns(listed=pl.lit(False))
    missing = found.join(table.select(key), on=key, how="anti", maintain_order="left")
    return pl.concat(
        [table.with_columns(listed=pl.lit(True)), missing.with_columns(listed=pl.lit(False))], how="diagonal"
    )


def _row_numbers(events: pl.DataFrame, dimension: pl.DataFrame, key: str) -> pl.Series:
    if key not in events.columns:
        return pl.repeat(0, events.height, dtype=pl.UInt32, eager=True)
    numbered = dimension.select(key).with_row_index("row")
    return events.select(key).join(numbered, on=key, how="left", maintain_order="left")["row"]


def list_column(lists: Jagged) -> pl.Series:
    """Returns lists of row numbers as a column of List(UInt32), without a copy of the values."""
    values = pa.array(lists.values.astype(np.uint32, copy=False))
    return pl.Series(pa.LargeListArray.from_arrays(pa.array(lists.offsets), values))


def with_negatives(
    examples: pl.DataFrame,
    events: EventColumns,
    *,
    size: int,
    each: int,
    seed: int,
    of_users: EventColumns | None = None,
) -> pl.DataFrame:
    """Puts `each` negatives behind every positive: items its user has not met by that time, drawn uniformly.

    A pair (user, item) met later is a fair draw, since it was unknown at the event's time. A draw is a hash of the
    seed, the event and the number of the draw, so it does not depend on the other events of a partition.

    Args:
        examples: One positive for each of the events.
        events: Users, items and times of the examples.
        size: Number of items.
        each: Negatives for a positive.
        seed: Seed of the draws.
        of_users: All events of these users; by default `events`.
    """
    known = of_users or events
    pair = known.user * size + known.item
    order = np.lexsort((known.time, pair))
    pairs, first = np.unique(pair[order], return_index=True)
    met = known.time[order][first]
    user, time = np.repeat(events.user, each), np.repeat(events.time, each)
    drawn_by = examples["event"].to_numpy().astype(np.uint64).repeat(each), np.tile(np.arange(each), len(events.user))
    item = _draws(seed, *drawn_by, turn=0, size=size)
    pending = np.arange(len(user))
    for turn in range(1, _NEGATIVE_ROUNDS + 1):
        wanted = user[pending] * size + item[pending]
        place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
        pending = pending[(pairs[place] == wanted) & (met[place] <= time[pending])]
        if not len(pending) or turn == _NEGATIVE_ROUNDS:
            break
        item[pending] = _draws(seed, *(numbers[pending] for numbers in drawn_by), turn=turn, size=size)
    # A user who has met nearly every item gets fewer negatives, or none.
    drawn = np.setdiff1d(np.arange(len(user)), pending)
    positive = drawn // each
    negatives = examples[positive].with_columns(
        item=pl.Series(item[drawn], dtype=pl.UInt32), label=pl.lit(0, dtype=examples["label"].dtype)
    )
    behind = np.concatenate([np.arange(examples.height), positive])
    return pl.concat([examples, negatives])[np.argsort(behind, kind="stable")]


def _draws(
    seed: int, events: NDArray[np.uint64], numbers: NDArray[np.int64], *, turn: int, size: int
) -> NDArray[np.int64]:
    """Returns items (M,) in [0, size) drawn for events (M,), by the numbers (M,) of their draws and the turn."""
    start = splitmix64(np.array([seed], dtype=np.uint64) ^ np.uint64(0x6E65676174697665))
    with np.errstate(over="ignore"):
        step = (numbers.astype(np.uint64) << np.uint64(32)) + np.uint64(turn)
        mixed = splitmix64(splitmix64(events + start) ^ splitmix64(step))
    found: NDArray[np.int64] = (((mixed >> np.uint64(32)) * np.uint64(size)) >> np.uint64(32)).astype(np.int64)
    return found
