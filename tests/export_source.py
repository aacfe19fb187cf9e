"""A source of exports, made in a moment: events in pairs of one time, aggregates, an item without content."""

from pathlib import Path

import numpy as np
import polars as pl

from features.aggregate.plan import plan_of
from features.aggregate_frame import with_aggregates
from features.dataset.split import Split
from features.frame import Frame, build_frame, write_examples
from features.frame_blocks import example_files
from models.export.source import ExportSource
from tests.build import coloured_dataset, coloured_tables

LENGTH, DIM = 5, 6
IDS = {"frame": "k", "bundle": "b-1", "encoder": "lsa-1", "codebook": "rq-1", "tokens": "prefix-1"}
_START_US, _HOUR_US = 1_735_689_600_000_000, 3_600_000_000


def event_table(events: int) -> pl.DataFrame:
    """Two events an hour, at the same time, from 2025-01-01 on."""
    return coloured_tables(events=events)["events"].with_columns(time=_START_US + pl.col("time") * _HOUR_US)


def content(items: pl.DataFrame) -> pl.DataFrame:
    """Items with vectors, codes and tokens, the last item without."""
    rng = np.random.default_rng(0)
    vectors, codes = rng.standard_normal((items.height, DIM)), rng.integers(0, 4, (items.height, 2))
    columns = [
        pl.Series("content_vector", vectors.astype(np.float32), dtype=pl.Array(pl.Float32, DIM)),
        pl.Series("semantic_codes", codes.astype(np.uint16), dtype=pl.Array(pl.UInt16, 2)),
        pl.Series("semantic_id", [[f"{a}", f"{a}.{b}"] for a, b in codes.tolist()], dtype=pl.List(pl.String)),
    ]
    known = pl.int_range(pl.len()) < items.height - 1
    return items.with_columns(columns).with_columns(pl.when(known).then(pl.col(own.name)) for own in columns)


def made(directory: Path, *, events: int = 600, clock: bool = True) -> tuple[ExportSource, Frame]:
    """A source on files as a run leaves them, and its frame."""
    dataset = coloured_dataset(directory)
    if not clock:
        ordered = dataset.events.model_copy(update={"time": None, "order": "time"})
        dataset = dataset.model_copy(update={"events": ordered, "split": Split(by="order")})
    # The events have an item that the catalogue has not.
    found = coloured_tables(events=events) | {"events": event_table(events)}
    found["items"] = content(found["items"][:-1])
    frame = build_frame(dataset, found, split=dataset.split, history_length=LENGTH)
    frame, _ = with_aggregates(frame, plan_of(dataset))
    for name in ("users", "items"):
        getattr(frame, name).write_parquet(directory / f"{name}.parquet")
    write_examples(frame, directory)
    visits = pl.DataFrame({"user_id": ["u1", "u1", "u0"], "item_id": ["i3", "i2", "i1"], "time": [1, 2, 3]})
    source = ExportSource(
        name=dataset.name,
        dataset=dataset,
        ids=IDS,
        users=pl.scan_parquet(directory / "users.parquet"),
        items=pl.scan_parquet(directory / "items.parquet"),
        examples=pl.scan_parquet(example_files(directory)),
        visits=visits.lazy(),
        history_length=LENGTH,
        aggregates=frame.aggregates,
    )
    return source, frame
