"""Aggregates in the online step: the columns of a batch's examples, and the records of the keys that it changed."""

from collections.abc import Iterator

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.aggregate.aggregator import Aggregator, Occasions
from features.aggregate.reader import event_keys
from models.bundle import aggregate_record, record
from models.bundle.bundle import Bundle
from models.bundle.catalogue import Catalogue
from models.bundle.delta import Record
from models.table.batch import Examples, aggregate_keys


class AggregateUpdates:
    """State of a bundle's aggregates, advanced by batches.

    Args:
        bundle: Bundle whose published aggregates are the first state.
        catalogue: Users and items by number.
        limit_bytes: Size in bytes of the largest record.
    """

    def __init__(self, bundle: Bundle, catalogue: Catalogue, *, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self.state: Aggregator = bundle.aggregates()
        self._catalogue = catalogue

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
            enters=enters[order],
            values={
                name: events[name].cast(pl.Float64).fill_null(np.nan).to_numpy()[context] for name in plan.value_columns
            },
            values_keys={name: self._met(events, sorted_examples, name) for name in plan.counted_columns},
        )
        columns = np.empty((len(order), len(plan.columns)), dtype=np.float32)
        columns[order], changed = self.state.advance(occasions)
        forgotten = self.state.shrink()
        return columns, [*self._records(changed), *self._tombstones(forgotten)]

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
