"""Assigns Semantic IDs in batch: shards of (item_id, vector) in, shards with the column `codes` out."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import polars as pl

from features.jobs.engine import Engine
from features.jobs.worklist import JobReport
from features.storage.copy import local_directory
from features.storage.file import Stamp, stamp
from features.storage.location import Location, locate
from models.semantic_id.codebook import kinds as codebooks
from models.semantic_id.codebook.quantizer import DESCRIPTION, Quantizer


@lru_cache(maxsize=1)
def _codebook(directory: str, stamp: Stamp) -> Quantizer:
    return codebooks.load(local_directory(locate(directory)))


def assign_shard(shard: pl.DataFrame, *, codebook: str) -> pl.DataFrame:
    """Adds `codes`, (Q,) uint16, by the codebook saved in the directory `codebook`."""
    quantizer = _codebook(codebook, stamp(locate(codebook) / DESCRIPTION))
    codes = quantizer.encode(shard["vector"].to_numpy().astype(np.float32))
    return shard.with_columns(pl.Series("codes", codes, dtype=pl.Array(pl.UInt16, quantizer.levels)))


def assign_catalogue(
    shards: Sequence[Location],
    codebook: Location,
    out: Location,
    *,
    engine: Engine | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> JobReport:
    """Assigns codes in every shard; `map_shards` says how an interrupted job resumes."""
    from features.jobs.beam import map_shards

    reads = {"codebook": codebook}
    return map_shards(
        assign_shard, shards, out, label="assign", engine=engine, keeps_rows=True, reads=reads, progress=progress
    )
