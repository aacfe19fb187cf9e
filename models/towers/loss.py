"""Softmax over the catalogue for the targets of a step: all items where they fit, else drawn ones, corrected.

Of a large catalogue the denominator has the step's targets and uniformly drawn items. An item j is among them with

    q(j) = 1 - (1 - p(j))^T · (1 - 1/N)^S        p(j): share of the targets, T targets, S draws of N items

so each logit is lowered by log q(j) (logQ: Bengio and Senécal, 2008; Yi et al., RecSys 2019). Otherwise popular items,
which are targets often, would be pushed away more often than the catalogue's softmax does. Items that the user of a
target has visited in the window are no negatives of the target.

Shape letters: T targets, C candidates, B windows, L visits, N items, W width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Candidates:
    """Items of the denominator.

    Attributes:
        items: (C,) distinct item numbers, ascending.
        log_share: (C,) float32 log q; 0 if all items are candidates.
        masked: (B, C) True where a window visits the item; None if all items are candidates.
    """

    items: NDArray[np.int64]
    log_share: NDArray[np.float32]
    masked: NDArray[np.bool_] | None = None


def drawn_candidates(
    targets: NDArray[np.int64],
    windows: NDArray[np.int64],
    known: NDArray[np.int64],
    share: NDArray[np.float64],
    count: int,
    rng: np.random.Generator,
) -> Candidates:
    """Draws the candidates of a step.

    Args:
        targets: (T,) item numbers.
        windows: (B, L) item numbers of the windows' events; negative in empty slots.
        known: (N,) items of the catalogue, ascending.
        share: Share of each item number among all targets.
        count: S.
        rng: Generator of the draws.
    """
    drawn = known[rng.integers(0, len(known), count)]
    items = np.unique(np.concatenate([targets, drawn]))
    absent = np.log1p(-np.minimum(share[items], 1 - 1e-12)) * len(targets) + np.log1p(-1 / (len(known) + 1)) * count
    place = np.minimum(np.searchsorted(items, windows), len(items) - 1)
    masked = np.zeros((len(windows), len(items)), dtype=bool)
    row, slot = np.nonzero((windows >= 0) & (items[place] == windows))
    masked[row, place[row, slot]] = True
    return Candidates(items, np.log(-np.expm1(absent)).astype(np.float32), masked)


def softmax_loss(
    states: Tensor, vectors: Tensor, targets: NDArray[np.int64], rows: NDArray[np.int64], candidates: Candidates
) -> Tensor:
    """Returns the mean cross-entropy of the targets.

    Args:
        states: (T, W) unit vectors of users, times the scale.
        vectors: (C, W) unit vectors of the candidates.
        targets: (T,) item numbers, all among the candidates.
        rows: (T,) window of each target.
        candidates: Items of the vectors.
    """
    place = torch.from_numpy(np.searchsorted(candidates.items, targets))
    logits = states @ vectors.T
    if candidates.masked is not None:
        logits = logits - torch.from_numpy(candidates.log_share)
        masked = torch.from_numpy(candidates.masked)[torch.from_numpy(rows)]
        masked[torch.arange(len(place)), place] = False
        logits = logits.masked_fill(masked, float("-inf"))
    return functional.cross_entropy(logits, place)
