"""Moves a trained ranker to another codebook: rows of the new Semantic IDs start from those of the old ones.

Both codings know most items, so each new token has old tokens: those that its items had at the same place, such as the
same depth of a prefix. Its rows become the mean of their rows, weights and optimizer state alike, weighted by how often
training shows the items. A row that values of other features also read keeps a share of itself, by the same count.

Shape letters: R rows, D dim, m tokens, p pairs of tokens, c chunks.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl
import scipy
import torch
from numpy.typing import NDArray

from features.frame import Frame
from features.frame_blocks import shown_items
from features.hashing import fingerprint
from models.ranker.loading import dimensions, event_columns
from models.ranker.network import Ranker
from models.table.admission import Admission
from models.table.batch import Entities
from models.table.schema import SEMANTIC_ID, Schema, Source


@torch.no_grad()
def recode(schema: Schema, ranker: Ranker, frame: Frame, before: pl.DataFrame) -> None:
    """Moves the ranker's rows, in place, to the Semantic IDs of a frame.

    Args:
        schema: Schema of the ranker.
        frame: Frame whose items hold the new tokens; its train part says how often each item is shown.
        before: `item_id` and the list of tokens `semantic_id` that the ranker was trained on.
    """
    features = [feature for feature in schema.features if feature.column == SEMANTIC_ID]
    if not features or features[0].exact:
        return
    shown = shown_items(frame.blocks("train"), frame.items.height)
    pairs = _pairs(frame.items, before, shown)
    if not pairs.height:
        return
    new, old = (semantic_rows(schema, pairs[name].to_list()) for name in ("new", "old"))
    weight, accumulator = ranker.table.weight, ranker.table.accumulator
    state = torch.cat([weight, accumulator[:, None]], dim=1).double().numpy()
    share = np.repeat(pairs["shown"].to_numpy().astype(np.float64), new.shape[1])
    moves = scipy.sparse.csr_array((share, (new.ravel(), old.ravel())), shape=(len(state), len(state)))
    claimed = np.asarray(moves.sum(axis=1)).ravel()
    rows = np.flatnonzero(claimed)
    others = _readers(schema, frame)[rows]
    moved = (moves[rows] @ state + others[:, None] * state[rows]) / (claimed[rows] + others)[:, None]
    found = torch.from_numpy(moved.astype(np.float32))
    weight[torch.from_numpy(rows)] = found[:, :-1]
    accumulator[torch.from_numpy(rows)] = found[:, -1]


def semantic_rows(schema: Schema, tokens: Sequence[str]) -> NDArray[np.int64]:
    """Returns the rows (m, c) of tokens, as many as the widest reader of Semantic IDs looks up."""
    features = [feature for feature in schema.features if feature.column == SEMANTIC_ID]
    chunks = max(feature.chunks for feature in features)
    return schema.hash_spec.lookup(features[0].salt, chunks, fingerprint(tokens))


def _pairs(items: pl.DataFrame, before: pl.DataFrame, shown: NDArray[np.int64]) -> pl.DataFrame:
    """Returns `new` and `old` tokens at one place of the same items, and how often those are shown."""
    after = items.select("item_id", pl.col(SEMANTIC_ID).alias("new"), pl.Series("shown", shown))
    old = before.select("item_id", pl.col(SEMANTIC_ID).alias("old"))

    def exploded(table: pl.DataFrame, name: str) -> pl.DataFrame:
        numbered = table.filter(pl.col(name).list.len() > 0).with_columns(
            place=pl.int_ranges(pl.col(name).list.len(), dtype=pl.Int64)
        )
        return numbered.explode(name, "place")

    joined = exploded(after.filter(pl.col("shown") > 0), "new").join(exploded(old, "old"), on=["item_id", "place"])
    return joined.group_by("new", "old", maintain_order=True).agg(pl.col("shown").sum())


def _readers(schema: Schema, frame: Frame) -> NDArray[np.float64]:
    """Returns (R,) how often the train part reads each row for a value of another feature."""
    source = dimensions(schema, frame, Admission.off())
    found = np.zeros(schema.rows)
    for block in frame.blocks("train").frames("user", "item", *event_columns(schema)):
        index = np.arange(block.height)
        tables: tuple[tuple[Source, Entities, NDArray[np.int64]], ...] = (
            ("user", source.users, block["user"].to_numpy().astype(np.int64)),
            ("item", source.items, block["item"].to_numpy().astype(np.int64)),
            ("event", source.with_events(block).events, index),
        )
        for of, entities, index in tables:
            for column in sorted({feature.column for feature in schema.of(of)} - {SEMANTIC_ID}):
                found += np.bincount(entities.rows(column, index)[0].ravel(), minlength=schema.rows)
    return found
