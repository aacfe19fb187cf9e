"""Gradient estimators for codes, which have no gradient of their own, and balanced assignment of vectors to codes.

Shape letters: B batch, H latent dim, K codes.
"""

from torch import Tensor
from torch.nn import functional

_SINKHORN_ROUNDS = 50


def straight_through(latent: Tensor, quantized: Tensor) -> Tensor:
    """Returns the code vectors; the backward pass treats the latent as unquantized (straight-through estimator)."""
    return latent + (quantized - latent).detach()


def rotated(latent: Tensor, quantized: Tensor) -> Tensor:
    """Returns the code vectors; the backward pass uses the constant rotation and scale from the latent to them."""
    length, goal = (vectors.detach().norm(dim=1, keepdim=True).clamp_min(1e-6) for vectors in (latent, quantized))
    here, there = latent.detach() / length, quantized / goal
    between = functional.normalize(here + there, dim=1)
    along = (latent * between).sum(dim=1, keepdim=True)
    turned: Tensor = latent - 2 * along * between + 2 * (latent * here).sum(dim=1, keepdim=True) * there
    found: Tensor = goal / length * turned
    return found


def balanced_codes(distances: Tensor, epsilon: float) -> Tensor:
    """Assigns codes (B,) by distances (B, K) with Sinkhorn-Knopp: near, each code about as often (LC-Rec, eq. 7)."""
    wide = distances.double()
    low, high = wide.min(), wide.max()
    scores = -(2 * (wide - low) / (high - low).clamp_min(1e-12) - 1) / epsilon
    for _ in range(_SINKHORN_ROUNDS):
        scores = scores - scores.logsumexp(dim=0, keepdim=True)
        scores = scores - scores.logsumexp(dim=1, keepdim=True)
    return scores.argmax(dim=1)
