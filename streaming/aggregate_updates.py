"""Aggregates in the online step: the columns of a batch's examples, and the records of the keys that it changed."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.aggregate.aggregator import Aggregator, Occasions
from features.aggregate.plan import column_of
from features.aggregate.reader import counted, event_keys
from models.bundle import aggregate_record, record
from models.bundle.bundle import Bundle
from models.bundle.catalogue import Catalogue
from models.bundle.delta import Record
from models.table.batch import Entities, Examples, aggregate_keys
from streaming.forget.past_values import PastValues


class AggregateUpdates:
    """State of a bundle's aggregates, advanced by batches.

    Attributes:
        past: Values that updates of items replaced.

    Args:
        bundle: Bundle whose published aggregates are the first state.
        catalogue: Users and items by number.
        limit_bytes: Size in bytes of the largest record.
    """

    def __init__(self, bundle: Bundle, catalogue: Catalogue, *, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self.state: Aggregator = bundle.aggregates()
        self._catalogue = catalogue
        self._bundle = bundle
        self.past = PastValues(self.state.plan, catalogue)

    def apply(
        self, events: pl.DataFrame, examples: Examples, enters: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32] | None, list[Record]]:
        """Answers for the examples of a batch, each as of its event's time; the events then count.

        Within a batch, events count in order of time, and in the batch's order among equal times.

        Args:
            events: The events of the batch with `time` and the columns that the plan reads.
            examples: (B,) examples; `context` is the event of each.
            enters: (B,) True for an event, False for a drawn negative.

        Returns:
            (B, A) columns of the plan, None where it has none; and the records of what changed.
        """
        plan = self.state.plan
        if not plan.columns:
            return None, []
        time = events["time"].to_numpy()[examples.context]
        order = np.argsort(time, kind="stable")
        sorted_examples = examples.take(order)
        context = sorted_examples.context
        occasions = Occasions(
            times=time[order],
            keys=aggregate_keys(plan, self._catalogue.users, self._catalogue.items, sorted_examples),
            labels=sorted_examples.labels,
            enters=counted(enters, examples.labels)[order],
            values={
                name: events[name].cast(pl.Float64).fill_null(np.nan).to_numpy()[context] for name in plan.value_columns
            },
            values_keys={name: self._met(events, sorted_examples, name) for name in plan.counted_columns},
        )
        columns = np.empty((len(order), len(plan.columns)), dtype=np.float32)
        columns[order], changed = self.state.advance(occasions)
        forgotten = self.state.shrink()
        return columns, [*self._records(changed), *self._tombstones(forgotten)]

    def forget(self, users: NDArray[np.int64]) -> list[list[str]]:
        """Removes the keys of users from all groups by user. Returns the ids of each user's removed records.

        A group by the user and a column of the items is searched for every value that an item has, had when the bundle
        was published, or had in between.

        Args:
            users: (N,) distinct numbers of users who still have their values.
        """
        plan = self.state.plan
        if not len(users) or not any("user" in group.by for group in plan.groups):
            return [[] for _ in users]
        items = self._catalogue.items
        published = Entities(self._bundle.schema, "item", self._bundle.items, items.admission)
        lists = {}
        for part in dict.fromkeys((*plan.parts, *{"item"}.intersection(plan.counted_columns))):
            entity, column = column_of(part)
            if part == "user":
                continue
            sources = (
                [(self._catalogue.users, users)]
                if entity == "user"
                else [(source, np.arange(source.size, dtype=np.int64)) for source in (published, items)]
            )
            keys = [source.keys(column, index).values.view(np.uint64) for source, index in sources]
            lists[part] = np.unique(np.concatenate([*keys, self.past.keys(part)]))
        own = self._catalogue.users.keys("user_id", users)
        values = [own.values.view(np.uint64)[first:last] for first, last in pairwise(own.offsets)]
        removed = self.state.forget("user", lists, values)
        places = {by: place for place, by in enumerate(self.state.states)}
        return [
            [aggregate_record.key_id(places[by], key) for by, keys in found.items() for key in keys.tolist()]
            for found in removed
        ]

    def _met(self, events: pl.DataFrame, examples: Examples, name: str) -> NDArray[np.uint64]:
        if name not in ("user", "item"):
            keys: NDArray[np.uint64] = event_keys(events[name])[examples.context]
            return keys
        entities, index = (
            (self._catalogue.users, examples.user) if name == "user" else (self._catalogue.items, examples.item)
        )
        return entities.keys(f"{name}_id", index).values.view(np.uint64)

    def _tombstones(self, forgotten: dict[tuple[str, ...], NDArray[np.uint64]]) -> Iterator[Record]:
        for group, by in enumerate(self.state.states):
            for key in forgotten.get(by, ()):
                yield Record(aggregate_record.AGGREGATE, aggregate_record.key_id(group, int(key)), record.TOMBSTONE)

    def _records(self, changed: dict[tuple[str, ...], NDArray[np.uint64]]) -> Iterator[Record]:
        for group, (by, keys) in enumerate(changed.items()):
            held, rows = self.state.states[by].held(keys)
            yield from aggregate_record.batch_records(group, held, rows, limit=self._limit_bytes)
        yield aggregate_record.watermark_record(self.state.watermark)
