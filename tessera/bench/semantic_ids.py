"""`semantic-ids`: how fast a codebook is fitted, how fast it codes, and what it loses, beside faiss' own quantizers.

Every method fits the same vectors at several budgets, in one process with two threads, and is measured on vectors it
has not seen. By default the vectors are generated: a thousand overlapping groups on a low-dimensional sheet, unit
length, as sentence embeddings are. With a dataset they are its items' own, by the default encoder.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import faiss
import msgspec
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console

from features.content import lsa
from features.dataset import Dataset
from features.error import DatasetError
from features.table import read_items
from models.semantic_id import residual_kmeans, rqvae
from models.semantic_id.health import codebook_health
from models.semantic_id.quantizer import Quantizer
from tessera.bench.data import progress_bar, remembered
from tessera.bench.result import BenchResult, Claim, at_least, at_most

_VERSION = 1
_LEVELS, _CODES, _DIM = 3, 256, 384
_ITEMS, _HELD_OUT = 50_000, 0.1
_LSA_DIM = 128
_FAST, _PEER = "residual-kmeans", "faiss RQ, beam 1"
_RATE = 100_000


@dataclass(frozen=True)
class Measured:
    """One fit: seconds, items coded a second, errors as shares of the spread, and how the codes are used."""

    seconds: float
    encode_rate: float
    error: float
    held_out_error: float
    usage: float
    perplexity: float
    unique: float


class FaissResidual:
    """faiss' ResidualQuantizer behind our protocol, for measuring alone.

    Args:
        vectors: to fit.
        beam: codings that are followed at once.
        iterations: of k-means on each level.
    """

    levels, codes, id = _LEVELS, _CODES, "faiss-residual"

    def __init__(self, vectors: NDArray[np.float32], *, beam: int, iterations: int) -> None:
        self._quantizer = faiss.ResidualQuantizer(vectors.shape[1], _LEVELS, 8)
        self._quantizer.max_beam_size = beam
        self._quantizer.cp.niter = iterations
        self._quantizer.train(vectors)

    def encode(self, vectors: NDArray[np.float32]) -> NDArray[np.uint16]:
        found: NDArray[np.uint16] = self._quantizer.compute_codes(vectors).astype(np.uint16)
        return found

    def decode(self, codes: NDArray[np.uint16]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self._quantizer.decode(codes.astype(np.uint8))
        return found

    def save(self, directory: Path) -> None:
        raise NotImplementedError


Fit = Callable[[NDArray[np.float32], int], Quantizer]


def _kmeans(balanced: bool) -> Callable[[int], Fit]:
    def at(iterations: int) -> Fit:
        return lambda vectors, seed: residual_kmeans.fit(
            vectors, residual_kmeans.ResidualKMeansConfig(_LEVELS, _CODES, balanced, iterations, seed)
        )

    return at


def _rqvae(steps: int) -> Fit:
    return lambda vectors, seed: rqvae.fit(
        vectors, rqvae.RqVaeConfig(levels=_LEVELS, codes=_CODES, steps=steps, seed=seed)
    )


def _faiss(beam: int) -> Callable[[int], Fit]:
    return lambda iterations: lambda vectors, seed: FaissResidual(vectors, beam=beam, iterations=iterations)


# Name → how to fit at a budget, the budgets, and which of them the claims are judged at: each method's own default.
METHODS: dict[str, tuple[Callable[[int], Fit], tuple[int, ...], int]] = {
    _FAST: (_kmeans(False), (2, 5, 10, 20), 10),
    "balanced-kmeans": (_kmeans(True), (10,), 10),
    "rqvae": (_rqvae, (500, 1_500), 1_500),
    _PEER: (_faiss(1), (5, 10, 25), 25),
    "faiss RQ, beam 5": (_faiss(5), (10,), 10),
}


def semantic_ids(dataset: Dataset | None, out: Path, *, seeds: int, console: Console) -> BenchResult:
    """Measures every method at every budget in each seed; finished ones are kept in `out`.

    Args:
        dataset: whose items' vectors are coded; None for generated ones.
        seeds: how many, from 0; each decides the held-out vectors and the fits.

    Raises:
        DatasetError: the dataset has no items with text, or too few.
    """
    name = dataset.name if dataset else f"synthetic-groups-{_ITEMS}"
    vectors = _own(dataset) if dataset else generated()
    faiss.omp_set_num_threads(2)
    found: dict[tuple[str, int], list[Measured]] = {}
    jobs = [
        (method, budget, seed) for seed in range(seeds) for method, (_, all_, _) in METHODS.items() for budget in all_
    ]
    with progress_bar(console) as progress:
        task = progress.add_task("semantic-ids", total=len(jobs))
        for method, budget, seed in jobs:
            slug = "".join(letter if letter.isalnum() else "-" for letter in f"{method}-{budget}-{seed}")

            def work(method: str = method, budget: int = budget, seed: int = seed) -> dict[str, Any]:
                return asdict(measure(METHODS[method][0](budget), vectors, seed))

            decided_by = (_VERSION, name, vectors.shape, float(vectors.sum()), method, budget, seed)
            data = remembered(out / f"{slug}.json", decided_by, work)
            found.setdefault((method, budget), []).append(msgspec.convert(data, Measured))
            progress.advance(task)
    rows = [{"method": method, "budget": budget, **_mean(all_)} for (method, budget), all_ in found.items()]
    plot = out / f"semantic-ids-{name}.png"
    draw(rows, name, plot)
    return BenchResult("semantic-ids", name, seeds, rows, claims(found), str(plot))


def generated(count: int = _ITEMS, dim: int = _DIM) -> NDArray[np.float32]:
    """(count, dim) float32 unit vectors in a thousand groups of forty kinds; synthetic."""
    rng = np.random.default_rng(1)
    sheet = 48
    kinds, groups = rng.normal(size=(40, sheet)), 0.6 * rng.normal(size=(40, 25, sheet))
    kind, group = rng.integers(0, 40, count), rng.integers(0, 25, count)
    inner = kinds[kind] + groups[kind, group] + 0.5 * rng.normal(size=(count, sheet))
    vectors = inner @ rng.normal(size=(sheet, dim)) / sheet**0.5 + 0.05 * rng.normal(size=(count, dim))
    unit: NDArray[np.float32] = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return unit


def _own(dataset: Dataset) -> NDArray[np.float32]:
    items = read_items(dataset) if dataset.has_content else None
    if items is None or items.height * (1 - _HELD_OUT) < 2 * _CODES:
        raise DatasetError(f"{dataset.source}: semantic-ids needs [items] with text, {3 * _CODES} of them at least")
    texts = items["text"].fill_null("").to_list()
    return lsa.fit(texts, dim=_LSA_DIM, seed=0).encode(texts)


def measure(fit: Fit, vectors: NDArray[np.float32], seed: int) -> Measured:
    """Fits nine tenths of the vectors (N, D), measures on the rest, and codes all."""
    held_out = np.random.default_rng([seed, 1]).random(len(vectors)) < _HELD_OUT
    start = time.perf_counter()
    made = fit(vectors[~held_out], seed)
    seconds = time.perf_counter() - start
    made.encode(vectors[:1_000])
    start = time.perf_counter()
    codes = made.encode(vectors)
    rate = len(vectors) / (time.perf_counter() - start)
    health = codebook_health(made, codes, {"fitted": vectors[~held_out], "held_out": vectors[held_out]})
    return Measured(
        seconds=seconds,
        encode_rate=rate,
        error=health.error["fitted"],
        held_out_error=health.error["held_out"],
        usage=min(health.usage),
        perplexity=min(health.perplexity),
        unique=health.unique,
    )


def _mean(measured: list[Measured]) -> dict[str, float]:
    names = Measured.__dataclass_fields__
    return {name: float(np.mean([getattr(one, name) for one in measured])) for name in names}


def claims(found: dict[tuple[str, int], list[Measured]]) -> list[Claim]:
    """The fast path beside faiss, each at its own default, in the seed that speaks most against it."""
    ours, theirs = (found[name, METHODS[name][2]] for name in (_FAST, _PEER))
    pairs = list(zip(ours, theirs, strict=True))
    usage = min(one.usage for one in found["rqvae", METHODS["rqvae"][2]])
    unique = min(one.unique for one in found["rqvae", METHODS["rqvae"][2]])
    return [
        at_most(f"{_FAST}: error over that of {_PEER}", max(a.error / b.error for a, b in pairs), 1.03),
        at_most(f"{_FAST}: fit time over that of {_PEER}", max(a.seconds / b.seconds for a, b in pairs), 0.5),
        at_least(f"{_FAST}: items coded a second", min(one.encode_rate for one in ours), _RATE),
        at_least("rqvae: codes in use on the level that uses fewest", usage, 0.99),
        at_least("rqvae: distinct Semantic IDs over items", unique, 0.95),
    ]


def draw(rows: list[dict[str, Any]], name: str, path: Path) -> None:
    """Error on held-out vectors against the seconds of the fit, a line for each method."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for method in METHODS:
        own = sorted((row["seconds"], row["held_out_error"]) for row in rows if row["method"] == method)
        seconds, errors = zip(*own, strict=True)
        style = "--" if method.startswith("faiss") else "-"
        axes.plot(seconds, errors, marker="o", linestyle=style, label=method)
    axes.set(xscale="log", xlabel="seconds to fit", ylabel="squared error on held-out vectors, share of the spread")
    axes.set_title(f"Time to error on {name}, {_LEVELS} levels of {_CODES} codes", loc="left", fontweight="bold")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
