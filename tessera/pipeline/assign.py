"""Stage `assign`: fits a codebook on the vectors and gives each item its codes."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.durable import write_directory
from features.jobs.shard import shard_paths
from models.semantic_id.assign import assign_catalogue
from models.semantic_id.codebook import kinds as codebooks
from models.semantic_id.codebook.quantizer import Quantizer, recommended_shape
from models.semantic_id.report.health import codebook_health, collapse_alarm, held_out_items
from models.semantic_id.vectors import SampledVectors, read_vectors
from tessera.pipeline.artifact import write_json
from tessera.pipeline.job import Finished, Job
from tessera.pipeline.stage import Advance

READS = ("seed", "quantizer", "quantizer_options", "codes", "levels")


def assign(job: Job, encoded: Finished) -> Finished:
    """Runs the stage after `encode`."""
    shards = encoded.directory / "vectors"

    def work(directory: Path, advance: Advance) -> None:
        found = read_vectors(shards)
        held_out = held_out_items(len(found.rows), job.options.seed)
        book = directory / "codebook"
        if not book.exists():
            write_directory(book, _fitted(job, shards, found, held_out, advance).save)
        assign_catalogue(shard_paths(shards), book, directory / "codes", engine=job.engine)
        _report(job, directory, found, held_out)

    before = job.previous.after("assign") if job.previous else {}
    return job.do("assign", work, reads=READS, after={"encode": encoded, **before})


def _fitted(job: Job, shards: Path, found: SampledVectors, held_out: NDArray[np.bool_], advance: Advance) -> Quantizer:
    """Fits a codebook on the sample. A codebook of an earlier run is the start, and its codes keep their names."""
    options, start = job.options, job.previous.codebook() if job.previous else None
    levels, codes = (start.levels, start.codes) if start else recommended_shape(found.items)
    vectors = found.vectors[~held_out]
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
    return job.previous.named(fitted, shards) if job.previous else fitted


def _report(job: Job, directory: Path, found: SampledVectors, held_out: NDArray[np.bool_]) -> None:
    """Writes the codebook's health over the sample, and warns of zero vectors and collapsed levels."""
    parts = {"fitted": found.vectors[~held_out], "held_out": found.vectors[held_out]}
    health = codebook_health(codebooks.load(directory / "codebook"), found.codes(directory / "codes"), parts)
    counts = {"items": found.items, "health_items": health.items, "zero_vectors": found.zeros}
    report: dict[str, Any] = asdict(health) | {"seed": job.options.seed} | counts
    write_json(directory / "report.json", report)
    if found.zeros:
        counted = f"{found.zeros:,} of {found.items:,} items have a zero content vector"
        job.warn(f"encode: {counted}, since the encoder can use none of their text, e.g. {found.example}")
    for line in collapse_alarm(health):
        job.warn(f"assign: {line}")
