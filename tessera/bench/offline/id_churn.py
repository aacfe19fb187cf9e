"""`id-churn`: what a retraining leaves of the Semantic IDs when the catalogue grows.

An old codebook is fitted on a part of the catalogue, a new one on all of it: cold with another seed, or warm from the
old one; with or without matching its names to the old ones. The items that both know are compared. The old codebook
kept as it is, the third method, changes no ID: its error on the whole catalogue is set against a refit's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from features.content import lsa
from features.dataset.descriptor import Dataset
from features.dataset.tables import read_items
from features.errors import DatasetError
from models.semantic_id.codebook import residual_kmeans, rqvae, rqvae_fit
from models.semantic_id.codebook.kinds import Kind
from models.semantic_id.codebook.match import match
from models.semantic_id.codebook.quantizer import Quantizer, default_codes
from models.semantic_id.report.compare import Comparison, compare
from models.semantic_id.report.health import relative_error
from tessera.bench.harness.data import progress_bar, remembered
from tessera.bench.harness.result import BenchResult, Claim, at_least, at_most
from tessera.pipeline.made_of import key_of

_KINDS: tuple[Kind, ...] = ("rqvae", "residual-kmeans", "balanced-kmeans")
# New items as a share of the old ones.
GROWTHS = (0.1, 0.2)
_DIM, _LEVELS = 128, 3


@dataclass(frozen=True)
class Way:
    """Method for the new codebook, with or without matched names."""

    warm: bool
    matched: bool

    @property
    def name(self) -> str:
        return f"{'warm' if self.warm else 'cold'}{', matched' if self.matched else ''}"


@dataclass(frozen=True)
class Churn:
    """Codes that one retraining kept, and errors of the frozen and the new codebook on the whole catalogue."""

    comparison: Comparison
    frozen_error: float
    refit_error: float


WAYS = tuple(Way(warm, matched) for warm, matched in product((False, True), (False, True)))


def id_churn(dataset: Dataset, out: Path, *, seeds: int, console: Console) -> BenchResult:
    """Measures every kind of codebook, growth and way in each seed; finished ones are kept in `out`.

    Args:
        dataset: Dataset with items that have text.
        seeds: Number of seeds, from 0; each decides which items are new, and the codebooks.

    Raises:
        DatasetError: the dataset has no items with text.
    """
    vectors = _vectors(dataset)
    jobs = list(product(_KINDS, GROWTHS, range(seeds)))
    found: dict[tuple[str, float, Way], list[Churn]] = {}
    with progress_bar(console) as progress:
        task = progress.add_task("id-churn", total=len(jobs))
        for kind, growth, seed in jobs:
            decided_by = (key_of(vectors.tobytes().hex()), kind, growth, seed)
            work = partial(_measured, vectors, kind, growth, seed)
            data = remembered(out / f"{kind}-{growth:g}-{seed}.json", __name__, decided_by, work)
            for way in WAYS:
                found.setdefault((kind, growth, way), []).append(msgspec.convert(data[way.name], Churn))
            progress.advance(task)
    rows = [_row(*key, churns) for key, churns in found.items()]
    return BenchResult("id-churn", dataset.name, seeds, rows, list(_claims(found)))


def _vectors(dataset: Dataset) -> NDArray[np.float32]:
    items = read_items(dataset) if dataset.has_content else None
    if items is None:
        raise DatasetError(f"{dataset.source}: id-churn needs [items] with text; this dataset has none")
    texts = items["text"].fill_null("").to_list()
    return lsa.fit(texts, dim=_DIM, seed=0).encode(texts)


def _measured(vectors: NDArray[np.float32], kind: Kind, growth: float, seed: int) -> dict[str, Any]:
    order = np.random.default_rng([seed, 1]).permutation(len(vectors))
    known = order[: round(len(vectors) / (1 + growth))]
    codes = default_codes(len(vectors))
    old = _fit(kind, vectors[known], codes, seed=seed)
    before = old.encode(vectors[known])
    frozen = relative_error(old, vectors)
    ways: dict[str, Any] = {}
    for warm in (False, True):
        new = _fit(kind, vectors, codes, seed=seed if warm else seed + 1_000, start=old if warm else None)
        own = new.encode(vectors[known])
        refit = relative_error(new, vectors)
        for matched in (False, True):
            after = match(new, own, before).encode(vectors[known]) if matched else own
            ways[Way(warm, matched).name] = asdict(Churn(compare(before, after), frozen, refit))
    return ways


def _fit(
    kind: Kind, vectors: NDArray[np.float32], codes: int, *, seed: int, start: Quantizer | None = None
) -> Quantizer:
    if kind == "rqvae":
        shape = rqvae.RqVaeConfig(levels=_LEVELS, codes=codes, seed=seed)
        return rqvae_fit.fit(vectors, shape, start=start if isinstance(start, rqvae.RqVae) else None)
    config = residual_kmeans.ResidualKMeansConfig(_LEVELS, codes, balanced=kind == "balanced-kmeans", seed=seed)
    books = start.books if isinstance(start, residual_kmeans.ResidualKMeans) else None
    return residual_kmeans.fit(vectors, config, start=books)


def _row(kind: str, growth: float, way: Way, churns: Sequence[Churn]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "codebook": kind,
        "new_items": growth,
        "way": way.name,
        "pairs_kept": float(np.mean([churn.comparison.pairs_kept for churn in churns])),
    }
    for name in ("unchanged", "rand", "mutual_information"):
        means = np.mean([getattr(churn.comparison, name) for churn in churns], axis=0)
        row |= {f"{name}_{depth}": float(mean) for depth, mean in enumerate(means, 1)}
    frozen, refit = (
        float(np.mean([getattr(churn, name) for churn in churns])) for name in ("frozen_error", "refit_error")
    )
    return row | {"frozen_error": frozen, "refit_error": refit, "frozen_over_refit": frozen / refit}


def _claims(by_way: dict[tuple[str, float, Way], list[Churn]]) -> Iterator[Claim]:
    """Judged at a growth of a tenth, warm and matched, in the seed that speaks most against it."""
    for kind in _KINDS:
        churns = by_way[kind, GROWTHS[0], Way(warm=True, matched=True)]
        kept = min(churn.comparison.pairs_kept for churn in churns)
        yield at_least(f"{kind}, a tenth more items: pairs that still share a first code", kept, 0.92)
        whole = min(churn.comparison.unchanged[-1] for churn in churns)
        yield at_least(f"{kind}, a tenth more items: items with an unchanged ID", whole, 0.83)
        cold = by_way[kind, GROWTHS[0], Way(warm=False, matched=False)]
        over = max(churn.frozen_error / churn.refit_error for churn in cold)
        yield at_most(f"{kind}, a tenth more items: error of the frozen codebook over a refit's", over, 1.03)
