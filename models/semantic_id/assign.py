"""Assigns Semantic IDs in batch: shards of (item_id, vector) in, shards with the column `codes` out."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import polars as pl

from features.jobs.engine import Engine
from features.jobs.shard import FileStamp, file_stamp
from features.jobs.worklist import JobReport
from models.semantic_id.codebook import kinds as codebooks
from models.semantic_id.codebook.quantizer import DESCRIPTION, Quantizer


@lru_cache(maxsize=1)
def _codebook(directory: str, stamp: FileStamp) -> Quantizer:
    return codebooks.load(Path(directory))


def assign_shard(shard: pl.DataFrame, *, codebook: str) -> pl.DataFrame:
    """Adds `codes`, (Q,) uint16, by the codebook saved in the directory `codebook`."""
    quantizer = _codebook(codebook, file_stamp(Path(codebook) / DESCRIPTION))
    codes = quantizer.encode(shard["vector"].to_numpy().astype(np.float32))
    return shard.with_columns(pl.Series("codes", codes, dtype=pl.Array(pl.UInt16, quantizer.levels)))


def assign_catalogue(
    shards: Sequence[Path],
    codebook: Path,
    out: Path,
    *,
    engine: Engine | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> JobReport:
    """Assigns codes in every shard; `map_shards` says how an interrupted job resumes."""
    from features.jobs.beam import map_shards

    function = partial(assign_shard, codebook=str(codebook.absolute()))
    return map_shards(function, shards, out, label="assign", engine=engine, keeps_rows=True, progress=progress)
