"""Shared parts of benchmarks on a dataset: its frame and fields, kept results, a bar with an estimate."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from features.aggregate.plan import Choice, plan_of
from features.aggregate_frame import with_aggregates
from features.dataset.descriptor import Dataset
from features.dataset.tables import read_events, read_items, read_users
from features.frame import Frame, build_frame
from models.compressed.fields import Fields, fields
from tessera.code_version import code_version
from tessera.pipeline.artifact import write_json
from tessera.pipeline.made_of import key_of


def dataset_frame(
    dataset: Dataset,
    *,
    seed: int = 0,
    history_length: int = 1,
    content: tuple[NDArray[np.float32], NDArray[np.uint16]] | None = None,
    aggregates: Choice = "off",
) -> Frame:
    """Returns the frame of a dataset; the seed moves a random split.

    Args:
        content: vectors (N, D) and codes (N, Q) of its items, in the order of their table.
        aggregates: Aggregates to compute, as `[run]` names them.
    """
    items = read_items(dataset)
    if content is not None and items is not None:
        vectors, codes = content
        items = items.with_columns(
            pl.Series("content_vector", vectors, dtype=pl.Array(pl.Float32, vectors.shape[1])),
            pl.Series("semantic_codes", codes, dtype=pl.Array(pl.UInt16, codes.shape[1])),
        )
    read = {"events": read_events(dataset)[0], "items": items, "users": read_users(dataset)}
    tables = {name: table for name, table in read.items() if table is not None}
    split = dataset.split.model_copy(update={"seed": dataset.split.seed + seed})
    frame = build_frame(dataset, tables, split=split, history_length=history_length)
    return with_aggregates(frame, plan_of(dataset, aggregates))[0]


def dataset_fields(dataset: Dataset, *, seed: int = 0) -> Fields:
    """Returns the fields of a dataset; the seed moves a random split."""
    return fields(dataset, dataset_frame(dataset, seed=seed))


def remembered(path: Path, module: str, decided_by: Any, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Does the work, or returns its kept result where the same things and the same code decided it.

    Args:
        path: of the kept result.
        module: the benchmark's `__name__`. Its code and everything it imports is part of what decides a result.
        decided_by: everything else that decides it.
        work: makes the result.
    """
    key = key_of(code_version(module), decided_by)
    if path.is_file():
        kept: dict[str, Any] = msgspec.json.decode(path.read_bytes())
        if kept["key"] == key:
            return dict(kept["result"])
    result = work()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"key": key, "result": result})
    return result


def progress_bar(console: Console) -> Progress:
    """Returns a bar that counts, with the time it took and the time it will take."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console)
