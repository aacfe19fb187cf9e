"""Advises how many dimensions or bits a catalogue needs, by a curve measured on its own vectors.

Three answers that must not be confused:

- The curve: the share of the float neighbours that a smaller vector keeps, on this catalogue. Neighbours are not the
  task: fewer dimensions often keep the task where they lose neighbours.
- The worst case: the items at which no vector of a width can tell all pairs apart, with any training.
- Bytes, at catalogues of 10^6 to 10^9 items.

Shape letters: n measured items, D dim, E kept dims, B bits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from features.content.chain import apply_steps
from features.content.step import Cut
from features.errors import DatasetError
from models.encoder.axes import rotation
from models.encoder.bits import fit_itq, index_bits, shortlist_recall
from models.encoder.limit import critical_items

_MOST_MEASURED, _QUERIES, _SHORTLIST = 20_000, 200, 10
_CATALOGUES = (10**6, 10**7, 10**8, 10**9)


@dataclass(frozen=True)
class MeasuredSize:
    """A smaller vector, and the share of the k float neighbours that it keeps.

    Attributes:
        form: `dims` for a rotated and cut float32 vector, `bits` for a code whose shortlist of 10 k int8 rows reorder.
        size: E or B.
        item_bytes: Bytes of an item that a search scans.
        recall: Recall on the n measured items.
        expected: Recall at the items asked for, by the trend from n / 4 to n items. An estimate.
        critical: Items at which no vector of this width tells all pairs apart; 0 for bits.
    """

    form: str
    size: int
    item_bytes: int
    recall: float
    expected: float
    critical: int


@dataclass(frozen=True)
class Advice:
    """Sizes of a catalogue's vectors.

    Attributes:
        measured: n.
        items, k, recall: What was asked for.
        sizes: The curve, both forms, ascending by size.
        dims, bits: Smallest size of each form whose expected recall reaches `recall`, or None.
        bytes: Rows of `items` and the bytes of full float32, full int8, the advised dims and the advised bits; then of
            a server's index of the full width, by the format of its rows.
    """

    measured: int
    items: int
    k: int
    recall: float
    sizes: Sequence[MeasuredSize]
    dims: int | None
    bits: int | None
    bytes: Sequence[dict[str, int | None]]


def advise(vectors: NDArray[np.float32], *, items: int, k: int, recall: float, seed: int = 0) -> Advice:
    """Measures the curve and reads the sizes from it.

    Args:
        vectors: (N, D) float32 unit vectors of a catalogue; zero rows are left out, and of many a sample is measured.
        items: Items that the index will hold.
        k: Neighbours of a query.
        recall: Share of the float neighbours to keep, above 0 and up to 1.
        seed: Decides the sample and the queries.

    Raises:
        DatasetError: An argument is out of range, or the catalogue is too small to measure.
    """
    if not 0 < recall <= 1 or k < 1 or items < 1:
        raise DatasetError(
            f"advise: expected items and k of 1 or more and recall in (0, 1], got {items}, {k}, {recall}"
        )
    filled = vectors[vectors.any(axis=1)]
    if len(filled) < 80 * k:
        raise DatasetError(f"advise: {len(filled)} vectors are too few for k = {k}; expected {80 * k} or more")
    rows = np.random.default_rng([seed, 17]).permutation(len(filled))[:_MOST_MEASURED]
    sample = np.ascontiguousarray(filled[rows])
    sizes = list(_curve(sample, items, k, seed))
    found = {
        form: next((one.size for one in sizes if one.form == form and one.expected >= recall), None)
        for form in ("dims", "bits")
    }
    width, dims, bits = sample.shape[1], found["dims"], found["bits"]
    table: list[dict[str, int | None]] = [
        {
            "items": count,
            "float32": count * 4 * width,
            "int8": count * (width + 4),
            "dims": None if dims is None else count * 4 * dims,
            "bits": None if bits is None else count * bits // 8,
            "index_float32": count * index_bytes(width, "float32"),
            "index_int8": count * index_bytes(width, "int8"),
        }
        for count in _CATALOGUES
    ]
    return Advice(len(sample), items, k, recall, sizes, dims, bits, table)


def index_bytes(width: int, rows: str) -> int:
    """Returns the bytes of an item in a server's index of vectors of a width (`serving.retrieval.index`).

    An index of float32 rows has a copy of each with its number in inverted lists. Both kinds have a code, as it is and
    packed, a number and a position. Filters that are remembered come on top: at most the bytes of all codes.

    Args:
        width: D.
        rows: Format of the rows, `float32` or `int8`.
    """
    stored = width + 4 if rows == "int8" else 8 * width + 8
    return stored + 2 * index_bits(width) // 8 + 8


def _curve(sample: NDArray[np.float32], items: int, k: int, seed: int) -> Iterator[MeasuredSize]:
    width = sample.shape[1]
    parts = [sample[: len(sample) // 4], sample]
    turned = [apply_steps(rotation(sample), part) for part in parts]
    queries = np.arange(min(_QUERIES, len(parts[0])))
    doublings = np.log2(max(items, 1) / len(sample))
    for size in _ladder(width):
        cut = (Cut.to(size, width=width),)
        small = parts if size == width else [apply_steps(cut, part) for part in turned]
        recalls = [_kept(one, part, queries, k) for one, part in zip(small, parts, strict=True)]
        yield MeasuredSize("dims", size, 4 * size, recalls[1], _at(recalls, doublings), critical_items(size))
    for size in _ladder(width):
        if size % 8:
            continue
        bits = fit_itq(sample, size, space="sample", seed=seed)
        recalls = [
            shortlist_recall(bits, part, queries=queries, k=k, shortlist=_SHORTLIST * k, int8=True)["float_query"]
            for part in parts
        ]
        yield MeasuredSize("bits", size, size // 8, recalls[1], _at(recalls, doublings), 0)


def _ladder(width: int) -> list[int]:
    steps = [size for power in range(3, 13) for size in (2**power, 2**power * 3 // 2)]
    return [*(size for size in steps if size < width), width]


def _kept(small: NDArray[np.float32], whole: NDArray[np.float32], queries: NDArray[np.int64], k: int) -> float:
    truth, found = _nearest(whole, queries, k), _nearest(small, queries, k)
    return float(np.mean([np.isin(one, other).mean() for one, other in zip(truth, found, strict=True)]))


def _nearest(rows: NDArray[np.float32], queries: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    scores = rows[queries] @ rows.T
    scores[np.arange(len(queries)), queries] = -np.inf
    return np.argpartition(scores, scores.shape[1] - k, axis=1)[:, -k:].astype(np.int64)


def _at(recalls: Sequence[float], doublings: float) -> float:
    """Returns the recall after more doublings of the catalogue: the log-odds go on as from n / 4 to n items.

    A smaller catalogue is taken as measured.
    """
    odds = [np.log(kept / (1.0 - kept)) for kept in np.clip(recalls, 1e-3, 1.0 - 1e-3)]
    if doublings <= 0 or odds[1] >= odds[0]:
        return recalls[1]
    return float(1.0 / (1.0 + np.exp(-(odds[1] + (odds[1] - odds[0]) / 2 * doublings))))
