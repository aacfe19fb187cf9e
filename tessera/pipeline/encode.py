"""Stages on content: `encode` makes vectors of texts, `meaning` fits declared concepts and aspects on the vectors."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import polars as pl

from features.content import kinds as encoders
from features.content.content import contents, fields_of
from features.content.encoder import Encoder
from features.content.given.encoder import given_in, refuse_other_spaces
from features.dataset.tables import content_fields
from features.durable import write_directory
from features.errors import DatasetError
from features.framing.texts import item_texts, large_item_slices
from features.jobs.encode import encode_catalogue
from features.jobs.sample import sample_rows, take_rows
from features.jobs.shard import each_shard, read_shards, write_shards
from models.bundle.contents import ASPECTS, CONCEPTS, DECLARED
from models.encoder.meaning.declared import fit_aspects, fit_concepts
from models.ranker.loading import content_vectors
from tessera.pipeline.artifact import read_frame
from tessera.pipeline.job import Finished, Job
from tessera.pipeline.stage import Advance

READS = ("seed", "encoder", "encoder_model", "encoder_dim")
# Parts of the descriptor that do not change an item's text.
_NOT_TEXT = {"categorical", "numeric", "filterable", "aspects", "concepts", "glossary"}


def encode(job: Job) -> Finished | None:
    """Runs the stage; returns None if the items have neither text nor vectors."""
    declared = job.dataset.items
    if declared is None or not job.dataset.has_content:
        job.console.print(
            f"encode, assign: skipped, since {job.dataset.name} has no items with text or vectors; "
            "the ranker learns without Semantic IDs"
        )
        return None

    def work(directory: Path, advance: Advance) -> None:
        shards, sample = _texts(job, directory / "texts")
        encoder = directory / "encoder"
        if not encoder.exists():
            write_directory(encoder, _encoder(job, sample).save)
        encode_catalogue(
            shards, encoder, directory / "vectors", engine=job.engine, device=job.options.device, progress=advance
        )

    return job.do(
        "encode",
        work,
        reads=() if job.previous else (*READS, "encoder_options") if job.options.encoder_options else READS,
        descriptor={"items": declared.model_dump(mode="json", exclude=_NOT_TEXT)},
        tables=("items",),
        after=job.previous.after("encode") if job.previous else None,
    )


def _texts(job: Job, directory: Path) -> tuple[list[Path], list[str]]:
    """Writes the contents as shards. Returns the shards, and the sample that an encoder is fitted on."""
    shards = write_shards(_each_text(job), directory)
    rows = sample_rows(read_shards(directory, ["item_id"])["item_id"])
    return shards, contents(take_rows((shard.drop("item_id") for shard in each_shard(directory)), rows))


def _each_text(job: Job) -> Iterator[pl.DataFrame]:
    """Yields ids and contents of the items: at once, or by slices of a catalogue that is larger than the sample."""
    fields = encoders.named_fields(job.options.encoder_options)
    if job.previous:
        fields = fields_of(encoders.load_encoder(job.previous.encoder))
    # All vectors become fields, so that a run can be upgraded to vectors that its encoder does not read.
    fields = tuple(dict.fromkeys((*fields, *(job.dataset.items.vectors if job.dataset.items else ()))))
    slices = large_item_slices(job.dataset)
    if slices:
        yield from item_texts(job.dataset, slices, fields=fields)
        return
    items = job.tables.items
    assert items is not None
    texts = items.select("item_id", "text")
    if fields:
        table, declared = job.tables.raw_items, job.dataset.items
        assert table is not None
        assert declared is not None
        texts = texts.with_columns(content_fields(table, declared, fields))
    yield texts


def _encoder(job: Job, texts: list[str]) -> Encoder:
    """Loads the encoder of the warm start, or fits an encoder on texts."""
    spaces = job.dataset.items.spaces if job.dataset.items else {}
    if job.previous:
        found = encoders.load_encoder(job.previous.encoder)
        refuse_other_spaces(found, spaces, source=str(job.options.warm_start))
        return found
    options = job.options
    model = options.encoder_model
    if model is not None and (beside := job.dataset.directory / model).is_dir():
        model = str(beside)
    return encoders.fit_encoder(
        options.encoder,
        texts,
        dim=options.encoder_dim,
        seed=options.seed,
        model=model,
        options=options.encoder_options,
        spaces=spaces,
    )


def meaning(job: Job, encoded: Finished | None, framed: Finished) -> Finished | None:
    """Runs the stage; returns None if the descriptor declares neither concepts nor aspects."""
    declared = job.dataset.items
    if encoded is None or declared is None:
        return None
    chosen = declared.model_dump(mode="json", include={"aspects", "concepts", "glossary"})
    if not any(chosen.values()):
        return None
    if declared.glossary is not None and (file := job.dataset.directory / declared.glossary).is_file():
        chosen["glossary_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()

    def work(directory: Path, advance: Advance) -> None:
        items = read_frame(framed.directory).items
        vectors = content_vectors(items)
        encoder = encoders.load_encoder(encoded.directory / "encoder")
        if declared.glossary is not None and (given := given_in(encoder)):
            raise DatasetError(
                f"[items] glossary: space {given[0].space!r} of vectors.{given[0].name} has no text encoder for the "
                "terms; remove glossary, or encode text alone"
            )
        seed = job.options.seed
        head = fit_concepts(declared, items, vectors, encoder, directory=job.dataset.directory, seed=seed)
        if head is not None and not (directory / CONCEPTS / DECLARED).exists():
            (directory / CONCEPTS).mkdir(exist_ok=True)
            write_directory(directory / CONCEPTS / DECLARED, head.save)
        for name, aspect in fit_aspects(declared, items, vectors, source=encoder.id, seed=seed).items():
            if not (directory / ASPECTS / name).exists():
                (directory / ASPECTS).mkdir(exist_ok=True)
                write_directory(directory / ASPECTS / name, aspect.save)

    return job.do("meaning", work, reads=("seed",), descriptor=chosen, after={"encode": encoded, "frame": framed})


def concept_directories(job: Job, meant: Finished | None) -> dict[str, Path]:
    """Returns the directories of the heads of concepts by name: the declared head, and those that commands added."""
    folders = [folder for folder in (meant.directory / CONCEPTS if meant else None, job.out / CONCEPTS) if folder]
    return {
        path.name: path
        for folder in folders
        if folder.is_dir()
        for path in sorted(folder.iterdir())
        if path.is_dir() and "." not in path.name
    }


def aspect_directories(meant: Finished | None) -> dict[str, Path]:
    """Returns the directories of the aspects by name."""
    folder = meant.directory / ASPECTS if meant else None
    return {path.name: path for path in sorted(folder.iterdir())} if folder and folder.is_dir() else {}
