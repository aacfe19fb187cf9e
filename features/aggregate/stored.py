"""Aggregates in a file: the plan and, by group, the keys and the rows of their state."""

from pathlib import Path

import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from features.aggregate.aggregator import Aggregator
from features.aggregate.plan import Plan
from features.errors import BundleError

_PLAN, _WATERMARK = "plan", "watermark"


def save_aggregates(aggregator: Aggregator, path: Path) -> None:
    """Writes the plan and the state of an aggregator."""
    tensors = {}
    for number, state in enumerate(aggregator.states.values()):
        tensors[f"{number}.keys"] = np.ascontiguousarray(state.keys).view(np.int64)
        tensors[f"{number}.rows"] = np.ascontiguousarray(state.rows)
    tensors[_WATERMARK] = np.array([aggregator.watermark], dtype=np.int64)
    save_file(tensors, path, metadata={_PLAN: msgspec.json.encode(aggregator.plan).decode()})


def read_plan(path: Path) -> Plan:
    """Reads the plan of a file that `save_aggregates` wrote.

    Raises:
        BundleError: The file is missing or has other content.
    """
    try:
        with safe_open(path, "np") as opened:
            metadata = opened.metadata() or {}
        return msgspec.json.decode(metadata.get(_PLAN, ""), type=Plan)
    except (OSError, SafetensorError, msgspec.DecodeError) as error:
        raise BundleError(f"{path}: no aggregates: {error}; run the stage `frame` again") from error


def load_aggregates(path: Path) -> Aggregator:
    """Reads an aggregator that `save_aggregates` wrote.

    Raises:
        BundleError: The file is missing or has other content.
    """
    found = Aggregator(read_plan(path))
    tensors = load_file(path)
    found.watermark = int(tensors[_WATERMARK][0])
    for number, state in enumerate(found.states.values()):
        keys, rows = (tensors.get(f"{number}.{name}") for name in ("keys", "rows"))
        if keys is None or rows is None or rows.shape != (len(keys), state.width):
            raise BundleError(f"{path}: the state does not fit the plan; run the stage `frame` again")
        state.put(keys.view(np.uint64), rows)
    return found
