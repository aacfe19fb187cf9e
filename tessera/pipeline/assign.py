"""Stage `assign`: fits a codebook on the vectors and gives each item its codes."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.durable import write_directory
from features.jobs.shard import read_shards
from models.semantic_id.assign import assign_catalogue
from models.semantic_id.codebook import kinds as codebooks
from models.semantic_id.codebook.quantizer import Quantizer, recommended_shape
from models.semantic_id.report.health import codebook_health, collapse_alarm, held_out_items
from tessera.pipeline.artifact import write_json
from tessera.pipeline.job import Finished, Job
from tessera.pipeline.stage import Advance

READS = ("seed", "quantizer", "quantizer_options", "codes", "levels")


def assign(job: Job, encoded: Finished) -> Finished:
    """Runs the stage after `encode`."""

    def work(directory: Path, advance: Advance) -> None:
        items = read_shards(encoded.directory / "vectors")
        vectors = items["vector"].to_numpy()
        held_out = held_out_items(len(vectors), job.options.seed)
        book = directory / "codebook"
        if not book.exists():
            write_directory(book, _fitted(job, items, vectors[~held_out], advance).save)
        shards = sorted((encoded.directory / "vectors").glob("part-*.parquet"))
        assign_catalogue(shards, book, directory / "codes", engine=job.engine)
        _report(job, directory, items, held_out)

    before = job.previous.after("assign") if job.previous else {}
    return job.do("assign", work, reads=READS, after={"encode": encoded, **before})


def _fitted(job: Job, items: pl.DataFrame, vectors: NDArray[np.float32], advance: Advance) -> Quantizer:
    """Fits a codebook on vectors (N, D). A codebook of an earlier run is the start, and its codes keep their names."""
    options, start = job.options, job.previous.codebook() if job.previous else None
    levels, codes = (start.levels, start.codes) if start else recommended_shape(items.height)
    fitted = codebooks.fit(
        options.quantizer,
        vectors,
        levels=options.levels or levels,
        codes=min(options.codes or codes, len(vectors)),
        seed=options.seed,
        options=options.quantizer_options,
        start=start,
        progress=advance,
    )
    return job.previous.named(fitted, items) if job.previous else fitted


def _report(job: Job, directory: Path, items: pl.DataFrame, held_out: NDArray[np.bool_]) -> None:
    """Writes the codebook's health, and warns of zero vectors and collapsed levels."""
    vectors = items["vector"].to_numpy()
    codes = read_shards(directory / "codes")["codes"].to_numpy()
    parts = {"fitted": vectors[~held_out], "held_out": vectors[held_out]}
    health = codebook_health(codebooks.load(directory / "codebook"), codes, parts)
    zeros = items["item_id"].filter(pl.Series(~vectors.any(axis=1)))
    report: dict[str, Any] = asdict(health) | {"seed": job.options.seed, "zero_vectors": len(zeros)}
    write_json(directory / "report.json", report)
    if len(zeros):
        counted = f"{len(zeros):,} of {len(vectors):,} items have a zero content vector"
        job.warn(f"encode: {counted}, since the encoder can use none of their text, e.g. {zeros[0]}")
    for line in collapse_alarm(health):
        job.warn(f"assign: {line}")
