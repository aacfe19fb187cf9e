"""The sample that encoders and codebooks are fitted on: the items with the lowest hash of their id.

So time and memory of a fit are bounded at any size of the catalogue. The sample depends on the set of ids alone: the
order of rows, shards, the seed and the machine do not change it. An append replaces few of its items.
"""

from collections.abc import Iterable

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.hashing import fingerprint, value_keys

MOST_ITEMS = 1 << 20
"""Largest number of items that an encoder or a codebook is fitted on. A smaller catalogue is its own sample."""
_SALT = "fit sample"
_BLOCK = 1 << 16


def sample_rows(ids: pl.Series) -> NDArray[np.int64]:
    """Returns the rows of the sampled items, ascending: all rows if there are at most `MOST_ITEMS`.

    Args:
        ids: (N,) String, distinct ids of the catalogue.
    """
    if len(ids) <= MOST_ITEMS:
        return np.arange(len(ids))
    keys = np.concatenate([_keys(ids.slice(start, _BLOCK)) for start in range(0, len(ids), _BLOCK)])
    bound = np.partition(keys, MOST_ITEMS - 1)[MOST_ITEMS - 1]
    chosen = np.flatnonzero(keys < bound)
    # Two ids may share the highest key of the sample; then the lower id comes first.
    tied = np.flatnonzero(keys == bound)
    tied = tied[ids[tied].arg_sort().to_numpy()][: MOST_ITEMS - len(chosen)]
    return np.sort(np.concatenate([chosen, tied]))


def take_rows(frames: Iterable[pl.DataFrame], rows: NDArray[np.int64]) -> pl.DataFrame:
    """Returns some rows of frames that follow each other, such as a catalogue's shards; only these rows are kept.

    Args:
        frames: At least one frame; each is released before the next is read.
        rows: Rows over all frames, ascending.
    """
    parts, start = [], 0
    for frame in frames:
        first, last = np.searchsorted(rows, [start, start + frame.height])
        parts.append(frame if last - first == frame.height else frame[rows[first:last] - start])
        start += frame.height
    return pl.concat(parts)


def _keys(ids: pl.Series) -> NDArray[np.uint64]:
    return value_keys(_SALT, fingerprint(ids.to_list()))
