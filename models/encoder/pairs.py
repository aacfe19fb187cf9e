"""Pairs of items to learn from: co-liked items, items that share a value, texts of one item, scores of a teacher.

A task is a symmetric matrix of likeness: above 0 where two rows shall be near each other. The rows of a task are the
items of the catalogue, or items and pieces of their texts.

Shape letters: R rows of a task, N items, D dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import sparse

from features.dataset.column import first as first_row
from features.errors import DatasetError
from models.encoder.likes import COMMON_FANS, Likes

MOST_ALIKE = 200
"""Most alike rows that are kept of a row."""
FEW_PAIRS = 10
"""Pairs an item under which two common fans are enough for a pair of co-liked items."""
_SHOWN = 3


@dataclass(frozen=True)
class Task:
    """Pairs of one source.

    Attributes:
        name: Name of the source, shown in reports.
        vectors: (R, D) float32 unit vectors of the rows.
        alike: (R, R) sparse float32, symmetric, 0 or more; the diagonal is 0.
        item: (R,) int64 item of each row. Rows of one item are never negatives of each other.
    """

    name: str
    vectors: NDArray[np.float32]
    alike: sparse.csr_matrix
    item: NDArray[np.int64]

    @property
    def pairs(self) -> int:
        """Number of pairs, each counted once."""
        return int(self.alike.nnz // 2)

    def permuted(self, seed: int) -> "Task":
        """Returns the control: the same matrix, dealt out among the rows that have a pair."""
        paired = np.flatnonzero(np.diff(self.alike.indptr))
        order = np.arange(self.alike.shape[0])
        order[paired] = np.random.default_rng([seed, 3]).permutation(paired)
        return replace(self, name=f"{self.name}, permuted", alike=self.alike[order][:, order].tocsr())


def co_liked(vectors: NDArray[np.float32], likes: Likes, known: NDArray[np.bool_], name: str = "co-liked") -> Task:
    """Returns pairs of known items that the same users like.

    A pair has three common fans or more. If there are fewer than `FEW_PAIRS` such pairs an item, two fans are enough.

    Args:
        vectors: (N, D) vectors of all items.
        likes: Likes of the training part alone. Likes of later events would leak into the measures.
        known: (N,) True if the item may be in a pair.
        name: Name of the task.
    """
    for common in (COMMON_FANS, COMMON_FANS - 1):
        found = likes.neighbours(np.flatnonzero(known), known, count=MOST_ALIKE, common=common)
        task = item_task(name, vectors, found.of, found.item, found.cosine)
        if task.pairs >= FEW_PAIRS * known.sum():
            break
    return task


def liked_rows(likes: Likes, known: NDArray[np.bool_], count: int = 20) -> NDArray[np.int64]:
    """Returns the rows (M, 2) of known items and of their `count` most co-liked known items."""
    found = likes.neighbours(np.flatnonzero(known), known, count=count)
    return np.stack([found.of, found.item], axis=1)


def shared_value(
    vectors: NDArray[np.float32], values: Sequence[Sequence[str]], known: NDArray[np.bool_], *, name: str, seed: int
) -> Task:
    """Returns pairs of known items that share a value, such as a person or a brand.

    The likeness is the sum over shared values of 1 / log2(1 + number of items that carry the value), so a rare value
    says more. Of a value that many items carry, a sample of `MOST_ALIKE` items is paired.

    Args:
        vectors: (N, D) vectors of all items.
        values: Values of each item, N lists.
        known: (N,) True if the item may be in a pair.
        name: Name of the task.
        seed: Seed of the samples.
    """
    owners: dict[str, list[int]] = {}
    for row in np.flatnonzero(known).tolist():
        for value in dict.fromkeys(values[row]):
            owners.setdefault(value, []).append(row)
    rng = np.random.default_rng([seed, 4])
    first, second, weight = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    for rows in owners.values():
        if len(rows) > 1:
            kept = np.array(rows)
            if len(kept) > MOST_ALIKE:
                kept = np.sort(rng.choice(kept, MOST_ALIKE, replace=False))
            one, other = np.triu_indices(len(kept), 1)
            first.append(kept[one])
            second.append(kept[other])
            weight.append(np.full(len(one), 1 / np.log2(1 + len(rows)), dtype=np.float32))
    both = np.concatenate(first), np.concatenate(second)
    return item_task(name, vectors, *both, np.concatenate(weight), summed=True)


def text_pairs(name: str, wholes: NDArray[np.float32], pieces: NDArray[np.float32], items: NDArray[np.int64]) -> Task:
    """Returns pairs of two texts of one item, such as a sentence and the rest of its text.

    Chang et al., "Pre-training Tasks for Embedding-based Large-scale Retrieval" (ICLR 2020), section 3: the inverse
    cloze task and body first selection.

    Args:
        name: Name of the task.
        wholes: (P, D) vectors of one text of each pair.
        pieces: (P, D) vectors of the other text.
        items: (P,) item of each pair.
    """
    rows = np.arange(len(items), dtype=np.int64)
    joined = np.concatenate([wholes, pieces])
    task = item_task(name, joined, rows, len(items) + rows, np.ones(len(items), dtype=np.float32))
    return replace(task, item=np.concatenate([items, items]))


def teacher(path: Path, vectors: NDArray[np.float32], ids: Sequence[str], known: NDArray[np.bool_]) -> Task:
    """Reads pairs from a parquet file of columns `first` and `second`, ids of items, and `score`, 0 or more.

    Without a column `score`, each pair has score 1. Pairs with an item that is not known are left out. Scores are
    divided by the largest.

    Args:
        path: The file.
        vectors: (N, D) vectors of all items.
        ids: Their ids, N.
        known: (N,) True if the item may be in a pair.

    Raises:
        DatasetError: The file cannot be read, a column is missing, an item is unknown, a score is negative or not
            finite, or no pair is left; names the file, and the row if known.
    """
    try:
        table = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DatasetError(f"{path}: no pairs can be read ({error}); expected a parquet file") from error
    missing = [name for name in ("first", "second") if name not in table.columns]
    if missing:
        raise DatasetError(f"{path}: column {missing[0]!r} is missing; expected first, second and, if graded, score")
    row_of = pl.DataFrame({"id": list(ids)}).with_row_index("row")
    rows = []
    for name in ("first", "second"):
        named = table.select(id=pl.col(name).cast(pl.String)).join(row_of, on="id", how="left", maintain_order="left")
        unknown = named.filter(pl.col("row").is_null())["id"]
        if len(unknown):
            shown = ", ".join(repr(one) for one in unknown.head(_SHOWN))
            raise DatasetError(f"{path}: {len(unknown):,} values of {name!r} are no item of the catalogue: {shown}")
        rows.append(named["row"].to_numpy().astype(np.int64))
    scores = _scores(path, table)
    kept = known[rows[0]] & known[rows[1]] & (rows[0] != rows[1]) & (scores > 0)
    if not kept.any():
        raise DatasetError(f"{path}: holds no pair of two known items with a score above 0")
    scores = scores[kept] / scores[kept].max()
    return item_task(path.stem, vectors, rows[0][kept], rows[1][kept], scores.astype(np.float32))


def _scores(path: Path, table: pl.DataFrame) -> NDArray[np.float64]:
    if "score" not in table.columns:
        return np.ones(table.height)
    try:
        scores = table["score"].cast(pl.Float64)
    except pl.exceptions.PolarsError as error:
        raise DatasetError(f"{path}: column 'score' holds {table['score'].dtype}, expected numbers") from error
    bad = first_row(~(scores.is_finite() & (scores >= 0)).fill_null(value=False))
    if bad is not None:
        raise DatasetError(f"{path}, row {bad + 1}: score {table['score'][bad]} is not a finite number of 0 or more")
    return scores.to_numpy()


def item_task(
    name: str,
    vectors: NDArray[np.float32],
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    weight: NDArray[np.float32],
    *,
    summed: bool = False,
) -> Task:
    """Returns the task of pairs (M,) of rows.

    A pair that occurs twice has its largest weight, or the sum of its weights if `summed`.
    """
    size = len(vectors)
    low, high = np.minimum(first, second), np.maximum(first, second)
    keys, place = np.unique(low * size + high, return_inverse=True)
    found = np.zeros(len(keys), dtype=np.float32)
    (np.add if summed else np.maximum).at(found, place, weight)
    low, high = keys // size, keys % size
    both = np.concatenate([low, high]), np.concatenate([high, low])
    alike = sparse.csr_matrix((np.concatenate([found, found]), both), shape=(size, size), dtype=np.float32)
    return Task(name, vectors, alike, np.arange(size, dtype=np.int64))
