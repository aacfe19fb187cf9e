"""Loads a frame as batches: entities looked up once, values sighted, batches gathered ahead of the trainer.

Shape letters: E examples, B batch.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.dataset.aggregate import PREFIX
from features.errors import DatasetError
from features.frame import Frame
from features.history import Jagged
from models.table.admission import Admission, Sketch
from models.table.batch import Assembler, Entities, Examples
from models.table.schema import Schema

_AHEAD = 4
Asked = TypeVar("Asked")
Made = TypeVar("Made")


def assembler(schema: Schema, frame: Frame, part: pl.DataFrame, admission: Admission) -> Assembler:
    """Looks up a frame's users and items, and the events' own columns of one part."""
    return Assembler(
        schema,
        Entities(schema, "user", frame.users, admission),
        Entities(schema, "item", frame.items, admission),
        Entities(schema, "event", part, admission),
        content_vectors(frame.items) if schema.content else None,
    )


def examples(part: pl.DataFrame) -> Examples:
    """Returns a part of a frame as aligned columns; `context` counts its rows.

    Raises:
        DatasetError: a label is neither 0 nor 1.
    """
    history = part["history"]
    labels = part["label"].to_numpy().astype(np.float32)
    wrong = np.flatnonzero((labels != 0) & (labels != 1))
    if len(wrong):
        raise DatasetError(
            f"frame: example {wrong[0]} has the label {labels[wrong[0]]}; expected 0 or 1, "
            "see [events] label in the descriptor"
        )
    return Examples(
        user=part["user"].to_numpy().astype(np.int64),
        item=part["item"].to_numpy().astype(np.int64),
        history=Jagged(
            history.explode(empty_as_null=False).to_numpy().astype(np.int64),
            np.concatenate([[0], np.cumsum(history.list.len().to_numpy())]).astype(np.int64),
        ),
        labels=labels,
        context=np.arange(part.height, dtype=np.int64),
        aggregates=_aggregates(part),
    )


def _aggregates(part: pl.DataFrame) -> NDArray[np.float32] | None:
    names = [name for name in part.columns if name.startswith(PREFIX)]
    return part.select(names).to_numpy().astype(np.float32) if names else None


def sighted(schema: Schema, frame: Frame, part: pl.DataFrame, rows: Examples) -> Assembler:
    """Returns an assembler whose admission has seen the examples `rows` of `part`, all at once.

    Drawn negatives are no sightings: of the examples of one event only the first counts.
    """
    if not schema.admission:
        return assembler(schema, frame, part, Admission.off())
    found = assembler(schema, frame, part, Admission(Sketch.sized(0), schema.admission))
    keys, times = found.sightings(rows.take(np.flatnonzero(part["event"].is_first_distinct().to_numpy())))
    sketch = Sketch.sized(len(keys))
    sketch.add(keys, times)
    found.admit(Admission(sketch, schema.admission))
    return found


def content_vectors(items: pl.DataFrame) -> NDArray[np.float32]:
    """Returns (N, width) float32 content vectors of items, zero where an item has none; width 0 without content."""
    if "content_vector" not in items.columns:
        return np.zeros((items.height, 0), dtype=np.float32)
    width = items.schema["content_vector"].shape[0]  # type: ignore[attr-defined]
    zero = pl.Series([[0.0] * width], dtype=pl.Array(pl.Float32, width))
    found: NDArray[np.float32] = items["content_vector"].fill_null(zero).to_numpy().astype(np.float32)
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
