"""Inputs that a library's networks can read too, as a schema for Tessera and as arrays for the peer.

Both read one vector a field. The history is that of the item ids, since a peer's sequence has one value a visit. The
networks over a sequence get no numbers, since torch-rechub's take none.

Shape letters: N examples, L history length, M most values of a field.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.aggregate.plan import NOTHING
from features.frame import Frame
from models.networks.kinds import reads_sequence
from models.ranker.loading import LoadedBlocks, dimensions
from models.table.admission import Admission
from models.table.batch import Batch
from models.table.default_schema import distinct_values
from models.table.schema import Feature, Schema
from tessera.bench.peers.ctr import save

PARTS = ("train", "validation", "test")
_ITEM, _PAST = "item_id", "history.item_id"


def shared_schema(schema: Schema, kind: str) -> Schema:
    """Returns the part of a schema that a kind of the peer can read. A width of several lookups becomes one."""
    sequence = reads_sequence(kind)
    past = Feature(_PAST, "history", _ITEM, _ITEM, 1, "attention" if sequence else "mean")
    own = [replace(feature, chunks=1) for feature in schema.features if feature.of != "history"]
    return replace(
        schema,
        features=(*own, past),
        numeric=() if sequence else schema.numeric,
        aggregates=NOTHING if sequence else schema.aggregates,
        content=0,
    ).served


def store(schema: Schema, frame: Frame, directory: Path) -> None:
    """Writes the inputs of a shared schema as arrays: values numbered from 1, 0 for none.

    Args:
        schema: See `shared_schema`.
        frame: Frame with the parts.
        directory: Gets `shapes.json`, `schema.json`, and a folder of arrays for each part.
    """
    known = _vocabularies(schema, frame)
    exact = [replace(feature, vocabulary=tuple(known[feature.salt])) for feature in schema.features]
    exact[-1] = replace(exact[-1], pooling="attention")
    rows = sum(len(words) for words in known.values())
    numbered = replace(schema, features=tuple(exact), rows=rows, admission=0)
    blocks = {part: frame.blocks(part) for part in PARTS}
    loaded = LoadedBlocks(dimensions(numbered, frame, Admission.off()), blocks)
    several: set[str] = set()
    for part in PARTS:
        found = []
        for number in range(len(blocks[part])):
            source, examples = loaded.load(part, number)
            found.append(_arrays(numbered, source.batch(examples)))
        whole = {name: _joined([one[name] for one in found]) for name in found[0]}
        several |= {name for name, array in whole.items() if array.ndim > 1}
        save(directory / part, whole)
    fields = [
        {
            "name": _plain(feature.name),
            "rows": len(known[feature.salt]) + 1,
            "pooling": feature.pooling if _plain(feature.name) in several else "",
        }
        for feature in schema.features[:-1]
    ]
    shapes = {"dim": schema.dim, "fields": fields, "item": _ITEM, "numbers": len(schema.numeric)}
    (directory / "shapes.json").write_text(json.dumps(shapes))
    (directory / "schema.json").write_text(json.dumps(schema.to_json()))


def _vocabularies(schema: Schema, frame: Frame) -> dict[str, list[str]]:
    tables: dict[str, Callable[[str], Iterable[pl.DataFrame]]] = {
        "user": lambda column: [frame.users],
        "item": lambda column: [frame.items],
        "event": lambda column: frame.all_blocks().frames(column),
    }
    return {
        feature.salt: distinct_values(table[feature.column] for table in tables[feature.of](feature.column))
        for feature in schema.features
        if feature.of in tables
    }


def _plain(name: str) -> str:
    """Name of a feature as a peer's module may have it."""
    return name.replace(".", "_")


def _arrays(schema: Schema, batch: Batch) -> dict[str, NDArray[np.generic]]:
    """Returns the arrays of a batch of exact features, whose lookups are one a feature, and L for the history."""
    lengths = batch.lengths.numpy().reshape(len(schema.keys), batch.size)
    ends = np.concatenate([[0], np.cumsum(lengths.sum(axis=1))])
    *own, past = schema.features
    salts = [feature.salt for feature in own] + [past.salt] * schema.slots(past)
    found = []
    for lookup, (salt, bags) in enumerate(zip(salts, lengths, strict=True)):
        start, _ = schema.exact_region(salt)
        padded = np.zeros((batch.size, max(1, int(bags.max(initial=0)))), dtype=np.int32)
        padded[np.arange(padded.shape[1]) < bags[:, None]] = batch.values[ends[lookup] : ends[lookup + 1]] - start + 1
        found.append(padded)
    arrays: dict[str, NDArray[np.generic]] = {
        _plain(feature.name): one for feature, one in zip(own, found, strict=False)
    }
    arrays["history"] = np.concatenate(found[len(own) :], axis=1)
    if schema.numeric:
        arrays["numbers"] = batch.numeric.numpy()
    return arrays | {"labels": batch.labels.numpy()[:, None]}


def _joined(parts: list[NDArray[np.generic]]) -> NDArray[np.generic]:
    """Joins arrays (N, M) of blocks, padded to the widest M; without the last axis if M is 1."""
    width = max(part.shape[1] for part in parts)
    whole = np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in parts])
    return whole[:, 0] if width == 1 else whole
