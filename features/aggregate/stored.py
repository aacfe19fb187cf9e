"""Aggregates in a file: the plan and, by group, the keys and the rows of their state."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from features.aggregate.aggregator import Aggregator
from features.aggregate.key_map import KeyMap
from features.aggregate.plan import AggregatePlan
from features.errors import BundleError

_PLAN, _PREFIX = "plan", "aggregates."
_WATERMARK = f"{_PREFIX}watermark"


def aggregate_arrays(aggregator: Aggregator) -> dict[str, NDArray[np.int64]]:
    """Returns copies of the state as arrays by name: each group's keys, as int64, and rows, and the watermark."""
    found = {_WATERMARK: np.array([aggregator.watermark], dtype=np.int64)}
    for number, state in enumerate(aggregator.states.values()):
        found[f"{_PREFIX}{number}.keys"] = state.keys.copy().view(np.int64)
        found[f"{_PREFIX}{number}.rows"] = state.rows.copy()
    for number, pairs in enumerate(aggregator.pairs.values()):
        found[f"{_PREFIX}pairs.{number}"] = pairs.keys().view(np.int64)
    return found


def restore_aggregates(aggregator: Aggregator, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Sets the state of an aggregator to arrays that `aggregate_arrays` returned.

    Raises:
        BundleError: The arrays are of another plan.
    """
    for number, (by, state) in enumerate(aggregator.states.items()):
        keys, rows = (arrays.get(f"{_PREFIX}{number}.{name}") for name in ("keys", "rows"))
        if keys is None or rows is None or rows.shape != (len(keys), state.width):
            raise BundleError(f"aggregates by {', '.join(by)}: the state does not fit the plan")
        fresh = state.emptied()
        fresh.put(keys.view(np.uint64), rows)
        aggregator.states[by] = fresh
    for number, of in enumerate(aggregator.pairs):
        aggregator.pairs[of] = KeyMap()
        aggregator.pairs[of].put(arrays[f"{_PREFIX}pairs.{number}"].view(np.uint64))
    if aggregator.plan.columns:
        aggregator.watermark = int(arrays[_WATERMARK][0])


def save_aggregates(aggregator: Aggregator, path: Path) -> None:
    """Writes the plan and the state of an aggregator."""
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
