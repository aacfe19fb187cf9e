"""`tessera encoder reembed`: encodes a run's catalogue with the new encoder of an upgrade, the most urgent items first.

    OUT/maps/NAME/reembed/       texts in the order of urgency, and the vectors so far
    OUT/maps/NAME/reembedded/    vectors of the new space in the catalogue's order; appears when all items are done
    OUT/maps/NAME/bundle/        the published bundle under the new space; appears after that, if the run is published

An index holds one space at a time. Until `reembedded` appears the index is the old space's, and new items reach it
through the map. Then the index is the new space's. No score compares the two. A server changes its space by a swap
to the bundle.

Shape letters: N items, E dim of the new space.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.content.space_map import ENCODER, load_map
from features.durable import write_directory
from features.errors import DatasetError
from features.jobs.encode import encode_catalogue, vector_column
from features.jobs.engine import Engine
from features.jobs.shard import read_shards, shard_paths, write_shards
from features.lock import locked
from models.semantic_id.codebook import kinds as codebooks
from tessera.encoders.flip import write_reembedded
from tessera.encoders.upgrade import liked, map_directory, read_report

_WORK, _DONE = "reembed", "reembedded"
# A stop loses at most one shard of work.
SHARD_ITEMS = 256
"""Items of one shard of a re-embedding."""


@dataclass(frozen=True)
class Reembedding:
    """State of a re-embedding.

    Attributes:
        done, items: Items with a vector in the new space, and all items.
        space: Id of the space that the index holds now.
        bundle: Directory of the bundle in the new space; None until all items are done, or if the run has no bundle.
    """

    done: int
    items: int
    space: str
    bundle: Path | None = None

    @property
    def finished(self) -> bool:
        """True if the index holds the new space."""
        return self.done == self.items


def urgency(positives: NDArray[np.integer], errors: NDArray[np.floating]) -> NDArray[np.int64]:
    """Returns the rows (N,) of items in the order in which to encode them again: popular and badly mapped items first.

    Args:
        positives: (N,) positive events of each item.
        errors: (N,) expected cosine distance between an item's mapped vector and its old vector.
    """
    return np.argsort(-(positives + 1.0) * errors, kind="stable").astype(np.int64)


def reembed(
    run: Path,
    name: str,
    *,
    most: int | None = None,
    engine: Engine | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Reembedding:
    """Encodes items again, and flips the index when all are done. A stopped call is continued by the next call.

    Args:
        run: Directory of the run.
        name: Name of the upgrade's map.
        most: Most shards of `SHARD_ITEMS` items that this call encodes; None for all.
        engine: Engine of the job; by default this process.
        progress: Takes (shards done, shards) from time to time.

    Raises:
        TesseraError: The run has no such upgrade, another call holds the directory, or the encoder fails.
    """
    directory = map_directory(run, name)
    report = read_report(directory)
    found = load_map(directory)
    with locked(directory / _WORK, wait_s=0):
        if (directory / _DONE).is_dir():
            return _finished(run, name, report["items"], found.source)
        work = directory / _WORK
        shards = write_shards(_ordered_texts(run, report), work / "texts", rows=SHARD_ITEMS)
        vectors = work / "vectors"
        before = sum(path.name in {done.name for done in shard_paths(vectors)} for path in shards)
        chosen = shards if most is None else shards[: before + most]
        encode_catalogue(chosen, directory / ENCODER / "base-0", vectors, engine=engine, progress=progress)
        if len(chosen) < len(shards):
            return Reembedding(read_shards(vectors, ["item_id"]).height, report["items"], found.target)
        write_directory(directory / _DONE, lambda place: _in_catalogue_order(run, vectors, place))
        return _finished(run, name, report["items"], found.source)


def _finished(run: Path, name: str, items: int, space: str) -> Reembedding:
    """Returns the state of a finished re-embedding. Writes its bundle, which a stop may have left out."""
    bundle = write_reembedded(run, name, map_directory(run, name) / _DONE)
    return Reembedding(items, items, space, bundle.directory if bundle is not None else None)


def index_of(run: Path, name: str) -> tuple[str, pl.DataFrame]:
    """Returns the id of the space that the index of an upgrade holds, and its vectors, `item_id` and `vector`.

    The space is the old space until the re-embedding is finished, and the new space from then on.
    """
    directory = map_directory(run, name)
    found = load_map(directory)
    if (directory / _DONE).is_dir():
        return found.source, read_shards(directory / _DONE)
    return found.target, read_shards(run / "encode" / "vectors", ["item_id", "vector"])


def _ordered_texts(run: Path, report: dict[str, Any]) -> pl.DataFrame:
    """Returns ids and texts of all items, the most urgent first."""
    coded = read_shards(run / "assign" / "codes", ["item_id", "vector"])
    codebook = codebooks.load(run / "assign" / "codebook")
    first = codebook.encode(coded["vector"].to_numpy().astype(np.float32))[:, 0].astype(str)
    errors = np.array([report["errors"].get(code, report["errors"][""]) for code in first])
    items = coded["item_id"]
    positives = liked(run, items)[1] if (run / "frame").is_dir() else np.zeros(len(items), dtype=np.int64)
    texts = read_shards(run / "encode" / "texts")
    if texts["item_id"].to_list() != items.to_list():
        raise DatasetError(f"{run}: texts and codes name other items; run again into {run}")
    return texts[urgency(positives, errors)]


def _in_catalogue_order(run: Path, vectors: Path, place: Path) -> None:
    """Writes the vectors as shards that have the names and rows of the run's own."""
    encoded = read_shards(vectors)
    row_of = {item: row for row, item in enumerate(encoded["item_id"].to_list())}
    values = encoded["vector"].to_numpy()
    ids = read_shards(run / "encode" / "vectors", ["item_id"])
    ordered = values[[row_of[item] for item in ids["item_id"].to_list()]]
    write_shards(ids.with_columns(vector_column(ordered)), place)
