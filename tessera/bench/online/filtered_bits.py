"""The part `bits` of `filtered`: bits and int8 rows beside float scans and faiss' compressed indexes, in one run.

Catalogues: the dataset's items by their content vectors, and jittered copies of them, which are synthetic, at three
sizes. Each is searched for 10 neighbours, one query at a time, on one thread, at four selectivities. Recall is within
the filter. Filters are warm: Tessera remembers its matches, and faiss gets its bitmap ready.

Peers, as faiss' guidelines advise: flat, 8-bit scalar quantizer, binary codes by Hamming distance, product quantizer by
fast scan, and the same in an inverted file; the last three put a shortlist of 100 in order by stored vectors. A time is
compared with the float scan's: the faster of faiss' flat index under the bitmap and of gathered rows.
"""

import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import faiss as untyped_faiss
import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.content.bits import Int8Rows, asymmetric, rerank
from features.content.encoder import unit
from features.value.filter import Filter
from models.encoder.bits import fit_itq, index_bits
from serving.retrieval.filter import Attributes
from serving.retrieval.retriever import Searcher
from serving.retrieval.rows import ROW_KINDS
from tessera.bench.harness.result import Claim, at_least, at_most

# The library's types lack the methods that its Python layer adds.
faiss: Any = untyped_faiss
Row = dict[str, Any]
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Search = Callable[[Floats], Ints]
SHARES = (1.0, 0.1, 0.05, 0.01)
SIZES = (20_000, 200_000, 1_000_000)
_K, _QUERIES, _WARM, _SHORTLIST = 10, 100, 10, 100
_JITTER = 0.5
_TABLES = 200_000  # items above which the slow twin is left out
_PROBES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_RECALL, _FLOATS, _INT8 = 0.95, ("faiss flat", "float, gathered"), "tessera int8"
# Catalogues of so many items have claims on time: below, a search takes some tens of microseconds.
_TIMED = 200_000
# Time over the float scan's, at most, by selectivity.
_OF_FLOAT = {1.0: 0.25, 0.1: 0.25, 0.05: 0.5, 0.01: 1.2}
_FITTED = 20_000


def shapes(own: Floats, rng: np.random.Generator, sizes: tuple[int, ...]) -> Iterator[tuple[str, Floats, Floats]]:
    """Yields name, vectors and queries: the dataset's own items, then jittered copies of them at each size."""
    chosen = rng.choice(len(own), min(_QUERIES, len(own)), replace=False)
    yield f"{len(own):,} items", own, own[chosen]
    spread = own.std(axis=0) * np.float32(_JITTER)
    for size in sizes:
        drawn = own[rng.integers(0, len(own), size + _QUERIES)]
        drawn = unit(drawn + spread * rng.standard_normal(drawn.shape, dtype=np.float32))
        yield f"{size:,} synthetic", drawn[:size], drawn[size:]


def measure(vectors: Floats, queries: Floats, rng: np.random.Generator) -> Iterator[Row]:
    """Yields a row for each method and selectivity."""
    order = rng.permutation(len(vectors))
    attributes = Attributes(pl.DataFrame({"place": order}), ["place"])
    searchers = {kind: Searcher(vectors, attributes, kind=kind) for kind in ROW_KINDS}
    peers = _Peers(vectors)
    for share in SHARES:
        count = max(_K + 1, round(len(vectors) * share))
        numbers = np.flatnonzero(order < count)
        wanted = None if share == 1 else Filter.model_validate({"column": "place", "lt": count})
        searches: dict[str, tuple[Search, float]] = {
            f"tessera {kind}": (_ours(searcher, wanted), searcher.index.size_bytes / len(vectors))
            for kind, searcher in searchers.items()
        }
        searches |= peers.searches(numbers, queries)
        truth = _truth(vectors, queries, numbers)
        timed = _timed({name: search for name, (search, _) in searches.items()}, queries, truth)
        for name, timing in timed.items():
            kind = name.removeprefix("tessera ")
            row: Row = {
                "items": len(vectors),
                "selectivity": share,
                "method": name,
                "item_bytes": searches[name][1],
                **timing,
            }
            row["of_float_time"] = timing["p50_ms"] / min(timed[one]["p50_ms"] for one in _FLOATS if one in timed)
            row["plan"] = searchers[kind].search(queries[0], _K, wanted)[2].method if kind in searchers else None
            yield row


def claims(rows: list[Row]) -> list[Claim]:
    """Returns what the part must show, in the median over the seeds."""
    found: list[Claim] = []
    for catalogue in dict.fromkeys(row["catalogue"] for row in rows):
        at = [row for row in rows if row["catalogue"] == catalogue]

        def median(method: str, share: float, column: str, at: list[Row] = at) -> float:
            return float(
                np.median([row[column] for row in at if (row["method"], row["selectivity"]) == (method, share)])
            )

        recall = min(median(_INT8, share, "recall") for share in SHARES)
        found.append(
            at_least(f"{catalogue}, int8 rows and bits: recall@{_K}, the least of all filters", recall, _RECALL)
        )
        for kind, share in product(ROW_KINDS, SHARES if at[0]["items"] >= _TIMED else ()):
            ratio = median(f"tessera {kind}", share, "of_float_time")
            claim = f"{catalogue}, {kind}, selectivity {share:g}: p50 over that of the float scan"
            found.append(at_most(claim, ratio, _OF_FLOAT[share]))
        if any(row["plan"] == "bits" for row in at):
            share = median(_INT8, 0.05, "item_bytes") / median("tessera float32", 0.05, "item_bytes")
            found.append(at_most(f"{catalogue}: bytes of int8 rows and bits over those of float32", share, 0.25))
    return found


class _Peers:
    """faiss' indexes over one catalogue, and the codes that Tessera had before."""

    def __init__(self, vectors: Floats) -> None:
        size, width = vectors.shape
        self._vectors, self._rows = vectors, Int8Rows.of(vectors)
        self._flat = faiss.IndexFlatIP(width)
        self._scalar = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
        bits = index_bits(width)
        lists = max(1, min(int(4 * size**0.5), size // 39))
        self._scan = faiss.index_factory(width, f"PQ{bits // 4}x4fs,RFlat", faiss.METRIC_INNER_PRODUCT)
        self._lists = faiss.index_factory(width, f"IVF{lists},PQ{bits // 4}x4fs,RFlat", faiss.METRIC_INNER_PRODUCT)
        inner = faiss.extract_index_ivf(self._lists)
        inner.cp.niter, inner.cp.min_points_per_centroid, inner.cp.max_points_per_centroid = 10, 1, 64
        for index in (self._flat, self._scalar, self._scan, self._lists):
            index.train(vectors[:_FITTED] if index is not self._lists else vectors)
            index.add(vectors)
        sample = vectors[np.random.default_rng(0).choice(size, min(size, _FITTED), replace=False)]
        self._code = fit_itq(sample, bits, space="bench")
        parts = [vectors[start : start + 10_000] for start in range(0, size, 10_000)]
        self._codes = np.concatenate([self._code.code(part, space="bench") for part in parts])
        self._binary = faiss.IndexBinaryFlat(bits)
        self._binary.add(self._codes)

    def searches(self, numbers: Ints, queries: Floats) -> dict[str, tuple[Search, float]]:
        """Returns searches among items (M,), and the bytes of an item, by name."""
        size, width = self._vectors.shape
        everything, byte = len(numbers) == size, self._codes.shape[1]
        held = np.zeros(-(-size // 8) * 8, dtype=bool)
        held[numbers] = True
        bitmap = np.packbits(held, bitorder="little")
        chosen = None if everything else faiss.IDSelectorBitmap(bitmap)
        # The selector reads the bitmap, so both live as long as the searches.
        kept = (bitmap, chosen)
        plain = faiss.SearchParameters(sel=chosen) if chosen else None
        rows = self._rows

        def faiss_search(index: Any, options: Any = plain, held: Any = kept) -> Search:
            return lambda query: index.search(query[None], _K, params=options)[1][0]

        def hamming(query: Floats, held: Any = kept) -> Ints:
            code = np.packbits(self._code.turn(self._code.centre(query[None])) > 0, axis=1)
            found = self._binary.search(code, _SHORTLIST, params=plain)[1][0]
            return rerank(query, found[found >= 0], rows, _K)

        def table(query: Floats) -> Ints:
            codes = self._codes if everything else self._codes.take(numbers, axis=0)
            scores = asymmetric(self._code.query(query[None], space="bench")[0], codes)
            shortlist = min(_SHORTLIST, len(numbers))
            return rerank(query, numbers[np.argpartition(-scores, shortlist - 1)[:shortlist]], rows, _K)

        def gathered(query: Floats) -> Ints:
            scores = self._vectors.take(numbers, axis=0) @ query
            return numbers[np.argpartition(-scores, _K - 1)[:_K]]

        found: dict[str, tuple[Search, float]] = {
            _FLOATS[0]: (faiss_search(self._flat), 4 * width),
            "faiss 8 bits": (faiss_search(self._scalar), width),
            "faiss Hamming + int8 rows": (hamming, byte + width + 4),
            "faiss IVF, PQ fast scan + float rows": (self._probing(chosen, numbers, kept), byte + 8 + 4 * width),
        }
        if everything:
            options = faiss.IndexRefineSearchParameters(k_factor=_SHORTLIST / _K)
            found["faiss PQ fast scan + float rows"] = (faiss_search(self._scan, options), byte + 4 * width)
        else:
            found[_FLOATS[1]] = (gathered, 4 * width)
        if size <= _TABLES:
            found["bits by a table + int8 rows"] = (table, byte + width + 4)
        return found

    def _probing(self, chosen: Any, numbers: Ints, kept: Any) -> Search:
        """Returns a search of the fewest lists with the recall, found on items as queries."""
        queries = self._vectors[np.random.default_rng(1).choice(len(self._vectors), 50, replace=False)]
        truth = _truth(self._vectors, queries, numbers)
        for probes in _PROBES:
            lists = faiss.SearchParametersIVF(nprobe=probes, sel=chosen)
            options = faiss.IndexRefineSearchParameters(k_factor=_SHORTLIST / _K, base_index_params=lists)

            def search(query: Floats, options: Any = options, held: Any = (kept, lists)) -> Ints:
                found: Ints = self._lists.search(query[None], _K, params=options)[1][0]
                return found

            hits = sum(len(right & set(search(query).tolist())) for query, right in zip(queries, truth, strict=True))
            if hits >= _RECALL * sum(map(len, truth)):
                break
        return search


def _ours(searcher: Searcher, wanted: Filter | None) -> Search:
    return lambda query: searcher.search(query, _K, wanted)[0]


def _timed(searches: dict[str, Search], queries: Floats, truth: list[set[int]]) -> dict[str, Row]:
    """Runs each search over all queries, twice in turns, and keeps the better time of each query."""
    times: dict[str, list[Floats]] = {name: [] for name in searches}
    hits = dict.fromkeys(searches, 0)
    for _ in range(2):
        for name, search in searches.items():
            for query in queries[:_WARM]:
                search(query)
            took, hits[name] = [], 0
            for query, right in zip(queries, truth, strict=True):
                began = time.perf_counter()
                numbers = search(query)
                took.append(1_000 * (time.perf_counter() - began))
                hits[name] += len(right & set(numbers.tolist()))
            times[name].append(np.array(took, dtype=np.float32))
    total = sum(map(len, truth))
    return {
        name: {"recall": hits[name] / total, "p50_ms": float(np.median(np.minimum(*rounds)))}
        for name, rounds in times.items()
    }


def _truth(vectors: Floats, queries: Floats, numbers: Ints) -> list[set[int]]:
    part = vectors if len(numbers) == len(vectors) else vectors.take(numbers, axis=0)
    return [set(numbers[np.argpartition(-(part @ query), _K - 1)[:_K]].tolist()) for query in queries]
