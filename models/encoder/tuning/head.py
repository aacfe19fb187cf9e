"""The head that a fit tunes: a linear or low-rank function that starts at the identity.

Shape letters: N vectors, D dim, K rank.
"""

import numpy as np
import torch
from torch.nn import functional

from features.content.step import Linear, LowRank, VectorStep
from models.encoder.tuning.options import TuneOptions


class TunedHead(torch.nn.Module):
    """Head on vectors of width D.

    Args:
        dim: D.
        options: Choices of the fit.
    """

    def __init__(self, dim: int, options: TuneOptions) -> None:
        super().__init__()
        self._low_rank = options.head == "low-rank"
        rank = min(options.rank, dim)
        draws = np.random.default_rng([options.seed, 5]).normal(size=(dim, rank)) / np.sqrt(dim)
        first = torch.from_numpy(draws.astype(np.float32)) if self._low_rank else torch.eye(dim)
        self.weights = torch.nn.ParameterList([first] + [torch.zeros(rank, dim)] * self._low_rank)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Maps vectors (N, D) to unit vectors (N, D)."""
        if self._low_rank:
            return functional.normalize(vectors + (vectors @ self.weights[0]) @ self.weights[1], dim=1)
        return functional.normalize(vectors @ self.weights[0], dim=1)

    def distance(self) -> torch.Tensor:
        """Squared distance from the identity, divided by D."""
        own = self.weights[0]
        change: torch.Tensor = own @ self.weights[1] if self._low_rank else own - torch.eye(len(own))
        return change.square().sum() / len(own)

    def step(self) -> VectorStep:
        """Returns the head as a step of a view."""
        arrays = [weight.detach().numpy() for weight in self.weights]
        return LowRank(left=arrays[0], right=arrays[1]) if self._low_rank else Linear(matrix=arrays[0])
