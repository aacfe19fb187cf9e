"""Layouts of one table: the rows that the fields' values read, as the multiplexing paper compares them.

Shape letters: F fields, N values of all fields, c chunks, R rows.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from features.hashing import HashSpec
from models.compressed.fields import Fields

Layout = Literal["collisionless", "hashing per feature", "hashing in equal parts", "unified"]


def rows_of(fields: Fields, layout: Layout, *, rows: int, chunks: int = 1, seed: int = 0) -> NDArray[np.int64]:
    """Returns the rows (N, c) int64 in [0, R) of every value.

    Args:
        layout: One row per value; a range of rows for each field that only its own values are hashed into, sized by its
            share of the values or the same for every field; or one range for all.
        rows: R; a collisionless layout needs N.
        chunks: c lookups of each value.
        seed: Salt of the hash, so that collisions differ from seed to seed.

    Raises:
        ValueError: There are fewer rows than the layout needs.
    """
    if layout == "collisionless":
        if rows < fields.values:
            raise ValueError(f"rows: a collisionless layout needs {fields.values}, got {rows}")
        return np.repeat(np.arange(fields.values)[:, None], chunks, axis=1)
    if rows < len(fields.names):
        raise ValueError(f"rows: expected one a field at least, {len(fields.names)}, got {rows}")
    found = np.zeros((fields.values, chunks), dtype=np.int64)
    sizes = fields.sizes if layout != "hashing in equal parts" else np.ones_like(fields.sizes)
    share = np.maximum(1, rows * sizes // sizes.sum())
    share[np.argmax(share)] -= max(0, int(share.sum()) - rows)
    first = 0
    for name, start, stop, own in zip(fields.names, fields.offsets, fields.offsets[1:], share, strict=False):
        spec = HashSpec(rows=rows if layout == "unified" else int(own))
        found[start:stop] = first + spec.lookup(f"{seed}/{name}", chunks, fields.fingerprints[start:stop])
        first += int(own) if layout != "unified" else 0
    return found
