"""Rows of hashed values of all fields. They are not stored, since the hash contract recomputes them.

Shape letters: F fields, N values of all fields, R rows, c lookups a value.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from features.hashing import HashSpec
from models.compressed.fields import Fields


def shared_rows(fields: Fields, rows: int, lookups: int, *, salt: str = "") -> Tensor:
    """Returns rows (N, c) int64 in [0, R) of one table for all fields, each field hashed with its name as salt."""
    return _hashed(fields, np.full(len(fields.names), rows), np.zeros(len(fields.names), np.int64), lookups, salt)


def field_rows(fields: Fields, rows: NDArray[np.int64], lookups: int, *, salt: str = "") -> Tensor:
    """Returns rows (N, c) int64 in a table where field f has rows[f] rows of its own, one field after another."""
    return _hashed(fields, rows, np.cumsum(rows) - rows, lookups, salt)


def unsalted_rows(fields: Fields, rows: int) -> Tensor:
    """Returns rows (N, 1) int64 in [0, R) of the values alone: equal words of two fields get one row."""
    return torch.from_numpy(HashSpec(rows).lookup("", 1, fields.fingerprints))


def _hashed(fields: Fields, rows: NDArray[np.int64], starts: NDArray[np.int64], lookups: int, salt: str) -> Tensor:
    offsets = fields.offsets
    found = [
        HashSpec(int(rows[f])).lookup(salt + name, lookups, fields.fingerprints[offsets[f] : offsets[f + 1]])
        + starts[f]
        for f, name in enumerate(fields.names)
    ]
    return torch.from_numpy(np.concatenate(found))


def divide(total: int, sizes: NDArray[np.int64], *, least: int = 1) -> NDArray[np.int64]:
    """Divides rows among fields in proportion to their sizes, at least `least` each: (F,) int64 summing to `total`."""
    weight = np.maximum(sizes - least, 0).astype(np.float64)
    share = weight / weight.sum() if weight.any() else np.full(len(sizes), 1 / len(sizes))
    exact = (total - least * len(sizes)) * share
    found = np.floor(exact).astype(np.int64)
    left = total - least * len(sizes) - int(found.sum())
    found[np.argsort(found - exact, kind="stable")[:left]] += 1
    rows: NDArray[np.int64] = found + least
    return rows
