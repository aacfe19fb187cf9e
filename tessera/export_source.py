"""Source of `tessera export`: a bundle's directory, or the stages that a run finished."""

import re
from pathlib import Path

import polars as pl

from features.aggregate.plan import NOTHING
from features.aggregate.stored import read_plan
from features.content.kinds import load_encoder
from features.dataset.descriptor import Dataset
from features.errors import TesseraError
from features.frame_blocks import example_files
from features.storage.location import refuse_address
from models.bundle.bundle import load_bundle
from models.export.source import ExportSource, bundle_source
from models.semantic_id.codebook import kinds as codebooks
from models.semantic_id.tokens import load_tokenizer
from tessera.pipeline.artifact import AGGREGATES
from tessera.pipeline.stage import finished_key, made_of


def open_source(directory: Path) -> ExportSource:
    """Opens a bundle, or a run up to its stage `frame` at least.

    Raises:
        TesseraError: The directory holds neither, or a damaged one.
    """
    refuse_address(directory, "copy the run or the bundle to this disk")
    if (directory / "manifest.json").is_file():
        return bundle_source(load_bundle(directory))
    frame = directory / "frame"
    if not (frame / "stage.json").is_file():
        raise TesseraError(
            f"{directory} is neither a bundle nor the --out of `tessera run` or `tessera features`: there is no "
            f"manifest.json and no {frame.name}/stage.json; name another directory, or finish the run"
        )
    key = finished_key(frame)
    published = directory / "publish" / "bundle"
    bundle = bundle_source(load_bundle(published)) if published.is_dir() else None
    plan = frame / AGGREGATES
    dataset = _dataset(directory) if bundle is None else bundle.dataset
    return ExportSource(
        name=dataset.name,
        dataset=dataset,
        ids={"frame": key} | dict(bundle.ids if bundle else _model_ids(directory)),
        users=pl.scan_parquet(frame / "users.parquet"),
        items=pl.scan_parquet(frame / "items.parquet"),
        examples=pl.scan_parquet(example_files(frame), glob=False),
        visits=bundle.visits if bundle else None,
        history_length=bundle.history_length if bundle else 0,
        aggregates=read_plan(plan) if plan.is_file() else NOTHING,
    )


def _dataset(directory: Path) -> Dataset:
    """Returns the descriptor of a run without a bundle, from the record of its frame; its name is the directory's."""
    described = made_of(directory / "frame").descriptor
    if not described.get("events"):
        raise TesseraError(f"{directory}: an earlier release made the frame and recorded no descriptor; run again")
    name = re.sub(r"[^A-Za-z0-9]+", "-", directory.resolve().name).strip("-") or "export"
    return Dataset.model_validate({**described, "name": name, "source": directory / "descriptor"})


def _model_ids(directory: Path) -> dict[str, str]:
    """Returns the ids of the models of a run's items; empty without content."""
    if not (directory / "assign" / "codebook").is_dir():
        return {}
    return {
        "encoder": load_encoder(directory / "encode" / "encoder").id,
        "codebook": codebooks.load(directory / "assign" / "codebook").id,
        "tokens": load_tokenizer(directory / "frame" / "tokens").id,
    }
