"""A bundle: a released model in one directory, identified by a hash of the content.

    manifest.json            format, dataset descriptor, schema, hash contract, ids of encoder and codebook, sha256s
    table.safetensors        weight (R, D) float32, accumulator (R,) float32
    table/rows-00000.safetensors, …  instead of it the rows in ranges; only if several processes trained the ranker
    admission.safetensors    cells of the sketch of the values' sightings, uint8
    network.safetensors      the dense part
    encoder/  codebook/  tokens/     only if items have content
    views/NAME/              steps from the encoder's vectors to those of a view; only if a view was tuned
    concepts/NAME/  aspects/NAME/    heads that name concepts, and spaces of aspects; only if they were fitted
    profile.json             distributions of features and score in training; not in bundles of earlier releases
    aggregates.safetensors   plan and state of the aggregates; only if the schema has any
    map/                     map to the vectors that codebook and ranker read; only after a re-embedding
    correction/  labelled.parquet    correction of new items, and the users' labelled items; only if fitted
    towers/                          the two towers of retrieval; only if a run trained them
    consumed.parquet                 users' consumed items; only if a policy leaves them out
    users.parquet  items.parquet  history.parquet     entities, features, vectors, Semantic IDs, histories

A bundle has no pickle. It is written to a temporary directory and renamed. Loading checks the sha256 of every file.
Bundles with equal content have equal ids, on every machine and at every time.
"""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from features.content.chain import load_view
from features.content.given.encoder import given_in, with_vectors
from features.content.kinds import load_encoder
from features.dataset.descriptor import CHOICES, Dataset
from features.device import DeviceChoice, resolve
from features.durable import write_directory
from features.errors import BundleError
from features.hashing import HashSpec
from features.jobs.shard import write_parquet
from features.value import canonical
from features.value.forgotten import Forgotten
from models.bundle.contents import (
    AGGREGATES,
    ASPECTS,
    CONCEPTS,
    CONSUMED,
    CORRECTION,
    FORGOTTEN,
    LABELLED_ITEMS,
    TOWERS,
    VIEWS,
    BundleContents,
    LogPosition,
    Manifest,
    Training,
)
from models.bundle.embedding import EmbeddingClient, Value, csv_sources
from models.bundle.local import LocalRanker
from models.encoder.meaning.aspects import load_aspect
from models.encoder.meaning.concepts import ConceptHead, load_concepts
from models.encoder.meaning.neighbours import load_correction
from models.networks.kinds import DEFAULT
from models.profile import profile
from models.profile.profile import TrainingProfile, write_profile
from models.ranker.network import Ranker
from models.semantic_id.codebook import kinds as codebooks
from models.semantic_id.tokens import load_tokenizer
from models.table.admission import Sketch
from models.table.row_files import copy_rows, row_files, write_rows
from models.table.schema import Schema
from models.towers.stored import load_towers, save_towers, towers_id

__all__ = [
    "FORMAT",
    "Bundle",
    "BundleParts",
    "LogPosition",
    "Manifest",
    "Training",
    "file_hashes",
    "load_bundle",
    "write_bundle",
    "write_manifest",
]

FORMAT, OLDEST_FORMAT = 9, 3
"""Format 9 has the two towers of retrieval, format 8 several tasks, format 7 a network of another kind than the
default, format 6 the table in ranges of rows, and format 5 a correction. A bundle is written in the lowest format that
holds its parts, which is 4 for a bundle without any of these. Formats 3 to 9 are read."""
_TASKS_FORMAT, _KIND_FORMAT, _RANGES_FORMAT, _CORRECTION_FORMAT, _PLAIN_FORMAT = 8, 7, 6, 5, 4
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class BundleParts:
    """Parts of a bundle.

    Attributes:
        dataset: Descriptor of the training data.
        schema: Schema of the ranker's input.
        ranker: Trained ranker.
        sketch: Sketch of the values' sightings in training.
        training: State with which the stream continues the training.
        users, items: Dimensions of the frame. Items have a column `train_positives`, the number of positive events in
            training.
        history: Kept visits of all users, `user_id`, `item_id` and `time`, of each user oldest first.
        metrics: Measurements on the test part.
        encoder, codebook, tokens: Directories to copy, or None.
        views: Directories of views to copy, by name. Each view reads the encoder's vectors.
        concepts, aspects: Directories of heads of concepts and of aspects to copy, by name, on the same vectors.
        aggregates: State of the schema's aggregates after the last event before the test part, a file to copy; None if
            the schema has none.
        rows: Directory whose row files are copied in place of the ranker's table; see `models.table.row_files`. None
            writes the ranker's table into one file.
        correction: Directory of the correction by neighbours to copy, on the encoder's vectors; None without one.
        labelled: Users' last labelled items, as `BundleContents.labelled`; only with a correction.
        towers: Directory of the two towers of retrieval to copy, whose rows the table has; None without them.
        consumed: Users' consumed items, as `BundleContents.consumed`; only if a policy leaves them out.
        trained_until, positions, choices: As in `Manifest`.
        device: Description of the device that trained the ranker, see `features.device.Device.about`.
        profile: Distributions of features and score in training. None: the bundle has none.
        forgotten: Requests to forget users whose older events are left out.
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
    views: Mapping[str, Path] = field(default_factory=dict)
    concepts: Mapping[str, Path] = field(default_factory=dict)
    aspects: Mapping[str, Path] = field(default_factory=dict)
    aggregates: Path | None = None
    rows: Path | None = None
    correction: Path | None = None
    labelled: pl.DataFrame | None = None
    towers: Path | None = None
    consumed: pl.DataFrame | None = None
    trained_until: int | None = None
    positions: Sequence[LogPosition] = ()
    choices: Mapping[str, Any] = field(default_factory=dict)
    device: Mapping[str, str] = field(default_factory=dict)
    profile: TrainingProfile | None = None
    forgotten: Sequence[Forgotten] = ()


@dataclass(frozen=True)
class Bundle(BundleContents):
    """A released model. Computes embeddings, Semantic IDs and scores without a server or a store.

    The results are those of the bundle as published. Later updates of a stream are in the online store alone.
    """

    def embed(self, feature: str, values: Sequence[Value | Sequence[Value]]) -> NDArray[np.float32]:
        """Returns the embeddings of a feature's values, read from the unified table.

        Args:
            feature: Name of a feature of the schema, like `item_id`.
            values: N values or lists of values. Lists are pooled as the feature pools them.

        Returns:
            (N, D) float32. D is the width of a table row times the feature's lookups. The embedding is zero if a value
            is missing, was seen too rarely, or is unknown to an exact feature.

        Raises:
            EventError: The bundle has no such feature, or a value is neither a scalar nor a list of scalars.

        Example:
            >>> bundle = load_bundle("out/publish/bundle")
            >>> bundle.embed("item_id", ["a00001", "a00002"]).shape
            (2, 16)
        """
        return self._embeddings.lookup(feature, values)

    def semantic_ids(
        self, texts: Sequence[str] = (), *, vectors: Mapping[str, NDArray[np.floating]] | None = None
    ) -> NDArray[np.uint16]:
        """Assigns Semantic IDs to texts by the bundle's encoder and codebook.

        Args:
            texts: Content of N items, joined as `[items] text` of the descriptor joins the columns. None is needed if
                the encoder reads vectors alone.
            vectors: Vectors (N, D) of the items, by their names in `[items] vectors`. None if the encoder reads text
                alone.

        Returns:
            Codes (N, Q) uint16, coarse to fine.

        Raises:
            BundleError: The bundle was trained on items without content, or its encoder reads vectors that are not
                given.
            DatasetError: A vector has another width, a value that is not finite, or no length.

        Example:
            >>> bundle = load_bundle("out/publish/bundle")
            >>> bundle.semantic_ids(["a red bicycle"])
            array([[...]], dtype=uint16)
        """
        if self.codebook is None:
            raise BundleError(
                f"bundle {self.id} has no Semantic IDs: its items have no text; name [items] text and run again"
            )
        return self.encode_items(self._contents(texts, vectors or {})).codes

    def _contents(self, texts: Sequence[str], vectors: Mapping[str, NDArray[np.floating]]) -> Sequence[str]:
        given = given_in(self.encoder)
        if missing := [one for one in given if one.name not in vectors]:
            raise BundleError(
                f"bundle {self.id} reads vectors.{missing[0].name} of space {missing[0].space!r}, which has no text "
                f"encoder; give vectors={{{missing[0].name!r}: ...}}"
            )
        return with_vectors(texts, {one.name: one.checked(vectors[one.name]) for one in given}) if given else texts

    def rank(
        self, user: str, items: Sequence[str | Mapping[str, Any]], *, context: Mapping[str, Any] | None = None
    ) -> NDArray[np.float32]:
        """Scores items for a user as a server of this bundle does, with the published table, network and history.

        Args:
            user: Id of the user. An unknown user has no history and no attributes.
            items: Ids of N items, or mappings with `item_id` and the candidate's fields. An unknown item is scored by
                its id alone.
            context: Values of the events' own columns, by column. Absent columns have their default, or are null.

        Returns:
            (N,) float32 probabilities of a positive event, in the order of `items`; of several tasks, the scores of
            the descriptor's formula.

        Raises:
            EventError: `context` or a candidate names a column that the dataset does not have, or a value is of a
                wrong type.
            BundleError: The bundle was trained on events without items.
            AnswerError: A score is not a number.

        Example:
            >>> bundle = load_bundle("out/publish/bundle")
            >>> bundle.rank("r00001", ["a00001", "a00002"])
            array([0..., 0...], dtype=float32)
        """
        return self._ranker.rank(user, items, context or {})

    @cached_property
    def _embeddings(self) -> EmbeddingClient:
        table = self.rows()
        return EmbeddingClient(
            self.schema,
            self.admission(),
            table.__getitem__,
            version=self.canonical,
            of_csv=csv_sources(self.dataset),
        )

    @cached_property
    def _ranker(self) -> LocalRanker:
        return LocalRanker(self)


def write_bundle(parts: BundleParts, destination: Path) -> Bundle:
    """Writes a bundle durably.

    Args:
        parts: Content of the bundle.
        destination: Directory to create.

    Returns:
        The bundle, opened from `destination`.
    """

    def fill(directory: Path) -> None:
        for name, source in (("encoder", parts.encoder), ("codebook", parts.codebook), ("tokens", parts.tokens)):
            if source is not None:
                shutil.copytree(source, directory / name)
        for folder, saved in ((VIEWS, parts.views), (CONCEPTS, parts.concepts), (ASPECTS, parts.aspects)):
            for name, source in saved.items():
                shutil.copytree(source, directory / folder / name)
        if parts.aggregates is not None:
            shutil.copy(parts.aggregates, directory / AGGREGATES)
        if parts.correction is not None:
            assert parts.labelled is not None
            shutil.copytree(parts.correction, directory / CORRECTION)
            write_parquet(parts.labelled, directory / LABELLED_ITEMS)
        if parts.towers is not None:
            (directory / TOWERS).mkdir()
            save_towers(directory / TOWERS, load_towers(parts.towers).at(parts.schema.rows - parts.schema.reserved))
        if parts.consumed is not None:
            write_parquet(parts.consumed, directory / CONSUMED)
        if parts.forgotten:
            lines = b"".join(msgspec.json.encode(request) + b"\n" for request in parts.forgotten)
            (directory / FORGOTTEN).write_bytes(lines)
        if parts.profile is not None:
            write_profile(parts.profile, directory / profile.FILE)
        if parts.rows is not None:
            copy_rows(parts.rows, directory)
        else:
            write_rows(directory, parts.ranker.table.weight, parts.ranker.table.accumulator)
        save_file({"cells": torch.from_numpy(parts.sketch.cells)}, directory / "admission.safetensors")
        save_file(dict(parts.ranker.network.state_dict()), directory / "network.safetensors")
        for name, frame in (("users", parts.users), ("items", parts.items), ("history", parts.history)):
            write_parquet(frame, directory / f"{name}.parquet")
        encoder = load_encoder(parts.encoder).id if parts.encoder else None
        codebook = codebooks.load(parts.codebook).id if parts.codebook else None
        tokens = load_tokenizer(parts.tokens).id if parts.tokens else None
        manifest = Manifest(
            id="",
            format=_format(directory, parts),
            dataset=_portable(parts.dataset, parts.encoder),
            schema=parts.schema.to_json(),
            hash=asdict(parts.schema.hash_spec),
            network=parts.ranker.network.config.to_json(),
            training=parts.training,
            encoder=encoder,
            codebook=codebook,
            tokens=tokens,
            metrics=parts.metrics,
            files={},
            canonical=canonical.VERSION,
            trained_until=parts.trained_until,
            positions=list(parts.positions),
            choices=dict(parts.choices),
            views=_view_ids(parts.views, encoder),
            concepts=_checked({name: load_concepts(path) for name, path in parts.concepts.items()}, encoder),
            aspects={name: load_aspect(path).id for name, path in parts.aspects.items()},
            correction=_correction_id(parts.correction, encoder),
            towers=towers_id(directory / TOWERS) if parts.towers is not None else "",
            # A processor is not named: the bits are the same on all, and equal bundles must have equal ids.
            device=dict(parts.device) if "card" in parts.device else {},
        )
        write_manifest(directory, manifest)

    write_directory(destination, fill)
    return load_bundle(destination)


def _format(directory: Path, parts: BundleParts) -> int:
    """Returns the lowest format that holds the parts of a bundle whose rows are written."""
    if parts.towers is not None:
        return FORMAT
    if parts.ranker.network.tasks is not None:
        return _TASKS_FORMAT
    if parts.ranker.network.config.kind != DEFAULT:
        return _KIND_FORMAT
    if len(row_files(directory)) > 1:
        return _RANGES_FORMAT
    return _PLAIN_FORMAT if parts.correction is None else _CORRECTION_FORMAT


def load_bundle(directory: str | Path, *, device: DeviceChoice = "cpu") -> Bundle:
    """Opens a bundle and checks all its files.

    Args:
        directory: Directory that `tessera run` wrote, like `out/publish/bundle`.
        device: Device on which the codebook computes Semantic IDs: `cpu`, `cuda`, or `auto` for a GPU if torch can use
            one. The codes are the same on all. A bundle opens on each device, whichever trained it.

    Returns:
        The bundle. Tables and models are read on first use.

    Raises:
        BundleError: A file is missing, added or altered, or this release does not read the format or hash contract.
        DeviceError: `device` is `cuda`, and a part that a GPU needs is missing.

    Example:
        >>> bundle = load_bundle("out/publish/bundle")
        >>> bundle.items.columns[0], bundle.dataset.name
        ('item_id', 'synthetic')
    """
    directory = Path(directory)
    path = directory / _MANIFEST
    if not path.is_file():
        raise BundleError(f"{path} is missing: {directory} is not a bundle; name a directory like out/publish/bundle")
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{path}: {error}") from error
    if not OLDEST_FORMAT <= manifest.format <= FORMAT:
        known = f"this release reads {OLDEST_FORMAT} to {FORMAT}"
        raise BundleError(f"{path}: format {manifest.format}, {known}; publish the bundle again")
    if not 1 <= manifest.canonical <= canonical.VERSION:
        known = f"this release reads 1 to {canonical.VERSION}"
        raise BundleError(
            f"{path}: canonical form {manifest.canonical}, {known}; open it with the release that wrote it"
        )
    if _identity(manifest) != manifest.id:
        raise BundleError(f"{path}: the manifest was altered: its content is {_identity(manifest)}, not {manifest.id}")
    hashes = file_hashes(directory)
    for name in sorted(hashes.keys() | manifest.files.keys()):
        if hashes.get(name) != manifest.files.get(name):
            problem = "is missing" if name not in hashes else "is not in the manifest or was altered (sha256 differs)"
            raise BundleError(f"{directory / name} {problem}; fetch the bundle {manifest.id} again")
    spec = msgspec.convert(manifest.hash, HashSpec)
    bundle = Bundle(directory, manifest, resolve(device, fused=False))
    if spec != bundle.schema.hash_spec:
        raise BundleError(f"{path}: hash contract {spec} does not fit the schema's {bundle.schema.hash_spec}")
    return bundle


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Writes the manifest of a directory's files: as given, with the files' hashes and the id of the content."""
    hashed = msgspec.structs.replace(manifest, id="", files=file_hashes(directory))
    named = msgspec.structs.replace(hashed, id=_identity(hashed))
    (directory / _MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(named), indent=2) + b"\n")


def _view_ids(views: Mapping[str, Path], encoder: str | None) -> dict[str, str]:
    """Returns the ids of views by name. Raises BundleError if a view does not read the encoder's vectors."""
    loaded = {name: load_view(directory) for name, directory in views.items()}
    for name, view in loaded.items():
        if view.source != encoder:
            raise BundleError(
                f"{views[name]}: view {name} reads vectors of {view.source}, the items' are of {encoder}; tune it again"
            )
    return {name: view.id for name, view in loaded.items()}


def _checked(heads: Mapping[str, ConceptHead], encoder: str | None) -> dict[str, str]:
    """Returns the ids of heads by name. Raises BundleError if a head does not read the encoder's vectors."""
    for name, head in heads.items():
        if head.source != encoder:
            raise BundleError(
                f"concepts {name} read vectors of {head.source}, the items' are of {encoder}; fit the concepts again"
            )
    return {name: head.id for name, head in heads.items()}


def _correction_id(directory: Path | None, encoder: str | None) -> str:
    """Returns the id of a correction, "" without one. Raises BundleError if it does not read the encoder's vectors."""
    if directory is None:
        return ""
    correction = load_correction(directory)
    if correction.space != encoder:
        raise BundleError(
            f"{directory}: reads vectors of {correction.space}, the items' are of {encoder}; fit it again"
        )
    return correction.id


def _portable(dataset: Dataset, encoder: Path | None) -> dict[str, Any]:
    """Returns the descriptor without its directory, so that equal bundles have equal ids on all machines.

    The widths of vectors stand in it, so that a message is checked without the encoder.
    """
    if encoder is not None and dataset.items is not None and dataset.items.vectors:
        widths = {one.name: one.dim for one in given_in(load_encoder(encoder))}
        dataset = dataset.model_copy(update={"items": dataset.items.with_widths(widths)})
    return dataset.model_dump(mode="json", exclude=set(CHOICES)) | {"source": dataset.source.name}


def file_hashes(directory: Path) -> dict[str, str]:
    """Returns the sha256 of every file below a directory except the manifest, by relative path."""
    return {
        str(path.relative_to(directory)): _sha256(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path != directory / _MANIFEST
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _identity(manifest: Manifest) -> str:
    content = msgspec.json.encode(msgspec.structs.replace(manifest, id=""), order="sorted")
    return f"b-{hashlib.sha256(content).hexdigest()[:16]}"
