"""Reads the examples of a frame, or of a part of one, as aggregates see them.

Shape letters: E examples, M chosen examples, A columns.
"""

from collections.abc import Callable

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.aggregate.aggregator import Aggregator, Occasions
from features.aggregate.plan import AggregatePlan, column_of
from features.errors import DatasetError
from features.hashing import fingerprint, value_keys
from features.history import Jagged

# Examples that are answered at once: memory follows this number and not the number of examples. With four times as many
# the rows of states with windows leave the processor's caches, and an example takes twice as long.
_AT_ONCE = 65_536
_ENTITIES = ("user", "item")


class TooManyKeysError(DatasetError):
    """A group of aggregates has more keys than its plan allows."""


class EntityKeys:
    """Keys of users and items that the aggregates of a plan are by, or count.

    Args:
        plan: The plan.
        keys: Function from a part, `user`, `item` or a categorical column of them, to the keys of each row.

    Attributes:
        parts: By part of the plan, the keys of each row.
        met: By entity whose distinct values are counted, the key of each row.
    """

    def __init__(self, plan: AggregatePlan, keys: Callable[[str], Jagged]) -> None:
        self.parts = {part: keys(part) for part in plan.parts}
        counted = [name for name in plan.counted_columns if name in _ENTITIES]
        self.met = {name: (self.parts.get(name) or keys(name)).values.view(np.uint64) for name in counted}


class EventReader:
    """Examples as aggregates read them.

    Args:
        examples: `user` and `item` (row numbers), `time`, `label`, and the events' columns that the plan reads.
        keys: Keys of the users and items.
        plan: The plan.
        enters: (E,) True for an example that counts; a drawn negative does not.
    """

    def __init__(
        self, examples: pl.DataFrame, keys: EntityKeys, plan: AggregatePlan, enters: NDArray[np.bool_]
    ) -> None:
        self._width = len(plan.columns)
        self._times = examples["time"].to_numpy()
        self._labels = examples["label"].to_numpy().astype(np.float32)
        self._enters = counted(enters, self._labels)
        self._rows = {kind: examples[kind].to_numpy().astype(np.int64) for kind in _ENTITIES}
        self._keys = keys.parts
        self._met = {
            name: keys.met[name][self._rows[name]] if name in _ENTITIES else event_keys(examples[name])
            for name in plan.counted_columns
        }
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
                raise TooManyKeysError(
                    f"aggregates by {', '.join(by)}: more than {aggregator.plan.most_keys:,} distinct keys; leave the "
                    "aggregate out, or allow more by aggregate_keys in [run], about 100 bytes each"
                )
        return out


def counted(enters: NDArray[np.bool_], labels: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Returns which examples (E,) count: those that enter and whose label is known, since a rate divides by them."""
    return enters & ~np.isnan(labels)


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
