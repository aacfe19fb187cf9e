"""Catalogue of the tests of engines, and jobs on it that are slow enough for two processes to share."""

import time
from functools import partial
from pathlib import Path

import polars as pl

from features.jobs.beam import map_shards
from features.jobs.encode import encode_shard
from features.jobs.engine import Engine
from features.jobs.worklist import JobReport
from models.semantic_id.assign import assign_shard

ROOT = Path(__file__).parents[2]
# A worker imports Beam on a machine that may be busy.
STARTS_S = 300.0
WORDS = ("space", "ocean", "robot", "love", "murder", "kitchen", "war", "music")
TEXTS = [" ".join(WORDS[number * step % 8] for step in (1, 3, 5)) + f" tale{number % 11}" for number in range(120)]
ITEMS = pl.DataFrame({"item_id": [f"i{number}" for number in range(len(TEXTS))], "text": TEXTS})
SHARDS = 12
WORK_S = 0.4


def contents(directory: Path) -> dict[str, bytes]:
    """Returns the bytes of each file below a directory, by path."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def encode_slowly(shard: pl.DataFrame, *, encoder: str, work_s: float) -> pl.DataFrame:
    """Encodes, and takes so long that no worker does all shards before another has started."""
    time.sleep(work_s)
    return encode_shard(shard, encoder=encoder)


def assign_slowly(shard: pl.DataFrame, *, codebook: str, work_s: float) -> pl.DataFrame:
    """Assigns, and takes as long as `encode_slowly`."""
    time.sleep(work_s)
    return assign_shard(shard, codebook=codebook)


def encode_on(engine: Engine, shards: list[Path], encoder: Path, out: Path, work_s: float = WORK_S) -> JobReport:
    """Encodes all shards on an engine."""
    slow = partial(encode_slowly, encoder=str(encoder), work_s=work_s)
    return map_shards(slow, shards, out, label="encode", engine=engine, keeps_rows=True)


def assign_on(engine: Engine, vectors: Path, codebook: Path, out: Path) -> JobReport:
    """Assigns codes to all shards of a directory on an engine."""
    slow = partial(assign_slowly, codebook=str(codebook), work_s=WORK_S)
    return map_shards(slow, sorted(vectors.iterdir()), out, label="assign", engine=engine, keeps_rows=True)
