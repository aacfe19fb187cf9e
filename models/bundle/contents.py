"""Contents of a bundle's directory: the manifest, and the files, which are read on first use."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray
from safetensors.torch import load_file

from features.aggregate.aggregator import Aggregator
from features.aggregate.stored import load_aggregates
from features.content.chain import View, load_view
from features.content.encoder import Encoder
from features.content.kinds import load_encoder, reads_vectors
from features.content.space_map import SpaceMap, load_map
from features.dataset.descriptor import Dataset
from features.device import CPU, Device
from features.errors import BundleError
from features.shown.consumed import SCHEMA
from features.value.score import ScoreFormula
from models.encoder.meaning.aspects import Aspect, load_aspect
from models.encoder.meaning.concepts import ConceptHead, join, load_concepts
from models.encoder.meaning.neighbours import NeighbourCorrection, load_correction
from models.profile import profile
from models.ranker.network import DensePart, NetworkConfig, Ranker
from models.semantic_id.codebook import kinds as codebooks
from models.semantic_id.codebook.quantizer import Quantizer
from models.semantic_id.content_path import ContentPath, EncodedItems
from models.semantic_id.tokens import Tokenizer, load_tokenizer
from models.table.admission import Admission, Sketch
from models.table.open import open_table
from models.table.row_files import load_rows, read_weight
from models.table.schema import Schema
from models.towers.stored import load_towers
from models.towers.towers import Towers

AGGREGATES = "aggregates.safetensors"
"""Name of the file that holds the plan and the published state of the aggregates."""

VIEWS = "views"
"""Name of the directory that holds a directory for each view of the items' vectors."""

MAP = "map"
"""Name of the directory of the map from the items' vectors to those that codebook and ranker read."""

RANKER_VECTOR = "ranker_vector"
"""Column of `items.parquet` beside a map: the vector that codebook and ranker read of a published item."""

CONCEPTS, ASPECTS = "concepts", "aspects"
"""Names of the directories that hold a directory for each head of concepts, and for each aspect."""

TOWERS = "towers"
"""Name of the directory of the two towers of retrieval; only if a run trained them."""

CORRECTION, LABELLED_ITEMS = "correction", "labelled.parquet"
CONSUMED = "consumed.parquet"
"""File of the items that users have consumed; only if a policy leaves them out."""
FORGOTTEN = "forgotten.jsonl"
"""File of the requests whose users training left out; only if there are any."""
"""Names of the directory of the correction by neighbours, and of the file with the users' labelled items."""

DECLARED = "declared"
"""Name of the head of the declared concepts."""

LABELLED_SCHEMA = {"user_id": pl.String, "item_id": pl.String, "time": pl.Int64, "label": pl.UInt8}
"""Columns of that file."""


@dataclass(frozen=True)
class Training:
    """State with which the stream continues the training.

    Attributes:
        table_rate: Learning rate of the row-wise Adagrad.
        batch: Number of examples over which training averaged a gradient. The stream divides its sums by this number.
    """

    table_rate: float
    batch: int


class LogPosition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Position of the first message of a partition that is not in a bundle's files.

    Attributes:
        topic: Name of the topic.
        identity: Identity of the topic, as `EventLog.identity` returns it. The position is valid on this topic alone.
        partition: Number of the partition.
        offset: Offset of the message.
    """

    topic: str
    identity: str
    partition: int
    offset: int


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Content of `manifest.json`.

    A new field must have a default with the meaning of a manifest without the field. A field with its default is not
    written, so that the ids of older bundles do not change.

    Attributes:
        id: Hash of all other fields.
        format: Version of the bundle's format.
        dataset: Descriptor of the dataset.
        schema: Schema of the ranker's input.
        hash: Parameters of the hash contract.
        network: Configuration of the dense part.
        training: State with which the stream continues the training.
        encoder: Id of the encoder. None without content.
        codebook: Id of the codebook. None without Semantic IDs.
        tokens: Id of the tokenizer. None without Semantic IDs.
        metrics: Measurements on the test part.
        files: sha256 of every other file, by relative path.
        canonical: Version of the canonical form of ids and categories; see `features.value.canonical`.
        trained_until: Time of the newest event outside the test part, Unix microseconds. None if unknown.
        positions: Positions of the topics at which the bundle's files end. Empty if unknown.
        choices: Choices of the run that wrote the bundle, by their dotted names in the descriptor's `[run]` table.
            Empty if unknown.
        views: Ids of the views of the items' vectors, by name; the base space has no entry.
        concepts: Ids of the heads of concepts, by the name of their directory.
        aspects: Ids of the aspects, by name.
        device: Card on which the ranker was trained, its driver and versions. Empty for a processor.
        map: Id of the map from the items' vectors to those that codebook and ranker read. Empty if they are the same.
        parent: Id of the bundle from which a re-embedding made the bundle. Empty if training made it.
        correction: Id of the correction of new items by neighbours. Empty if scores are the ranker's own.
        towers: Id of the two towers of retrieval. Empty if content alone retrieves.
    """

    id: str
    format: int
    dataset: dict[str, Any]
    schema: dict[str, Any]
    hash: dict[str, Any]
    network: dict[str, Any]
    training: Training
    encoder: str | None
    codebook: str | None
    tokens: str | None
    metrics: dict[str, Any]
    files: dict[str, str]
    canonical: int = 1
    trained_until: int | None = None
    positions: list[LogPosition] = []
    choices: dict[str, Any] = {}
    views: dict[str, str] = {}
    concepts: dict[str, str] = {}
    aspects: dict[str, str] = {}
    device: dict[str, str] = {}
    map: str = ""
    parent: str = ""
    correction: str = ""
    towers: str = ""


@dataclass(frozen=True)
class BundleContents:
    """Files of a bundle. Tables and models are read on first use.

    Attributes:
        directory: Directory of the bundle.
        manifest: Content of `manifest.json`.
        device: Device on which the codebook and the items' encoder compute. Codes of a vector do not depend on it.
    """

    directory: Path
    manifest: Manifest
    device: Device = CPU

    @property
    def id(self) -> str:
        return self.manifest.id

    @property
    def canonical(self) -> int:
        """Version of the canonical form of the bundle's ids and categories."""
        return self.manifest.canonical

    @cached_property
    def schema(self) -> Schema:
        return Schema.from_json(self.manifest.schema)

    @cached_property
    def dataset(self) -> Dataset:
        """The descriptor. Its paths are valid only on the machine that trained the bundle."""
        return Dataset.model_validate(self.manifest.dataset)

    @cached_property
    def formula(self) -> ScoreFormula | None:
        """Formula of the score over the tasks' probabilities. None if the ranker learns one label."""
        tasks = self.dataset.events.tasks
        return None if tasks is None else tasks.formula()

    @cached_property
    def users(self) -> pl.DataFrame:
        return pl.read_parquet(self.directory / "users.parquet")

    @cached_property
    def items(self) -> pl.DataFrame:
        return pl.read_parquet(self.directory / "items.parquet")

    @cached_property
    def history(self) -> pl.DataFrame:
        return pl.read_parquet(self.directory / "history.parquet")

    @cached_property
    def labelled(self) -> pl.DataFrame:
        """Users' last labelled items before the test part, oldest first; empty without a correction."""
        path = self.directory / LABELLED_ITEMS
        if self.manifest.correction:
            return pl.read_parquet(path)
        return pl.DataFrame(schema=LABELLED_SCHEMA)

    @cached_property
    def consumed(self) -> pl.DataFrame:
        """Items that users had consumed before the test part, in their order; empty unless a policy leaves them out."""
        path = self.directory / CONSUMED
        return pl.read_parquet(path) if path.exists() else pl.DataFrame(schema=SCHEMA)

    @cached_property
    def correction(self) -> NeighbourCorrection | None:
        """Correction of new items by neighbours; None if scores are the ranker's own."""
        if not self.manifest.correction:
            return None
        correction = load_correction(self.directory / CORRECTION)
        _same("correction", correction.id, self.manifest.correction)
        return correction

    @cached_property
    def towers(self) -> Towers | None:
        """The two towers of retrieval. None if content alone retrieves."""
        if not self.manifest.towers:
            return None
        towers = load_towers(self.directory / TOWERS)
        _same("towers", towers.id, self.manifest.towers)
        if towers.start != self.schema.rows - self.schema.reserved or towers.schema.rows != self.schema.reserved:
            raise BundleError(
                f"{self.directory / TOWERS}: reads {towers.schema.rows:,} rows from row {towers.start:,}, the table "
                f"reserves its last {self.schema.reserved:,} of {self.schema.rows:,}; publish again"
            )
        return towers

    @cached_property
    def profile(self) -> profile.TrainingProfile | None:
        """Distributions of features and score in training. None in bundles of earlier releases."""
        path = self.directory / profile.FILE
        return profile.read_profile(path) if profile.FILE in self.manifest.files else None

    @cached_property
    def encoder(self) -> Encoder | None:
        """The encoder of the items' vectors. None if items have no content."""
        if self.manifest.encoder is None:
            return None
        encoder = load_encoder(self.directory / "encoder", self.device)
        _same("encoder", encoder.id, self.manifest.encoder)
        return encoder

    @cached_property
    def reads_text(self) -> bool:
        """True if the encoder reads text alone, so that a text has a vector. Does not load the encoder."""
        items = self.dataset.items
        if self.manifest.encoder is None or items is None or not items.text:
            return False
        return not items.vectors or not reads_vectors(self.directory / "encoder")

    @cached_property
    def map(self) -> SpaceMap | None:
        """Map from the items' vectors to those that codebook and ranker read. None if they are the same."""
        if not self.manifest.map:
            return None
        found = load_map(self.directory / MAP)
        _same("map", found.id, self.manifest.map)
        return found

    def for_ranker(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the items' vectors (N, D) as codebook and ranker read them, (N, E)."""
        return vectors if self.map is None else self.map.of(vectors, space=self.manifest.encoder or "")

    @cached_property
    def views(self) -> dict[str, View]:
        """Views of the items' vectors by name, without the base space; empty without content."""
        found = {name: load_view(self.directory / VIEWS / name) for name in sorted(self.manifest.views)}
        for name, view in found.items():
            _same(f"view {name}", view.id, self.manifest.views[name])
        return found

    @cached_property
    def concepts(self) -> ConceptHead | None:
        """Concepts that an item's vector predicts; None if none were fitted."""
        heads = {name: load_concepts(self.directory / CONCEPTS / name) for name in sorted(self.manifest.concepts)}
        for name, head in heads.items():
            _same(f"concepts {name}", head.id, self.manifest.concepts[name])
        return join(list(heads.values())) if heads else None

    @cached_property
    def aspects(self) -> dict[str, Aspect]:
        """Aspects by name; empty if none is declared."""
        found = {name: load_aspect(self.directory / ASPECTS / name) for name in sorted(self.manifest.aspects)}
        for name, aspect in found.items():
            _same(f"aspect {name}", aspect.id, self.manifest.aspects[name])
        return found

    @cached_property
    def codebook(self) -> Quantizer | None:
        """The codebook of the items' Semantic IDs. None without Semantic IDs."""
        if self.manifest.codebook is None:
            return None
        codebook = codebooks.load(self.directory / "codebook", self.device)
        _same("codebook", codebook.id, self.manifest.codebook)
        return codebook

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Tokenizer from Semantic IDs to values of the table. None without Semantic IDs."""
        if self.manifest.tokens is None:
            return None
        tokenizer = load_tokenizer(self.directory / "tokens")
        _same("tokens", tokenizer.id, self.manifest.tokens)
        return tokenizer

    def encode_items(self, texts: Sequence[str]) -> EncodedItems:
        """Encodes the texts of N items by this bundle's encoder, codebook and tokenizer.

        Args:
            texts: N texts. `features.dataset.tables.read_items` defines how text columns are joined.

        Returns:
            Vectors (N, D) float32, codes (N, Q) uint16, and N lists of tokens. Without content D and Q are 0 and the
            lists are empty.
        """
        return ContentPath(self.encoder, self.codebook, self.tokenizer, self.map).encode(texts)

    def rows(self) -> NDArray[np.float32]:
        """Reads the table's rows as published, (R, D) float32."""
        return read_weight(self.directory)

    def aggregates(self) -> Aggregator:
        """Returns the published state of the aggregates, a copy of its own; without a group where there is none."""
        plan = self.schema.aggregates
        if not plan.columns:
            return Aggregator(plan)
        found = load_aggregates(self.directory / AGGREGATES)
        if found.plan != plan:
            raise BundleError(f"{self.directory / AGGREGATES}: holds other aggregates than the schema; publish again")
        return found

    def admission(self) -> Admission:
        """Returns a new admission with the sightings at the end of training."""
        cells = load_file(self.directory / "admission.safetensors")["cells"]
        return Admission(Sketch(cells.numpy()), self.schema.admission)

    def network(self) -> DensePart:
        """Returns the dense part for inference. Does not load TorchRec."""
        network = DensePart(self.schema, msgspec.convert(self.manifest.network, NetworkConfig), plain=True)
        network.load_state_dict(load_file(self.directory / "network.safetensors"))
        return network.eval().requires_grad_(False)

    def ranker(self, *, learning_rate: float | None = None) -> Ranker:
        """Returns a new ranker on TorchRec's table, with the optimizer state of the end of training.

        Args:
            learning_rate: Learning rate of the table. Default: the rate of the training.
        """
        rate = self.manifest.training.table_rate if learning_rate is None else learning_rate
        table = open_table(self.schema, learning_rate=rate)
        load_rows(self.directory, self.schema, {"weight": table.weight, "accumulator": table.accumulator})
        return Ranker(table, self.network())


def _same(kind: str, actual: str, expected: str) -> None:
    if actual != expected:
        raise BundleError(f"{kind}: the files give {actual}, the manifest names {expected}; fetch the bundle again")
