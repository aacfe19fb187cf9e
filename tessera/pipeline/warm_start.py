"""The run that another one goes on from: its encoder, the names of its codes, its rows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.errors import DatasetError
from features.frame import Frame
from features.jobs.shard import read_shards
from features.training_events import TRAINED, read_trained, trained_on
from models.ranker.network import Ranker
from models.ranker.recode import recode
from models.ranker.resize import resized
from models.ranker.stored import load_ranker
from models.ranker.train import TrainConfig
from models.semantic_id.codebook import kinds as codebooks
from models.semantic_id.codebook.match import match
from models.semantic_id.codebook.quantizer import Quantizer
from models.semantic_id.tokens import load_tokenizer
from models.table.schema import SEMANTIC_ID, Schema
from tessera.pipeline.artifact import read_frame
from tessera.pipeline.stage import finished_key, made_of


class Previous:
    """Content of a finished training's `--out`.

    Args:
        directory: of the run.

    Raises:
        DatasetError: the stages up to `train` are not all there and whole.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._keys = {stage: finished_key(directory / stage) for stage in ("encode", "assign", "frame", "train")}

    def after(self, *stages: str) -> dict[str, str]:
        """Returns the keys of its stages, named as a run that reads them shows them."""
        return {f"the warm start's {stage}": self._keys[stage] for stage in stages}

    @property
    def choices(self) -> dict[str, Any]:
        """The choices that its stages read, by dotted name; empty where an earlier release made them."""
        return {name: value for stage in self._keys for name, value in made_of(self._directory / stage).options.items()}

    @property
    def bundle(self) -> str | None:
        """The id of its bundle, where it went as far."""
        manifest = self._directory / "publish" / "bundle" / "manifest.json"
        return str(msgspec.json.decode(manifest.read_bytes())["id"]) if manifest.is_file() else None

    def trained(self) -> NDArray[np.uint32]:
        """Ids (K,) of the events that it and the runs before it were trained on; see `features.training_events`."""
        kept = self._directory / "publish" / TRAINED
        return read_trained(kept) if kept.is_file() else trained_on(read_frame(self._directory / "frame"))

    @property
    def encoder(self) -> Path:
        """The encoder's directory; vectors of two encoders cannot be coded by one codebook."""
        return self._directory / "encode" / "encoder"

    def codebook(self) -> Quantizer:
        """The codebook of its Semantic IDs."""
        return codebooks.load(self._directory / "assign" / "codebook")

    def named(self, fitted: Quantizer, items: pl.DataFrame) -> Quantizer:
        """The new codebook with the names of the old codes, as far as they can be kept.

        Args:
            fitted: the new codebook.
            items: `item_id` and `vector`, of this run.
        """
        old = read_shards(self._directory / "assign" / "codes").select("item_id", pl.col("codes").alias("before"))
        known = items.join(old, on="item_id", maintain_order="left")
        if not known.height:
            raise DatasetError(f"{self._directory}: none of its items is one of this run's; train without --warm-start")
        codes = fitted.encode(known["vector"].to_numpy().astype(np.float32))
        return match(fitted, codes, known["before"].to_numpy().astype(np.uint16))

    def ranker(self, schema: Schema, frame: Frame, config: TrainConfig) -> tuple[Schema, Ranker]:
        """The old ranker, its rows moved to the size and the Semantic IDs of this run, and the schema it reads by.

        The scale of numeric features stays what the network was trained on.

        Raises:
            DatasetError: this run's features are others.
        """
        old, trained = load_ranker(self._directory / "train" / "ranker", config)
        wanted = replace(schema, numeric=old.numeric)
        if replace(old, rows=schema.rows) != wanted or [n.name for n in old.numeric] != [
            n.name for n in schema.numeric
        ]:
            raise DatasetError(
                f"{self._directory}: its ranker reads other features, or the same in another shape, than this run's; "
                "give the same options and columns, or train without --warm-start"
            )
        found, ranker = resized(old, trained.ranker, rows=schema.rows, table_rate=config.table_rate)
        if SEMANTIC_ID in frame.items.columns:
            items = pl.read_parquet(self._directory / "frame" / "items.parquet")
            coded = items.filter(pl.col("semantic_codes").is_not_null())
            tokens = load_tokenizer(self._directory / "frame" / "tokens").column(coded["semantic_codes"])
            before = coded.select("item_id", tokens.alias(SEMANTIC_ID))
            recode(found, ranker, frame, before)
        return found, ranker
