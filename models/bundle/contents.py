"""Contents of a bundle's directory: its manifest, and what the files hold, read on first use."""

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

from features.content.encoder import Encoder
from features.content.kinds import load_encoder
from features.dataset.descriptor import Dataset
from features.errors import BundleError
from models.ranker.network import DensePart, NetworkConfig, Ranker
from models.semantic_id.codebook import kinds as codebooks
from models.semantic_id.codebook.quantizer import Quantizer
from models.semantic_id.content_path import ContentPath, EncodedItems
from models.semantic_id.tokens import Tokenizer, load_tokenizer
from models.table.admission import Admission, Sketch
from models.table.open import open_table
from models.table.schema import Schema


@dataclass(frozen=True)
class Training:
    """State with which the stream continues the training.

    Attributes:
        table_rate: learning rate of the row-wise Adagrad.
        batch: examples a gradient was averaged over; the stream scales its sums by the same number.
    """

    table_rate: float
    batch: int


class LogPosition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first message of a partition that a bundle's files did not hold.

    Attributes:
        topic, partition, offset: its place.
        identity: of the topic, as `EventLog.identity` returns it; on another topic the position means nothing.
    """

    topic: str
    identity: str
    partition: int
    offset: int


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Content of `manifest.json`; `id` is the hash of all the rest.

    A field that is added has a default that means what a manifest without it meant, and is left out where it has that
    value, so that ids hold.

    Attributes:
        canonical: version of the canonical form of ids and categories; see `features.value.canonical`.
        trained_until: event time of the newest event outside the test part, in microseconds since 1970; None: unknown.
        positions: up to where the topics were in the files that the bundle was made of; empty: unknown.
        choices: the choices of the run that made it, by their dotted names in the descriptor's `[run]` table; empty:
            unknown.
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


@dataclass(frozen=True)
class BundleContents:
    """The files of a bundle. Tables and models are read when they are first asked for."""

    directory: Path
    manifest: Manifest

    @property
    def id(self) -> str:
        return self.manifest.id

    @property
    def canonical(self) -> int:
        """Version of the canonical form of its ids and categories."""
        return self.manifest.canonical

    @cached_property
    def schema(self) -> Schema:
        return Schema.from_json(self.manifest.schema)

    @cached_property
    def dataset(self) -> Dataset:
        """The descriptor; its paths mean nothing here."""
        return Dataset.model_validate(self.manifest.dataset)

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
    def encoder(self) -> Encoder | None:
        """The encoder that made the items' vectors, or None where items have no content."""
        if self.manifest.encoder is None:
            return None
        found = load_encoder(self.directory / "encoder")
        _same("encoder", found.id, self.manifest.encoder)
        return found

    @cached_property
    def codebook(self) -> Quantizer | None:
        """The codebook that made the items' Semantic IDs, or None."""
        if self.manifest.codebook is None:
            return None
        found = codebooks.load(self.directory / "codebook")
        _same("codebook", found.id, self.manifest.codebook)
        return found

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Tokenizer from Semantic IDs to values of the table, or None."""
        if self.manifest.tokens is None:
            return None
        found = load_tokenizer(self.directory / "tokens")
        _same("tokens", found.id, self.manifest.tokens)
        return found

    def encode_items(self, texts: Sequence[str]) -> EncodedItems:
        """Turns the texts of N items into what the ranker learns of them, by this bundle's encoder and codebook.

        Args:
            texts: one for each item; the text columns joined as `features.dataset.tables.read_items` joins them.

        Returns:
            vectors (N, D) float32, codes (N, Q) uint16, and N lists of tokens. Without content D and Q are 0 and the
            lists are empty.
        """
        return ContentPath(self.encoder, self.codebook, self.tokenizer).encode(texts)

    def rows(self) -> NDArray[np.float32]:
        """The table's rows as published, (R, D) float32."""
        found: NDArray[np.float32] = load_file(self.directory / "table.safetensors")["weight"].numpy()
        return found

    def admission(self) -> Admission:
        """Returns a new admission as of the end of training: the rule which values read rows."""
        cells = load_file(self.directory / "admission.safetensors")["cells"]
        return Admission(Sketch(cells.numpy()), self.schema.admission)

    def network(self) -> DensePart:
        """Returns the dense part, ready to score, without loading TorchRec."""
        network = DensePart(self.schema, msgspec.convert(self.manifest.network, NetworkConfig), plain=True)
        network.load_state_dict(load_file(self.directory / "network.safetensors"))
        return network.eval().requires_grad_(False)

    def ranker(self, *, learning_rate: float | None = None) -> Ranker:
        """A ranker of its own on TorchRec's table, with the optimizer state to go on training from.

        Args:
            learning_rate: of the table; by default that of the training.
        """
        rate = self.manifest.training.table_rate if learning_rate is None else learning_rate
        table = open_table(self.schema, learning_rate=rate)
        tensors = load_file(self.directory / "table.safetensors")
        table.weight.copy_(tensors["weight"])
        table.accumulator.copy_(tensors["accumulator"])
        return Ranker(table, self.network())


def _same(what: str, found: str, expected: str) -> None:
    if found != expected:
        raise BundleError(f"{what}: the files give {found}, the manifest names {expected}; fetch the bundle again")
