"""Artifacts that the stages of a run leave on the disk for one another."""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
import torch
from safetensors.torch import load_file, save_file

from features.dataset.descriptor import Dataset
from features.dataset.files import source_files
from features.durable import write_file
from features.errors import DatasetError
from features.frame import Frame
from features.jobs.shard import read_shards
from models.ranker.train import TrainConfig, Trained, new_ranker, restore, snapshot
from models.semantic_id.codebook.quantizer import Quantizer
from models.semantic_id.tokens import Scheme, Tokenizer, fit_tokenizer
from models.table.admission import Sketch
from models.table.schema import SEMANTIC_ID, Schema


def save_ranker(directory: Path, schema: Schema, trained: Trained) -> None:
    """Writes a trained ranker into an existing empty directory, with the validation log loss of each epoch."""
    save_file(snapshot(trained.ranker), directory / "ranker.safetensors")
    save_file({"cells": torch.from_numpy(trained.sketch.cells)}, directory / "admission.safetensors")
    write_json(directory / "schema.json", schema.to_json())
    write_json(directory / "epochs.json", {"validation_log_loss": list(trained.epochs), "precision": trained.precision})


def load_ranker(directory: Path, config: TrainConfig) -> tuple[Schema, Trained]:
    """Reads what `save_ranker` wrote."""
    schema = Schema.from_json(msgspec.json.decode((directory / "schema.json").read_bytes()))
    ranker = new_ranker(schema, config)
    restore(ranker, load_file(directory / "ranker.safetensors"))
    sketch = Sketch(load_file(directory / "admission.safetensors")["cells"].numpy())
    epochs = msgspec.json.decode((directory / "epochs.json").read_bytes())["validation_log_loss"]
    return schema, Trained(ranker.eval(), sketch, tuple(epochs))


def with_content(items: pl.DataFrame, assigned: Path) -> pl.DataFrame:
    """Adds the vectors and codes that the stage `assign` left."""
    named = read_shards(assigned / "codes").rename({"vector": "content_vector", "codes": "semantic_codes"})
    return items.join(named, on="item_id", how="left", maintain_order="left")


def with_tokens(
    frame: Frame, scheme: Scheme, quantizer: Quantizer, *, pieces: int | None = None
) -> tuple[Frame, Tokenizer]:
    """Adds the tokens of the items' codes, which for `pieces` follow from the training part's impressions."""
    coded = frame.items["semantic_codes"].is_not_null()
    codes = frame.items["semantic_codes"].filter(coded).to_numpy().reshape(-1, quantizer.levels)
    shown = np.bincount(frame.part("train")["item"].to_numpy(), minlength=frame.items.height)[coded.to_numpy()]
    tokenizer = fit_tokenizer(scheme, quantizer.levels, quantizer.codes, codes, shown, pieces=pieces)
    tokens = tokenizer.column(frame.items["semantic_codes"]).alias(SEMANTIC_ID)
    return replace(frame, items=frame.items.with_columns(tokens)), tokenizer


def with_train_positives(frame: Frame) -> pl.DataFrame:
    """The frame's items with how many positive events each has in training."""
    positives = frame.part("train").filter(pl.col("label") == 1)["item"].to_numpy().astype(np.int64)
    counts = np.bincount(positives, minlength=frame.items.height)
    return frame.items.with_columns(train_positives=pl.Series(counts[: frame.items.height], dtype=pl.UInt32))


def kept_history(frame: Frame, length: int) -> pl.DataFrame:
    """Visits before the test part; twice the length is more than any time can ask for (see `History`)."""
    empty = pl.DataFrame(schema={"user_id": pl.String, "item_id": pl.String, "time": pl.Int64})
    if not frame.users.height or not frame.items.height:
        return empty
    visits = (
        frame.examples.filter((pl.col("label") == 1) & (pl.col("split") != "test"))
        .sort("user", "time", maintain_order=True)
        .group_by("user", maintain_order=True)
        .tail(2 * length)
    )
    return pl.DataFrame(
        {
            "user_id": frame.users["user_id"][visits["user"]],
            "item_id": frame.items["item_id"][visits["item"]],
            "time": visits["time"],
        }
    )


def trained_until(frame: Frame, dataset: Dataset) -> int | None:
    """Returns the time of the newest event that a bundle is made of, in microseconds since 1970.

    None where events have no clock, and where that time has not come yet: such a clock says nothing of the log's.
    """
    times = frame.examples.filter(pl.col("split") != "test")["time"]
    newest = times.max() if dataset.events.time is not None else None
    return newest if isinstance(newest, int) and newest <= time.time_ns() // 1_000 else None


def read_frame(directory: Path) -> Frame:
    """Reads the frame that the stage `frame` left."""
    users, items, rows = (pl.read_parquet(directory / f"{name}.parquet") for name in ("users", "items", "examples"))
    return Frame(users, items, rows)


class InputFiles:
    """The files of a dataset as they are when this object is made; `check` tells whether they still are.

    Attributes:
        hashes: sha256 of each file, in the order in which they are read.
        stamps: path, inode, size, and times of the last changes of each file.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self.stamps = _stamps(dataset)
        self.hashes = file_hashes(dataset)
        self.check()

    def check(self) -> None:
        """Compares the files with their stamps.

        Raises:
            DatasetError: a file was changed, added or removed; names it.
        """
        changed = sorted({path for path, *_ in set(self.stamps) ^ set(_stamps(self._dataset))})
        if changed:
            raise DatasetError(
                f"{', '.join(changed)}: changed while the run read it, so the stage was not kept; run again when the "
                "files are complete"
            )


def file_hashes(dataset: Dataset) -> list[str]:
    """The sha256 of each file of the dataset, in the order in which they are read."""
    hashes = []
    for path in _files(dataset):
        with path.open("rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashes


def _files(dataset: Dataset) -> Iterator[Path]:
    tables = {"items": dataset.items, "users": dataset.users, "events": dataset.events}
    for table, source in tables.items():
        if source is not None:
            yield from source_files(source, dataset.directory, table)


def _stamps(dataset: Dataset) -> list[tuple[str, int, int, int, int]]:
    """A file that is replaced and put back has another time of change, though its bytes are equal."""
    found = [(str(path), path.stat()) for path in _files(dataset)]
    return [(path, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in found]


def write_json(path: Path, data: Any) -> None:
    """Writes indented JSON durably."""
    write_file(path, msgspec.json.format(msgspec.json.encode(data), indent=2) + b"\n")
