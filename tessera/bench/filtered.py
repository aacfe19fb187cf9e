"""`filtered`: the nearest items among those that match, beside faiss' flat index with a bitmap and HNSW, in one run.

Two catalogues: 200,000 vectors of 64 dimensions in 500 clusters, and the dataset's own items by their content vectors.
Each is searched for 50 neighbours by 200 queries, one at a time, on one thread, at four selectivities. Tessera searches
as a server does, from a filter on a column; the peers are given their bitmap. Recall is within the filter.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import faiss as untyped_faiss
import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.console import Console
from threadpoolctl import threadpool_limits

from features.dataset import Dataset
from features.error import TesseraError
from serving.filter import Attributes, Filter
from serving.retrieve import Searcher
from tessera.bench.result import BenchResult, Claim, at_least, at_most
from tessera.run import RunOptions, run

# Its types know nothing of the Python that it adds.
faiss: Any = untyped_faiss
SELECTIVITIES = (1.0, 0.1, 0.01, 0.001)
_ITEMS, _DIM, _CLUSTERS, _NOISE = 200_000, 64, 500, 0.7
_QUERIES, _K = 200, 50
_LINKS, _BUILD, _SEARCH = 32, 80, 64
_WARM = 20
Search = Callable[[NDArray[np.float32]], NDArray[np.int64]]


def filtered(dataset: Dataset, out: Path, *, seeds: int, console: Console) -> BenchResult:
    """Measures both catalogues `seeds` times; claims are judged from the medians."""
    rows: list[dict[str, Any]] = []
    own = _own_vectors(dataset, out, console)
    with threadpool_limits(1):
        faiss.omp_set_num_threads(1)
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            shapes = {f"{_ITEMS:,} x {_DIM}": _clusters(rng), f"{dataset.name} items": (own, _some(own, rng))}
            for name, (vectors, queries) in shapes.items():
                with console.status(f"seed {seed}: {name}"):
                    rows += [{"catalogue": name, "seed": seed} | row for row in _measure(vectors, queries, rng)]
    return BenchResult("filtered", dataset.name, seeds, rows, _claims(rows))


def _claims(rows: list[dict[str, Any]]) -> list[Claim]:
    claims: list[Claim] = []
    for catalogue in dict.fromkeys(row["catalogue"] for row in rows):
        for share in SELECTIVITIES:
            at = [row for row in rows if row["catalogue"] == catalogue and row["selectivity"] == share]

            def median(method: str, column: str, at: list[dict[str, Any]] = at) -> float:
                return float(np.median([row[column] for row in at if row["method"] == method]))

            best = min(median("flat+bitmap", "p50_ms"), median("HNSW", "p50_ms"))
            where = f"{catalogue}, selectivity {share:g}"
            claims.append(at_least(f"{where}: recall@{_K}", median("tessera", "recall"), 0.95))
            claims.append(at_most(f"{where}: p50 over the faster peer's", median("tessera", "p50_ms") / best, 1.2))
    return claims


def _measure(
    vectors: NDArray[np.float32], queries: NDArray[np.float32], rng: np.random.Generator
) -> list[dict[str, Any]]:
    # Item n matches `place < m` when it is one of the first m of a random order.
    place = rng.permutation(len(vectors))
    began = time.perf_counter()
    searcher = Searcher(vectors, Attributes(pl.DataFrame({"place": place}), ["place"]))
    built_s = time.perf_counter() - began
    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors)
    hnsw = faiss.IndexHNSWFlat(vectors.shape[1], _LINKS, faiss.METRIC_INNER_PRODUCT)
    hnsw.hnsw.efConstruction = _BUILD
    faiss.omp_set_num_threads(2)
    began = time.perf_counter()
    hnsw.add(vectors)
    hnsw_s = time.perf_counter() - began
    faiss.omp_set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for share in SELECTIVITIES:
        count = max(1, round(len(vectors) * share))
        wanted = None if share == 1 else Filter.model_validate({"column": "place", "lt": count})
        bits = np.packbits(np.pad(place < count, (0, -len(place) % 8)), bitorder="little")
        selector = faiss.IDSelectorBitmap(bits)
        given = {} if share == 1 else {"sel": selector}
        flat_options = faiss.SearchParameters(**given)
        hnsw_options = faiss.SearchParametersHNSW(efSearch=_SEARCH, **given)
        truth = _truth(vectors, queries, place < count)
        methods: dict[str, Search] = {
            "tessera": partial(_tessera, searcher, wanted),
            "flat+bitmap": partial(_peer, flat, flat_options),
            "HNSW": partial(_peer, hnsw, hnsw_options),
        }
        for name, timing in _timed(methods, queries, truth).items():
            plan = searcher.search(queries[0], _K, wanted)[2] if name == "tessera" else None
            rows.append(
                {"selectivity": share, "method": name, **timing, "plan": plan.method if plan else None,
                 "build_s": {"tessera": built_s, "HNSW": hnsw_s}.get(name)}
            )  # fmt: skip
    return rows


def _tessera(searcher: Searcher, wanted: Filter | None, query: NDArray[np.float32]) -> NDArray[np.int64]:
    return searcher.search(query, _K, wanted)[0]


def _peer(index: Any, options: Any, query: NDArray[np.float32]) -> NDArray[np.int64]:
    found: NDArray[np.int64] = index.search(query[None], _K, params=options)[1][0]
    return found


def _timed(
    methods: dict[str, Search], queries: NDArray[np.float32], truth: list[set[int]]
) -> dict[str, dict[str, Any]]:
    """Each method over all queries, twice in turns; the better half of the machine's noise is kept for all alike."""
    found: dict[str, dict[str, Any]] = {}
    times: dict[str, list[list[float]]] = {name: [] for name in methods}
    for _ in range(2):
        for name, search in methods.items():
            for query in queries[:_WARM]:
                search(query)
            took, hits, total = [], 0, 0
            for query, right in zip(queries, truth, strict=True):
                began = time.perf_counter()
                numbers = search(query)
                took.append(1_000 * (time.perf_counter() - began))
                hits, total = hits + len(right & set(numbers.tolist())), total + len(right)
            times[name].append(took)
            found[name] = {"recall": hits / max(total, 1)}
    for name, rounds in times.items():
        p50, p99 = np.percentile(np.minimum(*map(np.array, rounds)), [50, 99])
        found[name] |= {"p50_ms": float(p50), "p99_ms": float(p99)}
    return found


def _truth(vectors: NDArray[np.float32], queries: NDArray[np.float32], held: NDArray[np.bool_]) -> list[set[int]]:
    numbers = np.flatnonzero(held)
    scores = queries @ vectors[numbers].T
    k = min(_K, len(numbers))
    best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    return [set(row.tolist()) for row in numbers[best]]


def _clusters(rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    centres = rng.standard_normal((_CLUSTERS, _DIM)).astype(np.float32)

    def drawn(count: int) -> NDArray[np.float32]:
        noise = rng.standard_normal((count, _DIM)).astype(np.float32)
        rows = centres[rng.integers(0, _CLUSTERS, count)] + np.float32(_NOISE) * noise
        found: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return found

    return drawn(_ITEMS), drawn(_QUERIES)


def _some(vectors: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    chosen: NDArray[np.float32] = vectors[rng.choice(len(vectors), min(_QUERIES, len(vectors)), replace=False)]
    return chosen


def _own_vectors(dataset: Dataset, out: Path, console: Console) -> NDArray[np.float32]:
    if not dataset.has_content:
        raise TesseraError(f"bench filtered searches by content, and {dataset.name} has no items with text")
    run(dataset, out / dataset.name, RunOptions(), console=console, registry=None, until="frame")
    items = pl.read_parquet(out / dataset.name / "frame" / "items.parquet")["content_vector"].drop_nulls()
    vectors = np.ascontiguousarray(items.to_numpy(), dtype=np.float32)
    return vectors[vectors.any(axis=1)]
