"""Contrastive losses on a batch of pairs: hard or soft labels, and options that are off by default.

    first (B, D) ──┐
                   ├─▶ scores (B, B) / temperature ─▶ cross entropy against the targets, in both directions
    second (B, D) ─┘

Pair i of a batch is (first i, second i). The other seconds are the negatives of first i, except those that are known to
be alike. Oord et al., "Representation Learning with Contrastive Predictive Coding" (2018), eq. 4; symmetric as in
Radford et al., "CLIP" (2021).

Shape letters: B pairs of a batch, D dim, M mixed negatives.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.nn import functional

from features.errors import TesseraError

Labels = Literal["soft", "hard"]
_NEVER = -1e9


@dataclass(frozen=True)
class LossOptions:
    """Choices of the loss.

    Attributes:
        labels: `soft` makes every alike pair of the batch a target, by its likeness; `hard` makes pair i the only
            target of first i and masks the other alike pairs, which would be false negatives.
        temperature: Divisor of the cosines, above 0.
        sharpness: Power of the likeness in a soft target; 1 is in proportion, larger prefers the most alike.
        focal: Power of (1 - probability of the target) by which a pair counts; 0 is off. Lin et al., "Focal Loss"
            (2017).
        mixed: Number of negatives mixed from the hardest of each pair, 0 or more. Kalantidis et al., "Hard Negative
            Mixing" (2020).
        progressive: Extra weight of hard negatives, which grows from 0 to this value during the fit. After Wu et al.,
            "PEG: Towards Robust Text Retrieval with Progressive Learning" (2023).

    Raises:
        TesseraError: A value is out of its range.
    """

    labels: Labels = "soft"
    temperature: float = 0.07
    sharpness: float = 3.0
    focal: float = 0.0
    mixed: int = 0
    progressive: float = 0.0

    def __post_init__(self) -> None:
        if self.labels not in ("soft", "hard"):
            raise TesseraError(f"labels: expected soft or hard, got {self.labels!r}")
        for name in ("temperature", "sharpness"):
            if not getattr(self, name) > 0:
                raise TesseraError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        for name in ("focal", "mixed", "progressive"):
            if getattr(self, name) < 0:
                raise TesseraError(f"{name}: expected 0 or more, got {getattr(self, name)}")


@dataclass(frozen=True)
class PairBatch:
    """Pairs of unit vectors, and everything known about them.

    Attributes:
        first: (B, D) float32.
        second: (B, D) float32.
        alike: (B, B) likeness of first i and second j, 0 or more; above 0 on the diagonal.
        same: (B, B) True if first i and second j belong to one item.
    """

    first: torch.Tensor
    second: torch.Tensor
    alike: torch.Tensor
    same: torch.Tensor


def cuts(batch: PairBatch, prefixes: Sequence[int]) -> list[PairBatch]:
    """Returns the batch, and the batch of each prefix scaled to unit length."""
    return [
        batch,
        *(
            replace(
                batch,
                first=functional.normalize(batch.first[:, :width], dim=1),
                second=functional.normalize(batch.second[:, :width], dim=1),
            )
            for width in prefixes
        ),
    ]


def contrastive(batch: PairBatch, options: LossOptions, progress: float = 0.0) -> torch.Tensor:
    """Returns the loss of a batch, a scalar: the mean of both directions.

    Args:
        batch: Pairs.
        options: Choices of the loss.
        progress: Share of the fit that is done, 0 to 1.
    """
    scores = batch.first @ batch.second.T / options.temperature
    there = _one_way(scores, batch.alike, batch.same, options, progress, _mixed(batch.first, batch.second, options))
    back = _one_way(
        scores.T, batch.alike.T, batch.same.T, options, progress, _mixed(batch.second, batch.first, options)
    )
    return (there + back) / 2


def _one_way(
    scores: torch.Tensor,
    alike: torch.Tensor,
    same: torch.Tensor,
    options: LossOptions,
    progress: float,
    mixed: torch.Tensor | None,
) -> torch.Tensor:
    own = torch.eye(len(scores), dtype=torch.bool)
    if options.labels == "soft":
        targets = torch.where(same & ~own, 0.0, alike**options.sharpness)
        targets = targets / targets.sum(dim=1, keepdim=True)
        scores = scores.masked_fill(same & ~own, _NEVER)
    else:
        targets = own.to(scores.dtype)
        scores = scores.masked_fill((same | (alike > 0)) & ~own, _NEVER)
    if options.progressive:
        harder = 1 + options.progressive * progress * functional.relu(scores.detach() * options.temperature)
        scores = torch.where((targets > 0) | (scores <= _NEVER), scores, scores * harder)
    if mixed is not None:
        scores = torch.cat([scores, mixed], dim=1)
        targets = functional.pad(targets, (0, mixed.shape[1]))
    # A masked score has target 0, and 0 times its logarithm is 0.
    each = -(targets * torch.log_softmax(scores, dim=1)).sum(dim=1)
    if options.focal:
        hit = (targets * torch.softmax(scores, dim=1)).sum(dim=1).detach() / (targets**2).sum(dim=1)
        each = each * (1 - hit.clamp(max=1.0)) ** options.focal
    return each.mean()


def _mixed(first: torch.Tensor, second: torch.Tensor, options: LossOptions) -> torch.Tensor | None:
    """Returns the scores (B, M) of negatives mixed from the hardest seconds of each first, or None."""
    if not options.mixed:
        return None
    with torch.no_grad():
        cosines = (first @ second.T).fill_diagonal_(-1.0)
        hardest = cosines.topk(min(options.mixed + 1, len(first) - 1), dim=1).indices
    one, other = second[hardest[:, :-1]], second[hardest[:, 1:]]
    negatives = functional.normalize(one + other, dim=2)
    return torch.einsum("bd,bmd->bm", first, negatives) / options.temperature
