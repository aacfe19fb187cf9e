"""Loads a frame as batches: entities looked up once, values sighted, batches gathered ahead of the trainer.

Shape letters: E examples, B batch.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features import frame_blocks
from features.dataset.aggregate import PREFIX
from features.dataset.label import TASK
from features.errors import DatasetError
from features.frame import Frame
from features.frame_blocks import Blocks
from features.history import Jagged
from models.table.admission import Admission, Sketch
from models.table.batch import Assembler, Entities, Examples
from models.table.device.packed import pack
from models.table.schema import Schema

_AHEAD = 4
_KEYS = ("event", "user", "item", "label", "history")
Asked = TypeVar("Asked")
Made = TypeVar("Made")


class LoadedBlocks:
    """Blocks of a frame's parts as examples to gather.

    Users and items are looked up once, the events' own columns block by block. Blocks are kept while all of them have
    the rows of one full block at most. So a small frame is read once, and of a large one no two full blocks are in
    memory: a block is released before the next is read.

    Not safe for concurrent use.

    Args:
        source: Assembler of the users and items; its admission decides for the events, too.
        parts: Blocks of each part.
        tasks: Names of several tasks, whose labels the blocks have; empty for one label, or if no label is read.
    """

    def __init__(self, source: Assembler, parts: Mapping[str, Blocks], tasks: Sequence[str] = ()) -> None:
        self.source = source
        self.parts = parts
        labels = (f"{TASK}{name}" for name in tasks)
        self._columns = [*_KEYS, *labels, *event_columns(source.schema)]
        self._kept: dict[tuple[str, int], tuple[Assembler, Examples]] = {}

    def load(self, part: str, number: int) -> tuple[Assembler, Examples]:
        """Returns an assembler of a block's events, and the block's examples.

        Raises:
            DatasetError: A label is neither 0 nor 1.
        """
        if (part, number) not in self._kept:
            blocks = self.parts[part]
            held = sum(len(rows) for _, rows in self._kept.values())
            if held + blocks.heights[number] > frame_blocks.BLOCK_ROWS:
                self._kept.clear()
            block = blocks.read(number, self._columns)
            rows, source = examples(block), self.source.with_events(block)
            del block
            self._kept[part, number] = source, replace(rows, aggregates=self._aggregates(blocks, number))
        return self._kept[part, number]

    def pack(self, part: str, number: int, path: Path) -> None:
        """Writes a block as a file that a device reads. Safe beside a `load` in another thread."""
        blocks = self.parts[part]
        block = blocks.read(number, self._columns)
        pack(self.source.schema, block, replace(examples(block), aggregates=self._aggregates(blocks, number)), path)

    def _aggregates(self, blocks: Blocks, number: int) -> NDArray[np.float32] | None:
        """Reads the columns of aggregates one by one, so that they are in memory once."""
        names = self.source.schema.aggregates.columns
        if not names:
            return None
        found = np.empty((blocks.heights[number], len(names)), dtype=np.float32, order="F")
        for place, name in enumerate(names):
            found[:, place] = blocks.read(number, [name])[name].to_numpy()
        return found


def assembler(schema: Schema, frame: Frame, part: pl.DataFrame, admission: Admission) -> Assembler:
    """Looks up a frame's users and items, and the events' own columns of one part."""
    return Assembler(
        schema,
        Entities(schema, "user", frame.users, admission),
        Entities(schema, "item", frame.items, admission),
        Entities(schema, "event", part, admission),
        content_vectors(frame.items) if schema.content else None,
    )


def dimensions(schema: Schema, frame: Frame, admission: Admission) -> Assembler:
    """Looks up a frame's users and items; the assembler has no events."""
    numeric = {name: pl.Series(name, [], dtype=pl.Float32) for name in event_columns(schema)}
    words = {name: pl.Series(name, [], dtype=pl.String) for name in schema.columns("event")}
    return assembler(schema, frame, pl.DataFrame(numeric | words), admission)


def event_columns(schema: Schema) -> list[str]:
    """Returns the names of the events' own columns that a schema reads."""
    numeric = (numeric.column for numeric in schema.numeric if numeric.of == "event")
    return [*schema.columns("event"), *numeric, *(one.column for one in schema.placement)]


def examples(part: pl.DataFrame) -> Examples:
    """Returns a part of a frame as aligned columns; `context` counts its rows.

    Raises:
        DatasetError: A label is neither 0 nor 1.
    """
    history = part["history"]
    return Examples(
        user=part["user"].to_numpy(),
        item=part["item"].to_numpy(),
        history=Jagged(
            history.explode(empty_as_null=False).to_numpy(),
            np.concatenate([[0], np.cumsum(history.list.len().to_numpy())]).astype(np.int64),
        ),
        labels=checked_labels(part),
        tasks=task_labels(part),
        context=np.arange(part.height, dtype=np.int64),
        aggregates=_aggregates(part),
    )


def task_labels(part: pl.DataFrame) -> NDArray[np.float32] | None:
    """Returns the labels (E, T) of several tasks, NaN where unknown. None for one label."""
    names = [name for name in part.columns if name.startswith(TASK)]
    return np.stack([checked_labels(part, name) for name in names], axis=1) if names else None


def checked_labels(part: pl.DataFrame, column: str = "label") -> NDArray[np.float32]:
    """Returns the labels (E,) of examples, NaN where unknown.

    Raises:
        DatasetError: A label is neither 0 nor 1.
    """
    labels: NDArray[np.float32] = part[column].to_numpy().astype(np.float32)
    wrong = np.flatnonzero((labels != 0) & (labels != 1) & part[column].is_not_null().to_numpy())
    if len(wrong):
        raise DatasetError(
            f"frame: the example of event {part['event'][int(wrong[0])]} has the label {labels[wrong[0]]}; expected 0 "
            "or 1, see [events] label in the descriptor"
        )
    return labels


def _aggregates(part: pl.DataFrame) -> NDArray[np.float32] | None:
    names = [name for name in part.columns if name.startswith(PREFIX)]
    return part.select(names).to_numpy().astype(np.float32, copy=False) if names else None


def sighted(schema: Schema, frame: Frame, blocks: Blocks) -> Assembler:
    """Returns an assembler of a frame's users and items, whose admission has seen the examples of some blocks.

    All examples count at once, so their division into blocks changes no bit of the sketch. Drawn negatives are no
    sightings: of the examples of one event only the first counts.
    """
    if not schema.admission:
        return dimensions(schema, frame, Admission.off())
    source = dimensions(schema, frame, Admission(Sketch.sized(0), schema.admission))
    found: list[tuple[NDArray[np.uint64], NDArray[np.int64]]] = []
    for block in blocks.frames("event", "user", "item", *event_columns(schema)):
        events = block.filter(pl.col("event").is_first_distinct())
        more = source.with_events(events).sightings_by_column(_without_history(events))
        found = [_merged(*pair) for pair in zip(found, more, strict=True)] if found else more
    # Values of two columns may share a key; the sketch's size counts both, and its cells their sum.
    sketch = Sketch.sized(sum(len(keys) for keys, _ in found))
    if found:
        sketch.add(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))
    source.admit(Admission(sketch, schema.admission))
    return source


def _without_history(part: pl.DataFrame) -> Examples:
    nothing = np.zeros(0, dtype=np.int64)
    return Examples(
        user=part["user"].to_numpy(),
        item=part["item"].to_numpy(),
        history=Jagged(nothing, np.zeros(part.height + 1, dtype=np.int64)),
        labels=np.zeros(0, dtype=np.float32),
        context=np.arange(part.height, dtype=np.int64),
    )


def _merged(
    one: tuple[NDArray[np.uint64], NDArray[np.int64]], other: tuple[NDArray[np.uint64], NDArray[np.int64]]
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Returns the distinct keys of both, and the sum of the sightings of each."""
    keys, place = np.unique(np.concatenate([one[0], other[0]]), return_inverse=True)
    times = np.zeros(len(keys), dtype=np.int64)
    np.add.at(times, place, np.concatenate([one[1], other[1]]))
    return keys, times


def content_vectors(items: pl.DataFrame, column: str = "content_vector") -> NDArray[np.float32]:
    """Returns (N, width) float32 content vectors of items, zero where an item has none; width 0 without content."""
    if column not in items.columns:
        return np.zeros((items.height, 0), dtype=np.float32)
    width = items.schema[column].shape[0]  # type: ignore[attr-defined]
    zero = pl.Series([[0.0] * width], dtype=pl.Array(pl.Float32, width))
    found: NDArray[np.float32] = items[column].fill_null(zero).to_numpy().astype(np.float32)
    return found.copy()


def ahead(make: Callable[[Asked], Made], asked: Iterable[Asked]) -> Iterator[Made]:
    """Makes things in order in a thread of its own, a few ahead of the consumer."""
    with ThreadPoolExecutor(1) as pool:
        pending: deque[Future[Made]] = deque()
        try:
            for one in asked:
                pending.append(pool.submit(make, one))
                if len(pending) > _AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
