"""A bundle: everything a released model needs, in one directory, named by the hash of what it holds.

    manifest.json            format, dataset descriptor, schema, hash contract, ids of encoder and codebook, sha256s
    table.safetensors        weight (R, D) float32, accumulator (R,) float32
    admission.safetensors    cells of the sketch of the values' sightings, uint8
    network.safetensors      the dense part
    encoder/  codebook/      only where items have content
    users.parquet  items.parquet  history.parquet     entities, features, vectors, Semantic IDs, histories

No pickle. Written aside and renamed; every file's sha256 is checked when it is loaded. Equal content has an equal id,
wherever and whenever it was made.
"""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from features.content.encoder import Encoder
from features.content.kinds import load_encoder
from features.dataset.descriptor import Dataset
from features.durable import write_directory
from features.errors import BundleError
from features.hashing import HashSpec
from features.jobs.shard import write_parquet
from features.value import canonical
from models.ranker.network import DensePart, NetworkConfig, Ranker
from models.semantic_id.codebook import kinds as codebooks
from models.semantic_id.codebook.quantizer import Quantizer
from models.semantic_id.content_path import ContentPath, EncodedItems
from models.semantic_id.tokens import Tokenizer, load_tokenizer
from models.table.admission import Admission, Sketch
from models.table.open import open_table
from models.table.schema import Schema

FORMAT = 3
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Training:
    """What the stream needs to go on as training left off.

    Attributes:
        table_rate: learning rate of the row-wise Adagrad.
        batch: examples a gradient was averaged over; the stream scales its sums by the same number.
    """

    table_rate: float
    batch: int


@dataclass(frozen=True)
class BundleParts:
    """What goes into a bundle.

    Attributes:
        dataset: the descriptor it was trained on.
        schema: the ranker's input.
        ranker: trained.
        sketch: of the values' sightings in training.
        training: how the stream goes on training the table.
        users, items: the frame's dimensions; items also carry `train_positives`, positive events in training.
        history: `user_id`, `item_id`, `time`: each user's kept visits, oldest first.
        metrics: what was measured on the test part.
        encoder, codebook, tokens: directories to copy, or None.
        trained_until, positions: see `Manifest`.
    """

    dataset: Dataset
    schema: Schema
    ranker: Ranker
    sketch: Sketch
    training: Training
    users: pl.DataFrame
    items: pl.DataFrame
    history: pl.DataFrame
    metrics: dict[str, Any]
    encoder: Path | None
    codebook: Path | None
    tokens: Path | None
    trained_until: int | None = None
    positions: Sequence["LogPosition"] = ()


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
    """What `manifest.json` holds; `id` is the hash of all the rest.

    A field that is added has a default that means what a manifest without it meant, and is left out where it has that
    value, so that ids hold.

    Attributes:
        canonical: version of the canonical form of ids and categories; see `features.value.canonical`.
        trained_until: event time of the newest event outside the test part, in microseconds since 1970; None: unknown.
        positions: up to where the topics were in the files that the bundle was made of; empty: unknown.
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


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle; tables and models are read when they are first asked for."""

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
        """What turns Semantic IDs into values of the table, or None."""
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
        """Which values read rows, as of the end of training; the caller's own."""
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


def write_bundle(parts: BundleParts, destination: Path) -> Bundle:
    """Writes a bundle durably to `destination`, which must not exist."""

    def fill(directory: Path) -> None:
        for name, source in (("encoder", parts.encoder), ("codebook", parts.codebook), ("tokens", parts.tokens)):
            if source is not None:
                shutil.copytree(source, directory / name)
        table = parts.ranker.table
        save_file({"weight": table.weight, "accumulator": table.accumulator}, directory / "table.safetensors")
        save_file({"cells": torch.from_numpy(parts.sketch.cells)}, directory / "admission.safetensors")
        save_file(dict(parts.ranker.network.state_dict()), directory / "network.safetensors")
        for name, frame in (("users", parts.users), ("items", parts.items), ("history", parts.history)):
            write_parquet(frame, directory / f"{name}.parquet")
        encoder = load_encoder(parts.encoder).id if parts.encoder else None
        codebook = codebooks.load(parts.codebook).id if parts.codebook else None
        tokens = load_tokenizer(parts.tokens).id if parts.tokens else None
        manifest = Manifest(
            id="",
            format=FORMAT,
            dataset=_portable(parts.dataset),
            schema=parts.schema.to_json(),
            hash=asdict(parts.schema.hash_spec),
            network=asdict(parts.ranker.network.config),
            training=parts.training,
            encoder=encoder,
            codebook=codebook,
            tokens=tokens,
            metrics=parts.metrics,
            files=file_hashes(directory),
            canonical=canonical.VERSION,
            trained_until=parts.trained_until,
            positions=list(parts.positions),
        )
        named = msgspec.structs.replace(manifest, id=_identity(manifest))
        (directory / _MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(named), indent=2) + b"\n")

    write_directory(destination, fill)
    return load_bundle(destination)


def load_bundle(directory: str | Path) -> Bundle:
    """Opens a bundle and checks every file.

    Args:
        directory: Directory that `tessera run` wrote, like `out/publish/bundle`.

    Returns:
        The bundle. Tables and models are read when they are first asked for.

    Raises:
        BundleError: A file is missing, added or altered, or the format or hash contract is another one.

    Example:
        >>> bundle = load_bundle("out/publish/bundle")  # doctest: +SKIP
        >>> bundle.semantic_ids(["a red bicycle"]).shape  # doctest: +SKIP
        (1, 3)
    """
    directory = Path(directory)
    path = directory / _MANIFEST
    if not path.is_file():
        raise BundleError(f"{path} is missing: {directory} is not a bundle; name a directory like out/publish/bundle")
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{path}: {error}") from error
    if manifest.format != FORMAT:
        raise BundleError(f"{path}: format {manifest.format}, this release reads {FORMAT}; publish the bundle anew")
    if not 1 <= manifest.canonical <= canonical.VERSION:
        known = f"this release reads 1 to {canonical.VERSION}"
        raise BundleError(
            f"{path}: canonical form {manifest.canonical}, {known}; open it with the release that wrote it"
        )
    if _identity(manifest) != manifest.id:
        raise BundleError(f"{path}: the manifest was altered: its content is {_identity(manifest)}, not {manifest.id}")
    found = file_hashes(directory)
    for name in sorted(found.keys() | manifest.files.keys()):
        if found.get(name) != manifest.files.get(name):
            problem = "is missing" if name not in found else "is not in the manifest or was altered (sha256 differs)"
            raise BundleError(f"{directory / name} {problem}; fetch the bundle {manifest.id} again")
    spec = msgspec.convert(manifest.hash, HashSpec)
    bundle = Bundle(directory, manifest)
    if spec != bundle.schema.hash_spec:
        raise BundleError(f"{path}: hash contract {spec} does not fit the schema's {bundle.schema.hash_spec}")
    return bundle


def _portable(dataset: Dataset) -> dict[str, Any]:
    """The descriptor without the place it lies in, so that equal bundles have equal ids on any machine."""
    return dataset.model_dump(mode="json") | {"source": dataset.source.name}


def file_hashes(directory: Path) -> dict[str, str]:
    """The sha256 of every file below a directory but its manifest, by relative path."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path != directory / _MANIFEST
    }


def _identity(manifest: Manifest) -> str:
    content = msgspec.json.encode(msgspec.structs.replace(manifest, id=""), order="sorted")
    return f"b-{hashlib.sha256(content).hexdigest()[:16]}"


def _same(what: str, found: str, expected: str) -> None:
    if found != expected:
        raise BundleError(f"{what}: the files give {found}, the manifest names {expected}; fetch the bundle again")
