"""Earlier run that a warm start continues: its encoder, the names of its codes, its rows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.aggregate.plan import NOTHING, AggregatePlan
from features.aggregate.stored import read_plan
from features.content.space_map import DESCRIPTION, ENCODER, load_map
from features.errors import DatasetError
from features.frame import Frame
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
from models.semantic_id.vectors import vectors_beside_codes
from models.table.item_parts import parts_of, reading
from models.table.schema import SEMANTIC_ID, Schema
from models.towers.rows import with_reserved
from tessera.pipeline.artifact import AGGREGATES, read_frame
from tessera.pipeline.made_of import key_of
from tessera.pipeline.stage import finished_key, made_of


class Previous:
    """Content of the `--out` of a finished training.

    Args:
        directory: Directory of the run, or of a map in it, `OUT/maps/NAME`. With a map the new run encodes by the
            upgrade's encoder, whose vectors lie in the space of the old codebook and of the old ranker.

    Raises:
        DatasetError: A stage up to `train` is missing or damaged.
        BundleError: The map is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self._map = directory if (directory / DESCRIPTION).is_file() else None
        self._directory = directory if self._map is None else directory.absolute().parents[1]
        self._keys = {stage: finished_key(self._directory / stage) for stage in ("encode", "assign", "frame", "train")}
        if self._map is not None:
            self._keys["encode"] = key_of(self._keys["encode"], load_map(self._map).id)

    def after(self, *stages: str) -> dict[str, str]:
        """Returns the keys of its stages, under the names that a run shows for them."""
        return {f"the warm start's {stage}": self._keys[stage] for stage in stages}

    @property
    def choices(self) -> dict[str, Any]:
        """Choices that its stages read, by dotted name; empty if an earlier release of Tessera made the stages."""
        return {name: value for stage in self._keys for name, value in made_of(self._directory / stage).options.items()}

    @property
    def bundle(self) -> str | None:
        """Id of its bundle; None if it has not published."""
        manifest = self._directory / "publish" / "bundle" / "manifest.json"
        return str(msgspec.json.decode(manifest.read_bytes())["id"]) if manifest.is_file() else None

    @property
    def aggregates(self) -> AggregatePlan:
        """The plan of its aggregates; none where an earlier release made the run."""
        path = self._directory / "frame" / AGGREGATES
        return read_plan(path) if path.is_file() else NOTHING

    def trained(self) -> NDArray[np.uint32]:
        """Returns ids (K,) of the events that this run and earlier runs trained on; see `features.training_events`."""
        kept = self._directory / "publish" / TRAINED
        return read_trained(kept) if kept.is_file() else trained_on(read_frame(self._directory / "frame"))

    @property
    def encoder(self) -> Path:
        """Directory of the encoder for the new run: the run's own, or the map's, since a codebook codes one space."""
        return self._directory / "encode" / "encoder" if self._map is None else self._map / ENCODER

    def codebook(self) -> Quantizer:
        """Loads the codebook of its Semantic IDs."""
        return codebooks.load(self._directory / "assign" / "codebook")

    def named(self, fitted: Quantizer, vectors: Path) -> Quantizer:
        """Returns the new codebook with the names of the old codes, as far as the names can be kept.

        Args:
            fitted: New codebook.
            vectors: Shards with the vectors of the new run.

        Raises:
            DatasetError: The two runs share no item.
        """
        known = vectors_beside_codes(vectors, self._directory / "assign" / "codes")
        if not known.height:
            raise DatasetError(
                f"{self._directory}: none of its items is an item of this run; train without --warm-start"
            )
        codes = fitted.encode(known["vector"].to_numpy().astype(np.float32))
        return match(fitted, codes, known["before"].to_numpy().astype(np.uint16))

    def ranker(self, schema: Schema, frame: Frame, config: TrainConfig) -> tuple[Schema, Ranker]:
        """Returns the old ranker and its schema, with the rows moved to the size and the Semantic IDs of the new run.

        The scale of numeric features stays as the network was trained.

        Raises:
            DatasetError: The new run has other features.
        """
        try:
            old, trained = load_ranker(self._directory / "train" / "ranker", config)
        except RuntimeError as error:
            # torch names the parameters that differ, and no other fault.
            raise DatasetError(
                f"{self._directory}: its ranker has another network than this run's [run.ranker]; give the same, or "
                "train without --warm-start"
            ) from error
        start = trained.ranker
        if old.reserved:
            # The new run trains towers of its own, or has none.
            nothing = np.zeros((0, old.dim), dtype=np.float32)
            old, start = with_reserved(old, start, nothing, table_rate=config.table_rate)
        schema = as_chosen(schema, old)
        wanted = replace(schema, numeric=old.numeric)
        if replace(old, rows=schema.rows) != wanted or [n.name for n in old.numeric] != [
            n.name for n in schema.numeric
        ]:
            raise DatasetError(
                f"{self._directory}: its ranker reads other features, or the same in another shape, than this run's; "
                "give the same options and columns, or train without --warm-start"
            )
        found, ranker = resized(old, start, rows=schema.rows, table_rate=config.table_rate)
        if SEMANTIC_ID in frame.items.columns:
            items = pl.read_parquet(self._directory / "frame" / "items.parquet")
            coded = items.filter(pl.col("semantic_codes").is_not_null())
            tokens = load_tokenizer(self._directory / "frame" / "tokens").column(coded["semantic_codes"])
            before = coded.select("item_id", tokens.alias(SEMANTIC_ID))
            recode(found, ranker, frame, before)
        return found, ranker


def as_chosen(schema: Schema, old: Schema) -> Schema:
    """Returns the schema of a new run that reads of an item, and of the place, what an earlier run chose.

    The cells of the position path stay those of the earlier run, unless it reads a column that the new run lacks.
    """
    schema = reading(schema, set(parts_of(old)) & set(parts_of(schema)))
    if {one.column for one in old.placement} <= {one.column for one in schema.placement}:
        schema = replace(schema, placement=old.placement)
    return schema
