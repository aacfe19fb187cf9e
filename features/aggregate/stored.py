"""Aggregates in a file: the plan and, by group, the keys and the rows of their state.

Format 2 has an owner for each pair of a distinct count. A state of format 1 is read without owners, and is otherwise
the same. A plan without a distinct count is written in format 1.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from features.aggregate.aggregator import Aggregator
from features.aggregate.plan import AggregatePlan
from features.errors import BundleError

FORMAT: Final = 2
_PLAN, _PREFIX = "plan", "aggregates."
_FORMAT, _WATERMARK = f"{_PREFIX}format", f"{_PREFIX}watermark"
OWNERS: Final = f"{_PREFIX}owners."
"""Opening of the names of arrays of owners."""


def aggregate_arrays(aggregator: Aggregator) -> dict[str, NDArray[np.int64]]:
    """Returns copies of the state as arrays by name, keys as int64.

    The arrays are each group's keys and rows, the pairs of each distinct count and their owners, the watermark, and the
    format, which format 1 lacks.
    """
    found = {_WATERMARK: np.array([aggregator.watermark], dtype=np.int64)}
    if aggregator.pairs:
        found[_FORMAT] = np.array([FORMAT], dtype=np.int64)
    for number, state in enumerate(aggregator.states.values()):
        found[f"{_PREFIX}{number}.keys"] = state.keys.copy().view(np.int64)
        found[f"{_PREFIX}{number}.rows"] = state.rows.copy()
    for number, pairs in enumerate(aggregator.pairs.values()):
        found[f"{_PREFIX}pairs.{number}"] = pairs.hashes.view(np.int64)
        found[f"{OWNERS}{number}"] = pairs.owners.copy().view(np.int64)
    return found


def restore_aggregates(aggregator: Aggregator, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Sets the state of an aggregator to arrays that `aggregate_arrays` returned.

    Raises:
        BundleError: The arrays are of another plan, or of a newer format.
    """
    if (given := int(arrays.get(_FORMAT, [1])[0])) > FORMAT:
        raise BundleError(f"aggregates: expected format 1 to {FORMAT}, got {given}; update Tessera to read them")
    for number, (by, state) in enumerate(aggregator.states.items()):
        keys, rows = (arrays.get(f"{_PREFIX}{number}.{name}") for name in ("keys", "rows"))
        if keys is None or rows is None or rows.shape != (len(keys), state.width):
            raise BundleError(f"aggregates by {', '.join(by)}: the state does not fit the plan")
        fresh = state.emptied()
        fresh.put(keys.view(np.uint64), rows)
        aggregator.states[by] = fresh
    for number, pairs in enumerate(aggregator.pairs.values()):
        hashes, owners = arrays.get(f"{_PREFIX}pairs.{number}"), arrays.get(f"{OWNERS}{number}")
        if hashes is None or (owners is not None and len(owners) != len(hashes)):
            raise BundleError(f"aggregates, distinct count {number}: the state does not fit the plan")
        pairs.restore(hashes.view(np.uint64), None if owners is None else owners.view(np.uint64))
    if aggregator.plan.columns:
        aggregator.watermark = int(arrays[_WATERMARK][0])


def save_aggregates(aggregator: Aggregator, path: Path) -> None:
    """Writes the plan and the state of an aggregator."""
    # One entry alone: safetensors writes several in any order, and the bytes decide a bundle's id.
    save_file(aggregate_arrays(aggregator), path, metadata={_PLAN: msgspec.json.encode(aggregator.plan).decode()})


def read_plan(path: Path) -> AggregatePlan:
    """Reads the plan of a file that `save_aggregates` wrote.

    Raises:
        BundleError: The file is missing or has other content.
    """
    try:
        with safe_open(path, "np") as opened:
            metadata = opened.metadata() or {}
        return msgspec.json.decode(metadata.get(_PLAN, ""), type=AggregatePlan)
    except (OSError, SafetensorError, msgspec.DecodeError) as error:
        raise BundleError(f"{path}: no aggregates: {error}; run the stage `frame` again") from error


def load_aggregates(path: Path) -> Aggregator:
    """Reads an aggregator that `save_aggregates` wrote.

    Raises:
        BundleError: The file is missing or has other content.
    """
    found = Aggregator(read_plan(path))
    try:
        restore_aggregates(found, load_file(path))
    except BundleError as error:
        raise BundleError(f"{path}: {error}; run the stage `frame` again") from error
    return found
