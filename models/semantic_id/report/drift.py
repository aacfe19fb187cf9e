"""Measures drift: do new items fit a frozen codebook as known items do?

Two signs show drift. New items are reconstructed worse (Mann-Whitney on the items' errors), or they crowd on other
codes (Jensen-Shannon divergence of the codes in use, compared with the divergence of two random draws of as many
items).

Shape letters: N vectors, D dim, Q levels, K codes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import jensenshannon
from scipy.stats import mannwhitneyu

from models.semantic_id.codebook.quantizer import Quantizer

QUANTILES = (0.5, 0.9, 0.99)
_DRAWS = 200
_LEVEL = 0.99
_WORSE = 1.15
_FEWEST = 20


@dataclass(frozen=True)
class Drift:
    """Comparison of new items with known ones.

    Attributes:
        items: Number of new items.
        known, new: Median, .9 and .99 quantile of the items' squared errors, each over the mean squared distance of the
            known items from their mean.
        p_value: Probability of errors as large or larger if both came from one distribution.
        divergence: Per level, Jensen-Shannon divergence of the codes in use, in bits, 0 to 1.
        by_chance: Per level, the bound under which 99 of 100 draws of as many items from all items stay.
        flags: Sentences about significant differences; empty if there are none.
    """

    items: int
    known: tuple[float, ...]
    new: tuple[float, ...]
    p_value: float
    divergence: tuple[float, ...]
    by_chance: tuple[float, ...]
    flags: tuple[str, ...]


def drift(quantizer: Quantizer, known: NDArray[np.float32], new: NDArray[np.float32]) -> Drift | None:
    """Compares new vectors (n, D) with known ones (N, D); None for fewer than 20 of either.

    Any codebook fits the items it was fitted on better than others. Pass known items that it was not fitted on, if
    there are enough.
    """
    if min(len(known), len(new)) < _FEWEST:
        return None
    spread = max(float(((known - known.mean(axis=0)) ** 2).sum(axis=1).mean()), 1e-12)
    codes = [quantizer.encode(vectors) for vectors in (known, new)]
    errors = [
        ((vectors - quantizer.decode(own)) ** 2).sum(axis=1) / spread
        for vectors, own in zip((known, new), codes, strict=True)
    ]
    before, after = (tuple(float(found) for found in np.quantile(error, QUANTILES)) for error in errors)
    p_value = float(mannwhitneyu(errors[1], errors[0], alternative="greater").pvalue)
    divergence, by_chance = [], []
    rng = np.random.default_rng(0)
    for level in range(quantizer.levels):
        used = [np.bincount(own[:, level], minlength=quantizer.codes).astype(np.float64) for own in codes]
        # Both are samples, so the divergence is compared with samples of the same size from one distribution.
        share = (used[0] + used[1]) / (len(known) + len(new))
        drawn = [rng.multinomial(count, share, size=_DRAWS) for count in (len(known), len(new))]
        chance = jensenshannon(*drawn, base=2, axis=1) ** 2
        divergence.append(float(jensenshannon(*used, base=2) ** 2))
        by_chance.append(float(np.quantile(chance, _LEVEL)))
    flags = []
    if p_value < 1 - _LEVEL and after[0] > _WORSE * before[0]:
        flags.append(
            f"new items are coded worse: half of them lose over {after[0]:.3f} of the spread, half of the known ones "
            f"over {before[0]:.3f}; refit the codebook"
        )
    flags += [
        f"new items crowd on other codes of level {level}: divergence {found:.3f} bits, by chance under {chance:.3f}"
        for level, (found, chance) in enumerate(zip(divergence, by_chance, strict=True), 1)
        if found > _WORSE * chance
    ]
    return Drift(len(new), before, after, p_value, tuple(divergence), tuple(by_chance), tuple(flags))
