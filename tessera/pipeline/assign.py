"""Stage `assign`: fits a codebook on the vectors and gives each item its codes."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.device import resolve
from features.durable import write_directory
from features.errors import DatasetError
from features.framing.choices import is_large
from features.jobs.shard import read_shards, shard_paths
from models.encoder.likes import COMMON_FANS, training_likes
from models.encoder.pairs import liked_rows
from models.semantic_id.assign import assign_catalogue
from models.semantic_id.codebook import kinds as codebooks
from models.semantic_id.codebook.alike import AlikePairs
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
    after: dict[str, Finished | str] = {"encode": encoded, **before}
    if not job.options.code_likes:
        return job.do("assign", work, reads=READS, after=after)
    described = {
        "events": job.dataset.events.model_dump(mode="json"),
        "split": job.split.model_dump(mode="json"),
    }
    return job.do("assign", work, reads=(*READS, "code_likes"), descriptor=described, tables=("events",), after=after)


def _fitted(job: Job, shards: Path, found: SampledVectors, held_out: NDArray[np.bool_], advance: Advance) -> Quantizer:
    """Fits a codebook on the sample. A codebook of an earlier run is the start, and its codes keep their names."""
    options, start = job.options, job.previous.codebook() if job.previous else None
    levels, codes = (start.levels, start.codes) if start else recommended_shape(found.items)
    vectors = found.vectors[~held_out]
    levels, codes = options.levels or levels, min(options.codes or codes, len(vectors))
    shape = codebooks.CodebookShape(levels, codes, options.seed, resolve(options.device, fused=False))
    if options.code_likes:
        fitted = codebooks.fit_alike(
            options.quantizer,
            vectors,
            shape,
            _alike(job, shards, found, held_out),
            options=options.quantizer_options,
            start=start,
            progress=advance,
        )
    else:
        fitted = codebooks.fit_shape(
            options.quantizer, vectors, shape, options=options.quantizer_options, start=start, progress=advance
        )
    return job.previous.named(fitted, shards) if job.previous else fitted


def _alike(job: Job, shards: Path, found: SampledVectors, held_out: NDArray[np.bool_]) -> AlikePairs:
    """Returns pairs of items that the same users like in the training part, as rows of the vectors to fit on."""
    if is_large(job.dataset):
        raise DatasetError("code_likes: the files are too large to count likes before the frame; set code_likes = 0")
    ids = read_shards(shards, ["item_id"])["item_id"][found.rows]
    likes = training_likes(job.tables.events[0], job.split, ids)
    pairs = liked_rows(likes, ~held_out & np.any(found.vectors, axis=1))
    if not len(pairs):
        raise DatasetError(
            f"code_likes: no two items have {COMMON_FANS} common fans in the training part; set code_likes = 0"
        )
    place = np.cumsum(~held_out) - 1
    return AlikePairs(place[pairs], job.options.code_likes)


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
