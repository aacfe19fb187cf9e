"""Categorical fields as dense ids: the data on which embedding methods are compared.

The protocol is that of the papers: user, item and every other single-valued categorical column, one value per field.
Columns of several values and histories are left out. A value absent from training is the field's unknown value, id 0.

Shape letters: F fields, N values of all fields together, E examples.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.dataset.descriptor import Dataset
from features.errors import DatasetError
from features.frame import Frame
from features.hashing import fingerprint
from models.table.admission import Admission
from models.table.batch import Entities
from models.table.default_schema import numeric_features
from models.table.schema import Schema

_UNKNOWN = "\x00unknown"


@dataclass(frozen=True)
class Part:
    """Examples of one part.

    Attributes:
        codes: (E, F) int64 in [0, N), numbered through all fields: column f lies in [offsets[f], offsets[f + 1]).
        numeric: (E, n) float32, standardised.
        labels: (E,) float32 in {0, 1}.
    """

    codes: NDArray[np.int64]
    numeric: NDArray[np.float32]
    labels: NDArray[np.float32]


@dataclass(frozen=True)
class Fields:
    """The fields of a dataset and its three parts.

    Attributes:
        names: Names of the fields.
        sizes: (F,) int64 values of each field, including the unknown value.
        fingerprints: (N,) uint64 of the values, by the hash contract.
        counts: (N,) int64 training examples that hold each value.
        parts: `train`, `validation`, `test`.
    """

    names: tuple[str, ...]
    sizes: NDArray[np.int64]
    fingerprints: NDArray[np.uint64]
    counts: NDArray[np.int64]
    parts: Mapping[str, Part]

    @property
    def offsets(self) -> NDArray[np.int64]:
        """(F + 1,) int64: start of each field's values."""
        return np.concatenate([[0], np.cumsum(self.sizes)])

    @cached_property
    def key(self) -> str:
        """Hash of all data that is learnt from."""
        found = sha256(repr(self.names).encode())
        for part in self.parts.values():
            for array in (part.codes, part.numeric, part.labels):
                found.update(np.ascontiguousarray(array).data)
        found.update(self.fingerprints.data)
        return found.hexdigest()

    @property
    def values(self) -> int:
        """N, the rows of the collisionless table."""
        return int(self.sizes.sum())


def fields(dataset: Dataset, frame: Frame) -> Fields:
    """Numbers the single-valued categorical columns of a frame.

    Raises:
        DatasetError: The frame has no such column.
    """
    columns = _columns(dataset, frame)
    if not columns:
        raise DatasetError(f"{dataset.source}: no single-valued categorical column; the comparison needs at least one")
    train = (frame.examples["split"] == "train").to_numpy()
    codes, sizes, prints = [], [], []
    start = 0
    for values in columns.values():
        known = values.filter(train).drop_nulls().unique(maintain_order=True).sort()
        local = values.replace_strict(known, np.arange(1, len(known) + 1), default=0, return_dtype=pl.Int64)
        codes.append(local.to_numpy() + start)
        sizes.append(len(known) + 1)
        prints.append(fingerprint([_UNKNOWN, *known.to_list()]))
        start += len(known) + 1
    matrix = np.stack(codes, axis=1)
    counts = np.bincount(matrix[train].ravel(), minlength=start)
    numeric = _numeric(dataset, frame)
    labels = frame.examples["label"].to_numpy().astype(np.float32)
    parts = {}
    for name in ("train", "validation", "test"):
        rows = (frame.examples["split"] == name).to_numpy()
        parts[name] = Part(matrix[rows], numeric[rows], labels[rows])
    return Fields(tuple(columns), np.array(sizes), np.concatenate(prints), counts, parts)


def with_noise(fields: Fields, values: int, *, seed: int) -> Fields:
    """Returns the fields with a field `noise` added, whose `values` values are random and independent of the label.

    The field represents a session or request id, which by its number of values would claim most of a table.
    """
    rng = np.random.default_rng([seed, values])
    parts, counts = {}, np.zeros(values, dtype=np.int64)
    for name, part in fields.parts.items():
        drawn = rng.integers(0, values, len(part.labels))
        counts += np.bincount(drawn, minlength=values) if name == "train" else 0
        codes = np.concatenate([part.codes, fields.values + drawn[:, None]], axis=1)
        parts[name] = Part(codes, part.numeric, part.labels)
    return Fields(
        (*fields.names, "noise"),
        np.append(fields.sizes, values),
        np.concatenate([fields.fingerprints, fingerprint([str(number) for number in range(values)])]),
        np.concatenate([fields.counts, counts]),
        parts,
    )


def _columns(dataset: Dataset, frame: Frame) -> dict[str, pl.Series]:
    """Maps each field's name to its value in every example."""
    found: dict[str, pl.Series] = {}
    sources = (
        ("user", frame.users, ("user_id", *(dataset.users.categorical_features if dataset.users else ()))),
        ("item", frame.items, ("item_id", *(dataset.items.categorical_features if dataset.items else ()))),
    )
    for of, table, names in sources:
        for name in names:
            if name in table.columns and table.height and table[name].dtype == pl.String:
                found[name if name.endswith("_id") else f"{of}.{name}"] = table[name].gather(frame.examples[of])
    for name in dataset.events.categorical_features:
        if frame.examples[name].dtype == pl.String:
            found[f"event.{name}"] = frame.examples[name]
    return found


def _numeric(dataset: Dataset, frame: Frame) -> NDArray[np.float32]:
    numeric = tuple(one for one in numeric_features(dataset, frame) if one.of != "history")
    schema = Schema((), numeric, rows=1, dim=4, history_length=1)
    tables = {
        "user": (frame.users, frame.examples["user"]),
        "item": (frame.items, frame.examples["item"]),
        "event": (frame.examples, None),
    }
    out = np.zeros((frame.examples.height, len(numeric)), dtype=np.float32)
    for of, (table, index) in tables.items():
        chosen = [place for place, one in enumerate(numeric) if one.of == of]
        if chosen:
            entities = Entities(schema, of, table, Admission.off())  # type: ignore[arg-type]
            at = np.arange(frame.examples.height) if index is None else index.to_numpy().astype(np.int64)
            out[:, chosen] = np.stack([entities.numeric(numeric[place].name, at) for place in chosen], axis=1)
    return out
