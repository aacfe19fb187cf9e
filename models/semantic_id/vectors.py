"""Reads the vectors that a codebook is fitted and measured on, without the vectors of the whole catalogue in memory.

Shape letters: N items, n sampled items, D dim, Q levels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.jobs.sample import sample_rows, take_rows
from features.jobs.shard import each_shard, read_shards


@dataclass(frozen=True)
class SampledVectors:
    """Vectors of the sampled items, see `features.jobs.sample`, and a count over all items.

    Attributes:
        items: N.
        rows: (n,) rows of the sample in the catalogue, ascending.
        vectors: (n, D) float32, in the catalogue's order.
        zeros: Items of the whole catalogue whose vector is zero.
        example: Id of the first such item; "" if there is none.
    """

    items: int
    rows: NDArray[np.int64]
    vectors: NDArray[np.float32]
    zeros: int
    example: str

    def codes(self, directory: Path) -> NDArray[np.uint16]:
        """Reads the codes (n, Q) of the sample from shards of the whole catalogue."""
        return take_rows(each_shard(directory, ["codes"]), self.rows)["codes"].to_numpy()


def read_vectors(directory: Path) -> SampledVectors:
    """Reads shards with `item_id` and `vector` one by one, and keeps the sampled items."""
    rows = sample_rows(read_shards(directory, ["item_id"])["item_id"])
    items = zeros = 0
    example = ""

    def counted() -> Iterator[pl.DataFrame]:
        nonlocal items, zeros, example
        for shard in each_shard(directory, ["item_id", "vector"]):
            empty = shard["item_id"].filter(pl.Series(~shard["vector"].to_numpy().any(axis=1)))
            example = example or (empty[0] if len(empty) else "")
            items, zeros = items + shard.height, zeros + len(empty)
            yield shard.select("vector")

    vectors = take_rows(counted(), rows)["vector"].to_numpy()
    return SampledVectors(items, rows, vectors, zeros, example)


def vectors_beside_codes(vectors: Path, codes: Path) -> pl.DataFrame:
    """Joins the vectors of one run with the codes of an earlier run, for the items of both runs.

    Args:
        vectors: Shards with `item_id` and `vector`.
        codes: Shards of the earlier run with `item_id` and `codes`.

    Returns:
        Columns `item_id`, `vector` and `before`, the earlier codes, in the order of `vectors`. Of more items than a
        codebook is fitted on, the sample of them.
    """
    before = read_shards(codes, ["item_id", "codes"]).rename({"codes": "before"})
    ids = read_shards(vectors, ["item_id"])["item_id"]
    known = ids.is_in(before["item_id"].implode()).arg_true().to_numpy()
    rows = known[sample_rows(ids[known])]
    return take_rows(each_shard(vectors, ["item_id", "vector"]), rows).join(before, on="item_id", maintain_order="left")
