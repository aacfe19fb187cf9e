"""Identifies the events that a model has learnt from by their content, across files and splits.

Two events are the same if everything declared of them but the label is equal: an event that was learnt with the other
label is not an unseen event. Shape letters: N examples, K known events.
"""

from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.dataset.label import TASK
from features.frame import Frame
from features.hashing import fingerprint

TRAINED = "trained.parquet"
"""Name of the file of the events that a bundle was trained on, beside it."""
# Columns that the frame derived from an event, and columns that differ between runs.
_NOT_OF_THE_EVENT = {"event", "user", "item", "label", "split", "history"}
_SEPARATOR = "\x1f"


def event_ids(frame: Frame, part: str) -> NDArray[np.uint32]:
    """Returns ids (N,) of a part's examples, 32 bits each: of K known events, a new one collides once in 2**32 / K."""
    blocks = frame.blocks(part)
    return blocks.arranged([_block_ids(frame, block) for block in blocks.frames()])


def _block_ids(frame: Frame, examples: pl.DataFrame) -> NDArray[np.uint32]:
    derived = set(frame.aggregates.columns)
    columns = [
        frame.users["user_id"].gather(examples["user"]) if frame.users.height else pl.Series([""] * examples.height),
        frame.items["item_id"].gather(examples["item"]) if frame.items.height else pl.Series([""] * examples.height),
        *(
            examples[name]
            for name in sorted(examples.columns)
            if name not in _NOT_OF_THE_EVENT | derived and not name.startswith(TASK)
        ),
    ]
    table = pl.DataFrame([column.rename(str(number)) for number, column in enumerate(columns)])
    scalar = [name for name, dtype in table.schema.items() if not dtype.is_nested()]
    words = [pl.col(name).cast(pl.String).fill_null("") for name in scalar]
    lists = [
        pl.col(name).cast(pl.List(pl.String)).list.join("\x1e").fill_null("")
        for name in table.columns
        if name not in scalar
    ]
    joined = table.select(pl.concat_str(*words, *lists, separator=_SEPARATOR)).to_series().to_list()
    return (fingerprint(joined) >> np.uint64(32)).astype(np.uint32)


def trained_on(frame: Frame, *before: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Returns sorted ids (K,) of all learnt events, old and new; validation counts, since it selects epochs."""
    own = [event_ids(frame, part) for part in ("train", "validation")]
    return np.unique(np.concatenate([*own, *before]))


def write_trained(ids: NDArray[np.uint32], path: Path) -> None:
    """Writes ids (K,) in order, which takes two bytes each for a million."""
    pl.DataFrame({"event": ids}).write_parquet(path, compression="zstd")


def read_trained(path: Path) -> NDArray[np.uint32]:
    """Reads ids (K,) that `write_trained` wrote."""
    found: NDArray[np.uint32] = pl.read_parquet(path)["event"].to_numpy()
    return found
