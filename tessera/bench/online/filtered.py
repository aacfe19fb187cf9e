"""`filtered`: compares filtered nearest-item search with faiss' indexes under a bitmap, in one run.

Two catalogues: 200,000 vectors of 64 dimensions in 500 clusters, and the dataset's own items by their content vectors.
Each is searched for 50 neighbours by 200 queries, one at a time, on one thread, at four selectivities. Recall is within
the filter. Tessera searches as a server does, from a filter on a column, in three states: warm, where the same filter
comes again; changed, where an item changed since it came last; cold, where every query brings a new filter. Peers are
given their bitmap ready when warm. When cold they are given what matches as booleans, and pack it for each query.
Peers: faiss' flat index, its inverted file with as many lists and probes as make the recall, and HNSW.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import faiss as untyped_faiss
import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.console import Console
from threadpoolctl import threadpool_limits

from features.dataset.descriptor import Dataset
from features.errors import TesseraError
from features.value.filter import Filter
from serving.retrieval.filter import Attributes
from serving.retrieval.retriever import Searcher
from tessera.bench.harness.parts import chosen_parts
from tessera.bench.harness.result import BenchResult, Claim, at_least, at_most
from tessera.bench.harness.rows import measured_rows
from tessera.bench.online import filtered_bits
from tessera.pipeline.options import load_options
from tessera.pipeline.run import run

# The library's types lack the methods that its Python layer adds.
faiss: Any = untyped_faiss
SELECTIVITIES = (1.0, 0.1, 0.01, 0.001)
_ITEMS, _DIM, _CLUSTERS, _NOISE = 200_000, 64, 500, 0.7
_QUERIES, _K = 200, 50
_LINKS, _BUILD, _SEARCH = 32, 80, 64
# Lists probed by faiss' inverted file: the least of these with the recall that is claimed, found on other queries.
_PROBES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_RECALL = 0.95
_STATES = ("warm", "changed", "cold")
_WARM = 20
_PEERS = ("flat+bitmap", "IVF+bitmap", "HNSW")
Search = Callable[[NDArray[np.float32]], NDArray[np.int64]]


def filtered(
    dataset: Dataset, out: Path, *, seeds: int, console: Console, parts: Sequence[str] | None = None
) -> BenchResult:
    """Measures the parts `seeds` times; claims are judged from the medians.

    Args:
        dataset: Dataset with content.
        out: Directory of the run that encodes it.
        seeds: Seeds, from 0.
        console: Shows progress.
        parts: Names in `PARTS`; all by default.
    """
    chosen = chosen_parts("filtered", parts, PARTS)
    rows = measured_rows()
    own = _own_vectors(dataset, out, console)
    with threadpool_limits(1):
        faiss.omp_set_num_threads(1)
        for seed, part in product(range(seeds), chosen):
            rng = np.random.default_rng(seed)
            for name, measured in _MEASURED[part](own, rng, seed):
                with console.status(f"seed {seed}: {part}, {name}"):
                    rows += [{"part": part, "catalogue": name, "seed": seed} | row for row in measured()]
    judged = {"states": _claims, "bits": filtered_bits.claims}
    claims = [claim for part in chosen for claim in judged[part]([row for row in rows if row["part"] == part])]
    return BenchResult("filtered", dataset.name, seeds, rows, claims)


Measured = Iterator[tuple[str, Callable[[], Iterable[dict[str, Any]]]]]


def _states(own: NDArray[np.float32], rng: np.random.Generator, seed: int) -> Measured:
    shapes = {f"{_ITEMS:,} x {_DIM}": _clusters(rng), f"{len(own):,} items": (own, _some(own, rng))}
    for name, (vectors, queries) in shapes.items():
        yield name, partial(_measure, vectors, queries, rng)


def _bits(own: NDArray[np.float32], rng: np.random.Generator, seed: int) -> Measured:
    # The largest catalogue takes minutes to build, so it is measured once.
    sizes = filtered_bits.SIZES if seed == 0 else filtered_bits.SIZES[:-1]
    for name, vectors, queries in filtered_bits.shapes(own, rng, sizes):
        yield name, partial(filtered_bits.measure, vectors, queries, rng)


_MEASURED: dict[str, Callable[[NDArray[np.float32], np.random.Generator, int], Measured]] = {
    "states": _states,
    "bits": _bits,
}
PARTS = tuple(_MEASURED)


def _claims(rows: list[dict[str, Any]]) -> list[Claim]:
    claims: list[Claim] = []
    for catalogue in dict.fromkeys(row["catalogue"] for row in rows):
        for share in SELECTIVITIES:
            at = [row for row in rows if row["catalogue"] == catalogue and row["selectivity"] == share]

            def median(method: str, state: str, column: str, at: list[dict[str, Any]] = at) -> float:
                values = [row[column] for row in at if (row["method"], row["state"]) == (method, state)]
                return float(np.median(values))

            where = f"{catalogue}, selectivity {share:g}"
            states = [state for state in _STATES if any(row["state"] == state for row in at)]
            recall = min(median("tessera", state, "recall") for state in states)
            claims.append(at_least(f"{where}: recall@{_K}, the least of all states", recall, _RECALL))
            for state in states:
                # Peers do not follow changes: after a change of an item they pack their bitmap again.
                theirs = "warm" if state == "warm" else "cold"
                best = min(
                    median(peer, theirs, "p50_ms") for peer in _PEERS if median(peer, theirs, "recall") >= _RECALL
                )
                claim = f"{where}, {state}: p50 over that of the fastest peer with the recall"
                claims.append(at_most(claim, median("tessera", state, "p50_ms") / best, 1.2))
    return claims


def _measure(
    vectors: NDArray[np.float32], queries: NDArray[np.float32], rng: np.random.Generator
) -> list[dict[str, Any]]:
    # Item n matches `place < m` when it is one of the first m of a random order.
    order = rng.permutation(len(vectors))
    began = time.perf_counter()
    searcher = Searcher(vectors, Attributes(pl.DataFrame({"place": order}), ["place"]))
    built_s = time.perf_counter() - began
    built = {"tessera": built_s}
    peers: dict[str, Any] = {"flat+bitmap": faiss.IndexFlatIP(vectors.shape[1])}
    lists = max(1, min(int(4 * len(vectors) ** 0.5), len(vectors) // 39))
    quantizer = faiss.IndexFlatIP(vectors.shape[1])
    peers["IVF+bitmap"] = faiss.IndexIVFFlat(quantizer, vectors.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
    peers["HNSW"] = faiss.IndexHNSWFlat(vectors.shape[1], _LINKS, faiss.METRIC_INNER_PRODUCT)
    peers["HNSW"].hnsw.efConstruction = _BUILD
    faiss.omp_set_num_threads(2)
    for name, index in peers.items():
        began = time.perf_counter()
        index.train(vectors)
        index.add(vectors)
        built[name] = time.perf_counter() - began
    faiss.omp_set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for share in SELECTIVITIES:
        count = max(1, round(len(vectors) * share))
        held = order < count
        truth = _truth(vectors, queries, held)
        methods = _methods(searcher, peers, vectors, order, count)
        for (name, state), timing in _timed(methods, queries, truth).items():
            plan = searcher.search(queries[0], _K, _filter(count))[2] if name == "tessera" and share < 1 else None
            rows.append(
                {"selectivity": share, "method": name, "state": state, **timing,
                 "plan": plan.method if plan else None, "build_s": built[name]}
            )  # fmt: skip
    return rows


def _methods(
    searcher: Searcher, peers: dict[str, Any], vectors: NDArray[np.float32], order: NDArray[np.int64], count: int
) -> dict[tuple[str, str], Search]:
    """Returns by method and state a search among the items whose place is below `count`."""
    held, everything = order < count, count == len(order)
    probes = _probes(peers["IVF+bitmap"], vectors, held)
    options = {
        "flat+bitmap": faiss.SearchParameters,
        "IVF+bitmap": partial(faiss.SearchParametersIVF, nprobe=probes),
        "HNSW": partial(faiss.SearchParametersHNSW, efSearch=_SEARCH),
    }
    if everything:
        searches = {(name, "warm"): partial(_peer, index, options[name]()) for name, index in peers.items()}
        return {("tessera", "warm"): partial(_tessera, searcher, None), **searches}
    by_state: dict[tuple[str, str], Search] = {("tessera", "warm"): partial(_tessera, searcher, _filter(count))}
    changes, fresh = _changes(searcher, vectors, order), iter(range(1, 1_000_000))

    def changed(query: NDArray[np.float32]) -> NDArray[np.int64]:
        return _tessera(searcher, _filter(count), query)

    def cold(query: NDArray[np.float32]) -> NDArray[np.int64]:
        return _tessera(searcher, _filter(count - next(fresh) / 1e6), query)

    by_state |= {("tessera", "changed"): _Prepared(changed, changes), ("tessera", "cold"): cold}
    for name, index in peers.items():
        selector = _selector(held)
        by_state[name, "warm"] = partial(_peer, index, options[name](sel=selector))
        by_state[name, "cold"] = partial(_packing, index, options[name], held)
    return by_state


@dataclass(frozen=True)
class _Prepared:
    """Search, and the untimed preparation before each search."""

    search: Search
    before: Callable[[], None]

    def __call__(self, query: NDArray[np.float32]) -> NDArray[np.int64]:
        return self.search(query)


def _filter(count: float) -> Filter:
    # Places are whole numbers: a bound that is a little lower is another filter that matches the same items.
    return Filter.model_validate({"column": "place", "lt": count})


def _changes(searcher: Searcher, vectors: NDArray[np.float32], order: NDArray[np.int64]) -> Callable[[], None]:
    """Sends an item again, as it is, so that every search stays right."""
    numbers = iter(np.random.default_rng(0).integers(0, len(vectors), 1_000_000).tolist())

    def change() -> None:
        number = np.array([next(numbers)])
        searcher.put(number, vectors[number], [{"place": int(order[number[0]])}])

    return change


def _probes(index: Any, vectors: NDArray[np.float32], held: NDArray[np.bool_]) -> int:
    """Returns the least number of lists with which the inverted file has the recall, on items as queries."""
    queries = vectors[np.random.default_rng(1).choice(len(vectors), min(100, len(vectors)), replace=False)]
    truth = _truth(vectors, queries, held)
    total = sum(map(len, truth))
    for probes in _PROBES:
        options = faiss.SearchParametersIVF(nprobe=probes, sel=_selector(held))
        neighbours = index.search(queries, _K, params=options)[1]
        if sum(len(right & set(row.tolist())) for row, right in zip(neighbours, truth, strict=True)) >= _RECALL * total:
            return probes
    return _PROBES[-1]


def _selector(held: NDArray[np.bool_]) -> Any:
    return faiss.IDSelectorBitmap(np.packbits(np.pad(held, (0, -len(held) % 8)), bitorder="little"))


def _packing(index: Any, options: Any, held: NDArray[np.bool_], query: NDArray[np.float32]) -> NDArray[np.int64]:
    return _peer(index, options(sel=_selector(held)), query)


def _tessera(searcher: Searcher, wanted: Filter | None, query: NDArray[np.float32]) -> NDArray[np.int64]:
    return searcher.search(query, _K, wanted)[0]


def _peer(index: Any, options: Any, query: NDArray[np.float32]) -> NDArray[np.int64]:
    neighbours: NDArray[np.int64] = index.search(query[None], _K, params=options)[1][0]
    return neighbours


def _timed(
    methods: dict[tuple[str, str], Search], queries: NDArray[np.float32], truth: list[set[int]]
) -> dict[tuple[str, str], dict[str, Any]]:
    """Runs each method over all queries, twice in turns, and keeps the better of the two for each."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    times: dict[tuple[str, str], list[list[float]]] = {name: [] for name in methods}
    for _ in range(2):
        for name, search in methods.items():
            before = search.before if isinstance(search, _Prepared) else None
            for query in queries[:_WARM]:
                search(query)
            took, hits, total = [], 0, 0
            for query, right in zip(queries, truth, strict=True):
                if before:
                    before()
                began = time.perf_counter()
                numbers = search(query)
                took.append(1_000 * (time.perf_counter() - began))
                hits, total = hits + len(right & set(numbers.tolist())), total + len(right)
            times[name].append(took)
            best[name] = {"recall": hits / max(total, 1)}
    for name, rounds in times.items():
        p50, p99 = np.percentile(np.minimum(*map(np.array, rounds)), [50, 99])
        best[name] |= {"p50_ms": float(p50), "p99_ms": float(p99)}
    return best


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
        unit_rows: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return unit_rows

    return drawn(_ITEMS), drawn(_QUERIES)


def _some(vectors: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    chosen: NDArray[np.float32] = vectors[rng.choice(len(vectors), min(_QUERIES, len(vectors)), replace=False)]
    return chosen


def _own_vectors(dataset: Dataset, out: Path, console: Console) -> NDArray[np.float32]:
    if not dataset.has_content:
        raise TesseraError(f"bench filtered searches by content, and {dataset.name} has no items with text")
    run(dataset, out / dataset.name, load_options(dataset), console=console, registry=None, until="frame")
    items = pl.read_parquet(out / dataset.name / "frame" / "items.parquet")["content_vector"].drop_nulls()
    vectors = np.ascontiguousarray(items.to_numpy(), dtype=np.float32)
    return vectors[vectors.any(axis=1)]
