"""Stage `encode`: the items' texts become content vectors, by an encoder that is fitted on them or taken over."""

from pathlib import Path

from features.content import kinds as encoders
from features.content.encoder import Encoder
from features.durable import write_directory
from features.jobs.encode import encode_catalogue
from features.jobs.shard import write_shards
from tessera.pipeline.job import Finished, Job
from tessera.pipeline.stage import Advance

READS = ("seed", "encoder", "encoder_model", "encoder_dim")
# Columns that are no part of an item's text.
_NOT_TEXT = {"categorical", "numeric", "filterable"}


def encode(job: Job) -> Finished | None:
    """Does the stage; None where the items have no text, so that there is nothing to encode."""
    declared = job.dataset.items
    if declared is None or not job.dataset.has_content:
        job.console.print(
            f"encode, assign: skipped, since {job.dataset.name} has no items with text; "
            "the ranker learns without Semantic IDs"
        )
        return None
    options = job.options

    def work(directory: Path, advance: Advance) -> None:
        items = job.tables.items
        assert items is not None
        texts = items.select("item_id", "text")
        place = directory / "encoder"
        if not place.exists():
            write_directory(place, _encoder(job, texts["text"].to_list()).save)
        encode_catalogue(
            write_shards(texts, directory / "texts"),
            place,
            directory / "vectors",
            runner=options.runner,
            options=options.runner_options,
            progress=advance,
        )

    return job.do(
        "encode",
        work,
        reads=() if job.previous else READS,
        descriptor={"items": declared.model_dump(mode="json", exclude=_NOT_TEXT)},
        tables=("items",),
        after=job.previous.after("encode") if job.previous else None,
    )


def _encoder(job: Job, texts: list[str]) -> Encoder:
    """Takes the encoder of the earlier run over, or fits one."""
    if job.previous:
        return encoders.load_encoder(job.previous.encoder)
    options = job.options
    model = options.encoder_model
    if model is not None and (beside := job.dataset.directory / model).is_dir():
        model = str(beside)
    return encoders.kind(options.encoder).fit(texts, dim=options.encoder_dim, seed=options.seed, model=model)
