"""Stage `encode`: makes content vectors of the items' texts, by a fitted encoder or by that of a warm start."""

from collections.abc import Iterator
from pathlib import Path

import polars as pl

from features.content import kinds as encoders
from features.content.encoder import Encoder
from features.durable import write_directory
from features.framing.texts import item_texts, large_item_slices
from features.jobs.encode import encode_catalogue
from features.jobs.sample import sample_rows, take_rows
from features.jobs.shard import each_shard, read_shards, write_shards
from tessera.pipeline.job import Finished, Job
from tessera.pipeline.stage import Advance

READS = ("seed", "encoder", "encoder_model", "encoder_dim")
# Parts of the descriptor that do not change an item's text.
_NOT_TEXT = {"categorical", "numeric", "filterable"}


def encode(job: Job) -> Finished | None:
    """Runs the stage; returns None if the items have no text."""
    declared = job.dataset.items
    if declared is None or not job.dataset.has_content:
        job.console.print(
            f"encode, assign: skipped, since {job.dataset.name} has no items with text; "
            "the ranker learns without Semantic IDs"
        )
        return None

    def work(directory: Path, advance: Advance) -> None:
        shards, sample = _texts(job, directory / "texts")
        encoder = directory / "encoder"
        if not encoder.exists():
            write_directory(encoder, _encoder(job, sample).save)
        encode_catalogue(shards, encoder, directory / "vectors", engine=job.engine, progress=advance)

    return job.do(
        "encode",
        work,
        reads=() if job.previous else READS,
        descriptor={"items": declared.model_dump(mode="json", exclude=_NOT_TEXT)},
        tables=("items",),
        after=job.previous.after("encode") if job.previous else None,
    )


def _texts(job: Job, directory: Path) -> tuple[list[Path], list[str]]:
    """Writes the texts as shards. Returns the shards, and the texts of the sample that an encoder is fitted on."""
    shards = write_shards(_each_text(job), directory)
    rows = sample_rows(read_shards(directory, ["item_id"])["item_id"])
    return shards, take_rows(each_shard(directory, ["text"]), rows)["text"].to_list()


def _each_text(job: Job) -> Iterator[pl.DataFrame]:
    """Yields ids and texts of the items: at once, or by slices of a catalogue that is larger than the sample."""
    slices = large_item_slices(job.dataset)
    if slices:
        yield from item_texts(job.dataset, slices)
        return
    items = job.tables.items
    assert items is not None
    yield items.select("item_id", "text")


def _encoder(job: Job, texts: list[str]) -> Encoder:
    """Loads the encoder of the warm start, or fits an encoder on texts."""
    if job.previous:
        return encoders.load_encoder(job.previous.encoder)
    options = job.options
    model = options.encoder_model
    if model is not None and (beside := job.dataset.directory / model).is_dir():
        model = str(beside)
    return encoders.fit_encoder(options.encoder, texts, dim=options.encoder_dim, seed=options.seed, model=model)
