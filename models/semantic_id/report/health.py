"""Measures the health of a codebook over a catalogue, before a ranker learns on its codes.

Usage is an alarm, not a score: it is near 1 after any k-means start. Perplexity and the share of unique IDs measure how
evenly and how finely the catalogue is divided.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.semantic_id.codebook.quantizer import Quantizer, default_codes

_COLLAPSED = 0.5
_HELD_OUT = 0.05


@dataclass(frozen=True)
class CodebookHealth:
    """Report of one codebook over one catalogue, or over a sample of it.

    Attributes:
        items: Items that the report counts.
        levels, codes: Q and K.
        usage: Per level, share of the K codes that some item has.
        perplexity: Per level, exp of the code distribution's entropy, as a share of K.
        unique: Distinct Semantic IDs over items.
        largest_group: Items that share the most crowded Semantic ID.
        error: By name of an item set, squared reconstruction error over the set's squared distance from its mean.
        collapsed: Levels (from 1) that use under half of the codes they could use.
    """

    items: int
    levels: int
    codes: int
    usage: tuple[float, ...]
    perplexity: tuple[float, ...]
    unique: float
    largest_group: int
    error: dict[str, float]
    collapsed: tuple[int, ...]


def held_out_items(items: int, seed: int) -> NDArray[np.bool_]:
    """Returns a mask (N,) of the items a codebook is not fitted on, so that its error can be measured on them."""
    return np.random.default_rng(seed).random(items) < _HELD_OUT


def codebook_health(
    quantizer: Quantizer, codes: NDArray[np.uint16], sets: Mapping[str, NDArray[np.float32]]
) -> CodebookHealth:
    """Measures a codebook.

    Args:
        quantizer: Frozen codebook.
        codes: (N, Q) codes of the catalogue, or of a sample of it.
        sets: Vectors (n, D) whose error to report, by name, such as `fitted` and `held_out`.
    """
    usage, perplexity = [], []
    for level in range(quantizer.levels):
        counts = np.bincount(codes[:, level], minlength=quantizer.codes)
        share = counts[counts > 0] / len(codes)
        usage.append(float((counts > 0).mean()))
        perplexity.append(float(np.exp(-(share * np.log(share)).sum()) / quantizer.codes))
    _, sizes = np.unique(codes, axis=0, return_counts=True)
    reachable = min(1.0, len(codes) / quantizer.codes)
    return CodebookHealth(
        items=len(codes),
        levels=quantizer.levels,
        codes=quantizer.codes,
        usage=tuple(usage),
        perplexity=tuple(perplexity),
        unique=len(sizes) / len(codes),
        largest_group=int(sizes.max()),
        error={name: relative_error(quantizer, vectors) for name, vectors in sets.items() if len(vectors)},
        collapsed=tuple(level + 1 for level, used in enumerate(usage) if used < _COLLAPSED * reachable),
    )


def relative_error(quantizer: Quantizer, vectors: NDArray[np.float32]) -> float:
    """Returns squared reconstruction error over squared distance from the mean: 0 is perfect, 1 predicts the mean."""
    spread = _squares(vectors - vectors.mean(axis=0))
    lost = _squares(vectors - quantizer.decode(quantizer.encode(vectors)))
    return lost / max(spread, 1e-12)


def _squares(difference: NDArray[np.float32]) -> float:
    """Sums the squares of an array, which it overwrites: a sample's vectors take half a gigabyte."""
    return float(np.square(difference, out=difference).sum())


def collapse_alarm(health: CodebookHealth) -> list[str]:
    """Returns the remedy for each collapsed level; empty if no level collapsed."""
    fewer = default_codes(health.items)
    remedy = f"codes = {fewer}" if fewer < health.codes else 'fewer codes, or quantizer = "balanced-kmeans"'
    return [
        f"level {level} of {health.levels} collapsed: it uses {health.usage[level - 1]:.0%} of its {health.codes:,} "
        f"codes; refit with {remedy}"
        + (", or with sinkhorn = 0.003 in [run.quantizer_options]" if level == health.levels else "")
        for level in health.collapsed
    ]
