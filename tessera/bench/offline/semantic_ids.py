"""`semantic-ids`: how fast a codebook is fitted, how fast it codes, and what it loses, beside faiss' own quantizers.

Every method fits the same vectors at several budgets with two threads, and is measured on vectors it has not seen;
vector-quantize-pytorch runs in an environment of its own. By default the vectors are generated: a thousand overlapping
groups on a low-dimensional sheet, unit length, as sentence embeddings are. With a dataset they are its items' own, by
the default encoder.
"""

import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import msgspec
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from safetensors.numpy import load_file, save_file
from scipy.stats import entropy

from features.content import lsa
from features.dataset.descriptor import Dataset
from features.dataset.tables import read_items
from features.errors import DatasetError, TesseraError
from models.semantic_id.codebook import residual_kmeans, rqvae, rqvae_fit
from models.semantic_id.codebook.quantizer import Quantizer
from tessera.bench.harness.data import progress_bar, remembered
from tessera.bench.harness.needs import RQ, Peers
from tessera.bench.harness.peer import PEER_FOLDER
from tessera.bench.harness.result import BenchResult, Claim, at_least, at_most

_LEVELS, _CODES, _DIM = 3, 256, 384
_ITEMS, _HELD_OUT = 50_000, 0.1
_LSA_DIM = 128
_FAST, _PEER = "residual-kmeans", "faiss RQ, beam 1"
# Errors this close are equal: two seeds of one method differ by as much.
_EQUAL = 1.005


@dataclass(frozen=True)
class MeasuredCodebook:
    """One fit: seconds, items coded a second, errors as shares of the spread, and how the codes are used."""

    seconds: float
    encode_rate: float
    error: float
    held_out_error: float
    usage: float
    perplexity: float
    unique: float


@dataclass(frozen=True)
class Coding:
    """Coding of the vectors by one method.

    Attributes:
        codes: (N, Q) of all vectors.
        decoded: (N, D) all vectors reconstructed.
        seconds: Seconds of the fit.
        rate: Vectors coded per second.
    """

    codes: NDArray[np.uint16]
    decoded: NDArray[np.float32]
    seconds: float
    rate: float


# A method codes all vectors (N, D) by what it fits on those where the mask (N,) is true.
Method = Callable[[NDArray[np.float32], NDArray[np.bool_], int], Coding]


def _timed(fit: Callable[[NDArray[np.float32], int], Quantizer]) -> Method:
    def work(vectors: NDArray[np.float32], fitted: NDArray[np.bool_], seed: int) -> Coding:
        start = time.perf_counter()
        codebook = fit(vectors[fitted], seed)
        seconds = time.perf_counter() - start
        codebook.encode(vectors[:1_000])
        start = time.perf_counter()
        codes = codebook.encode(vectors)
        return Coding(codes, codebook.decode(codes), seconds, len(vectors) / (time.perf_counter() - start))

    return work


def _faiss(beam: int) -> Callable[[int], Method]:
    def at(iterations: int) -> Method:
        def work(vectors: NDArray[np.float32], fitted: NDArray[np.bool_], seed: int) -> Coding:
            quantizer = faiss.ResidualQuantizer(vectors.shape[1], _LEVELS, 8)
            quantizer.max_beam_size = beam
            quantizer.cp.niter = iterations
            start = time.perf_counter()
            quantizer.train(vectors[fitted])
            seconds = time.perf_counter() - start
            start = time.perf_counter()
            codes = quantizer.compute_codes(vectors)
            rate = len(vectors) / (time.perf_counter() - start)
            return Coding(codes.astype(np.uint16), quantizer.decode(codes), seconds, rate)

        return work

    return at


def _vector_quantize(python: Path) -> Callable[[int], Method]:
    def at(steps: int) -> Method:
        def work(vectors: NDArray[np.float32], fitted: NDArray[np.bool_], seed: int) -> Coding:
            with tempfile.TemporaryDirectory() as directory:
                paths = [str(Path(directory, name)) for name in ("vectors.safetensors", "result.safetensors")]
                save_file({"fitted": vectors[fitted], "all": vectors}, paths[0])
                shape = {"levels": _LEVELS, "codes": _CODES, "steps": steps, "seed": seed}
                options = [text for name, value in shape.items() for text in (f"--{name}", str(value))]
                ended = subprocess.run(
                    [str(python), str(PEER_FOLDER / "rq.py"), *paths, *options],
                    env={**os.environ, "OMP_WAIT_POLICY": "passive"},
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if ended.returncode:
                    raise TesseraError(f"semantic-ids: vector-quantize-pytorch failed: {ended.stderr[-500:]}")
                tensors = load_file(paths[1])
            codes = tensors["codes"].astype(np.uint16)
            return Coding(codes, tensors["decoded"], float(tensors["seconds"][0]), float(tensors["rate"][0]))

        return work

    return at


def _kmeans(balanced: bool) -> Callable[[int], Method]:
    def at(iterations: int) -> Method:
        shape = residual_kmeans.ResidualKMeansConfig(_LEVELS, _CODES, balanced, iterations)
        return _timed(lambda vectors, seed: residual_kmeans.fit(vectors, replace(shape, seed=seed)))

    return at


def _rqvae(steps: int) -> Method:
    shape = rqvae.RqVaeConfig(levels=_LEVELS, codes=_CODES, steps=steps)
    return _timed(lambda vectors, seed: rqvae_fit.fit(vectors, replace(shape, seed=seed)))


# The budgets of each method, and its own default.
BUDGETS: dict[str, tuple[tuple[int, ...], int]] = {
    _FAST: ((1, 2, 5, 10, 20), 10),
    "balanced-kmeans": ((10,), 10),
    "rqvae": ((500, 1_500), 1_500),
    _PEER: ((1, 2, 5, 10, 25), 25),
    "faiss RQ, beam 5": ((10,), 10),
    RQ.name: ((200, 1_500), 1_500),
}


def methods(python: Path | None) -> dict[str, Callable[[int], Method]]:
    """Returns how to fit at a budget, by name of the method.

    Args:
        python: interpreter that has vector-quantize-pytorch; None leaves that method out.
    """
    own = {
        _FAST: _kmeans(False),
        "balanced-kmeans": _kmeans(True),
        "rqvae": _rqvae,
        _PEER: _faiss(1),
        "faiss RQ, beam 5": _faiss(5),
    }
    return own | ({RQ.name: _vector_quantize(python)} if python is not None else {})


def semantic_ids(dataset: Dataset | None, out: Path, *, seeds: int, console: Console, peers: Peers) -> BenchResult:
    """Measures every method at every budget in each seed; finished ones are kept in `out`.

    Args:
        dataset: Dataset whose items' vectors are coded; None for generated vectors.
        seeds: Number of seeds, from 0; each decides the held-out vectors and the fits.
        peers: may lack vector-quantize-pytorch; the other methods are measured all the same.

    Raises:
        DatasetError: the dataset has no items with text, or too few.
    """
    name = dataset.name if dataset else f"synthetic-groups-{_ITEMS}"
    vectors = _own(dataset) if dataset else generated()
    faiss.omp_set_num_threads(2)
    out.mkdir(parents=True, exist_ok=True)
    fits = methods(peers.python(RQ))
    by_job: dict[tuple[str, int], list[MeasuredCodebook]] = {}
    jobs = [(name, budget, seed) for seed in range(seeds) for name in fits for budget in BUDGETS[name][0]]
    with progress_bar(console) as progress:
        task = progress.add_task("semantic-ids", total=len(jobs))
        for method, budget, seed in jobs:
            slug = "".join(letter if letter.isalnum() else "-" for letter in f"{method}-{budget}-{seed}")

            def work(method: str = method, budget: int = budget, seed: int = seed) -> dict[str, Any]:
                return asdict(measure(fits[method](budget), vectors, seed))

            decided_by = (name, vectors.shape, float(vectors.sum()), method, budget, seed)
            data = remembered(out / f"{slug}.json", __name__, decided_by, work)
            by_job.setdefault((method, budget), []).append(msgspec.convert(data, MeasuredCodebook))
            progress.advance(task)
    rows = [{"method": method, "budget": budget, **_mean(all_)} for (method, budget), all_ in by_job.items()]
    plot = out / f"semantic-ids-{name}.png"
    draw(rows, name, plot)
    rows += peers.rows("method")
    judged = claims(by_job) + (rqvae_claims(by_job) if dataset else [])
    return BenchResult("semantic-ids", name, seeds, rows, judged, str(plot))


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


def measure(method: Method, vectors: NDArray[np.float32], seed: int) -> MeasuredCodebook:
    """Fits nine tenths of the vectors (N, D), measures on the rest, and codes all."""
    held_out = np.random.default_rng([seed, 1]).random(len(vectors)) < _HELD_OUT
    coding = method(vectors, ~held_out, seed)
    levels = [np.bincount(level, minlength=_CODES) / len(vectors) for level in coding.codes.T]
    perplexity = [float(np.exp(entropy(share)) / _CODES) for share in levels]
    return MeasuredCodebook(
        seconds=coding.seconds,
        encode_rate=coding.rate,
        error=_error(vectors[~held_out], coding.decoded[~held_out]),
        held_out_error=_error(vectors[held_out], coding.decoded[held_out]),
        usage=min(float((share > 0).mean()) for share in levels),
        perplexity=min(perplexity),
        unique=len(np.unique(coding.codes, axis=0)) / len(vectors),
    )


def _error(vectors: NDArray[np.float32], decoded: NDArray[np.float32]) -> float:
    return float(((vectors - decoded) ** 2).sum() / ((vectors - vectors.mean(axis=0)) ** 2).sum())


def _mean(measured: list[MeasuredCodebook]) -> dict[str, float]:
    names = MeasuredCodebook.__dataclass_fields__
    return {name: float(np.mean([getattr(codebook, name) for codebook in measured])) for name in names}


def claims(by_job: dict[tuple[str, int], list[MeasuredCodebook]]) -> list[Claim]:
    """Compares the fast path with faiss at equal error, at any budget, in the seed with the worst result.

    For each budget of faiss, the time that ours needs for an error as low is read off its curve.
    """
    ours, theirs = (
        [
            [by_job[name, budget][seed] for budget in BUDGETS[name][0]]
            for seed in range(len(by_job[name, BUDGETS[name][1]]))
        ]
        for name in (_FAST, _PEER)
    )
    pairs = list(zip(ours, theirs, strict=True))
    times = [
        seconds_to(codebook.held_out_error * _EQUAL, own) / codebook.seconds for own, peer in pairs for codebook in peer
    ]
    reached = [min(a.held_out_error for a in own) / min(b.held_out_error for b in peer) for own, peer in pairs]
    return [
        at_most(f"{_FAST}: least held-out error over the least of {_PEER}", max(reached), _EQUAL),
        at_most(
            f"{_FAST}: fit time over that of {_PEER} at equal error, its budget that is best for it", max(times), 1.0
        ),
        at_least(
            f"{_FAST}: items coded a second over those of {_PEER}",
            min(a.encode_rate for own, _ in pairs for a in own) / max(b.encode_rate for _, peer in pairs for b in peer),
            1.0,
        ),
    ]


def seconds_to(error: float, curve: list[MeasuredCodebook]) -> float:
    """Seconds at which a method's curve reaches a held-out error, between two budgets by the logarithm of time.

    Infinite where no budget reaches it; the least budget's seconds where that one is better already.
    """
    before: MeasuredCodebook | None = None
    for codebook in sorted(curve, key=lambda codebook: codebook.seconds):
        if codebook.held_out_error <= error:
            if before is None or before.held_out_error == codebook.held_out_error:
                return codebook.seconds
            share = (before.held_out_error - error) / (before.held_out_error - codebook.held_out_error)
            return float(before.seconds * (codebook.seconds / before.seconds) ** share)
        if before is None or codebook.held_out_error < before.held_out_error:
            before = codebook
    return float("inf")


def rqvae_claims(by_job: dict[tuple[str, int], list[MeasuredCodebook]]) -> list[Claim]:
    """Returns claims about the RQ-VAE's coding of a catalogue."""
    usage = min(codebook.usage for codebook in by_job["rqvae", BUDGETS["rqvae"][1]])
    unique = min(codebook.unique for codebook in by_job["rqvae", BUDGETS["rqvae"][1]])
    return [
        at_least("rqvae: codes in use on the level that uses fewest", usage, 0.99),
        at_least("rqvae: distinct Semantic IDs over items", unique, 0.95),
    ]


def draw(rows: list[dict[str, Any]], name: str, path: Path) -> None:
    """Error on held-out vectors against the seconds of the fit, a line for each method."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for method in BUDGETS:
        own = sorted((row["seconds"], row["held_out_error"]) for row in rows if row["method"] == method)
        seconds, errors = zip(*own, strict=True)
        style = "--" if method.startswith(("faiss", "vector")) else "-"
        axes.plot(seconds, errors, marker="o", linestyle=style, label=method)
    axes.set(xscale="log", xlabel="seconds to fit", ylabel="squared error on held-out vectors, share of the spread")
    axes.set_title(f"Time to error on {name}, {_LEVELS} levels of {_CODES} codes", loc="left", fontweight="bold")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
