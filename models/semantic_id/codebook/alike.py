"""Loss that brings the codes of alike items together, beside the error of reconstruction.

Two alike items, such as items that the same users like, shall have near codes. The quantised latents of B drawn pairs
are compared with one another by a contrastive loss: each item shall find its partner among the B partners.
Wang et al., "Learnable Item Tokenization for Generative Recommendation" (LETTER, CIKM 2024), eq. 5, with co-liked pairs
in place of a collaborative filter's vectors.

Shape letters: M pairs, B drawn pairs, D dim, H latent dim.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from features.errors import DatasetError

_TEMPERATURE = 0.1


class AlikePairs(NamedTuple):
    """Pairs of alike items.

    Attributes:
        pairs: (M, 2) int64 rows of the vectors that a codebook is fitted on.
        weight: Weight of the loss beside the reconstruction's.
    """

    pairs: NDArray[np.int64]
    weight: float


class AlikeDraws:
    """Draws batches of pairs from a generator of its own, so that other draws keep their bits.

    Args:
        alike: The pairs.
        inputs: (N, D) standardised vectors.
        size: B.
        seed: Seed of the draws.

    Raises:
        DatasetError: There is no pair, or a pair names a row that is not there.
    """

    def __init__(self, alike: AlikePairs, inputs: Tensor, size: int, seed: int) -> None:
        if not len(alike.pairs) or alike.pairs.min() < 0 or alike.pairs.max() >= len(inputs):
            raise DatasetError(f"alike: expected pairs of rows 0 to {len(inputs) - 1}, got {len(alike.pairs)} pairs")
        self.weight = alike.weight
        self._pairs = torch.from_numpy(alike.pairs)
        self._inputs = inputs
        self._size = min(size, len(alike.pairs))
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Returns the two sides of B pairs, (B, D) each."""
        drawn = torch.randint(len(self._pairs), (self._size,), generator=self._generator)
        chosen = self._pairs[drawn].to(self._inputs.device)
        return self._inputs[chosen[:, 0]], self._inputs[chosen[:, 1]]


def alike_loss(first: Tensor, second: Tensor) -> Tensor:
    """Returns the contrastive loss () of pairs of quantised latents (B, H): cross entropy in both directions."""
    scores = functional.normalize(first, dim=1) @ functional.normalize(second, dim=1).T / _TEMPERATURE
    own = torch.arange(len(scores), device=scores.device)
    return (functional.cross_entropy(scores, own) + functional.cross_entropy(scores.T, own)) / 2
