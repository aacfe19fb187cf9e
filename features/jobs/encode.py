"""Encodes item content: shards of (item_id, text) in, shards of (item_id, vector) out."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.content.content import contents, refuse_without_fields
from features.content.encoder import DESCRIPTION, Encoder
from features.content.kinds import load_encoder
from features.device import DeviceChoice, resolve
from features.jobs.engine import Engine
from features.jobs.worklist import JobReport
from features.storage.copy import local_directory
from features.storage.file import Stamp, stamp
from features.storage.location import Location, locate
from features.threads import one_thread


@lru_cache(maxsize=1)
def _encoder(directory: str, stamp: Stamp, device: DeviceChoice) -> Encoder:
    found = load_encoder(local_directory(locate(directory)))
    # Only an encoder that computes on devices is worth the load of torch, which the choice needs.
    if device != "cpu" and hasattr(found, "device"):
        found.device = resolve(device, fused=False)
    return found


def encode_shard(shard: pl.DataFrame, *, encoder: str, device: DeviceChoice = "cpu") -> pl.DataFrame:
    """Maps (item_id, text) to (item_id, vector: (D,) float32), with the encoder saved in the directory `encoder`.

    A worker process opens one model, on `device`.

    If the encoder reads fields, the shard must have the column of fields too.
    """
    # Loaded outside, since an encoder may bring the library along whose threads are limited.
    loaded = _encoder(encoder, stamp(locate(encoder) / DESCRIPTION), device)
    refuse_without_fields(loaded, shard, source="the catalogue")
    with one_thread():
        vectors = loaded.encode(contents(shard))
    return shard.select("item_id").with_columns(vector_column(vectors))


def vector_column(vectors: NDArray[np.float32]) -> pl.Series:
    """Returns (N, D) float32 as a polars column of fixed-width arrays named `vector`."""
    return pl.Series("vector", vectors, dtype=pl.Array(pl.Float32, vectors.shape[1]))


def encode_catalogue(
    shards: Sequence[Location],
    encoder: Location,
    out: Location,
    *,
    engine: Engine | None = None,
    device: DeviceChoice = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> JobReport:
    """Encodes every shard, on `device` of its worker; `map_shards` says how an interrupted job resumes."""
    from features.jobs.beam import map_shards

    function = partial(encode_shard, device=device) if device != "cpu" else encode_shard
    reads = {"encoder": encoder}
    return map_shards(
        function, shards, out, label="encode", engine=engine, keeps_rows=True, reads=reads, progress=progress
    )
