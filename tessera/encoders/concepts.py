"""Concepts of a run beside its declared ones: added from a few examples, listed, and erased by a view."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from features.content.chain import View
from features.content.kinds import load_encoder
from features.durable import write_directory
from features.errors import DatasetError
from features.jobs.shard import read_shards
from models.bundle.contents import CONCEPTS
from models.encoder.meaning import erase
from models.encoder.meaning.concept_fit import fit_examples
from models.encoder.meaning.concepts import ConceptHead, described, join, load_concepts
from models.encoder.meaning.declared import carriers
from models.ranker.loading import content_vectors
from tessera.encoders.tune import view_directory
from tessera.pipeline.artifact import read_frame
from tessera.pipeline.stage import finished_key

How = Literal["gated", "leace"]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _-]*")


def add_concept(run: Path, name: str, items: Sequence[str], texts: Sequence[str]) -> ConceptHead:
    """Fits a concept on examples and keeps it in the run; the next `publish` takes it into the bundle.

    Args:
        run: Directory of a finished run.
        name: Name of the concept.
        items: Ids of items that carry the concept.
        texts: Texts that describe the concept or an item that carries it.

    Raises:
        DatasetError: The name is taken, an item is unknown, or too few examples have content.
    """
    if not _NAME.fullmatch(name):
        raise DatasetError(f"concept {name!r}: a name is letters, digits, spaces, '_' and '-'; choose another name")
    if name in (names := [found for head in _heads(run).values() for found in head.names]):
        raise DatasetError(f"concept {name!r} exists already; choose another name than {', '.join(names)}")
    finished_key(run / "encode")
    encoder = load_encoder(run / "encode" / "encoder")
    shards = read_shards(run / "encode" / "vectors", ["item_id", "vector"])
    row_of = {item: row for row, item in enumerate(shards["item_id"].to_list())}
    unknown = [item for item in items if item not in row_of]
    if unknown:
        raise DatasetError(f"concept {name!r}: item {unknown[0]!r} is unknown; name items of the run's catalogue")
    vectors = shards["vector"].to_numpy()
    examples = np.concatenate([vectors[[row_of[item] for item in items]], encoder.encode(list(texts))])
    head = fit_examples(name, examples, vectors, source=encoder.id)
    write_directory(run / CONCEPTS / name.replace(" ", "-"), head.save)
    return head


def list_concepts(run: Path) -> list[dict[str, Any]]:
    """Returns a row for each concept of a run: the declared ones of its `meaning` stage, and those that were added.

    Raises:
        DatasetError: The directory holds no finished run.
    """
    finished_key(run / "encode")
    return [{"head": name} | row for name, head in _heads(run).items() for row in described(head)]


def erase_concept(run: Path, name: str, view: str, how: How = "gated") -> View:
    """Fits a view without a concept and keeps it in the run.

    Args:
        run: Directory of a finished run.
        name: Name of a concept of the run.
        view: Name of the view.
        how: `gated` removes the carriers' cluster means where the concept is predicted, for neighbours. `leace`
            changes every vector, for probes.

    Raises:
        DatasetError: The run has no such concept, nothing carries the concept, or the view exists.
    """
    directory = view_directory(run, view)
    finished_key(run / "encode")
    heads = _heads(run)
    if not heads:
        raise DatasetError(f"{run} has no concepts; declare concepts in [items], or add a concept from examples")
    head = join(list(heads.values()))
    head.row(name)
    items = read_frame(run / "frame").items
    vectors = content_vectors(items)
    present = np.any(vectors, axis=1)
    carried = carriers(head, name, items, vectors)[present]
    if how == "leace":
        step = erase.leace(vectors[present], carried, name=name)
    else:
        step = erase.cluster_means(vectors[present], carried, head.probe(name), name=name)
    made = View(view, head.source, (step,))
    write_directory(directory, made.save)
    return made


def _heads(run: Path) -> dict[str, ConceptHead]:
    folders = (run / "meaning" / CONCEPTS, run / CONCEPTS)
    return {
        path.name: load_concepts(path)
        for folder in folders
        if folder.is_dir()
        for path in sorted(folder.iterdir())
        if path.is_dir() and "." not in path.name
    }
