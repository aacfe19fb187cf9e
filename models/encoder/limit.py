"""The worst case of a width: the most items of which every pair can be the two nearest of some query.

Free embeddings are the best that any encoder could give: items and queries are optimised themselves, against the very
queries that are asked. If free embeddings fail at n items, no encoder of this width answers all pairs of n items.
Weller et al., "On the theoretical limitations of embedding-based retrieval" (2025), section 4.

Shape letters: n items, q = n (n - 1) / 2 pairs, D dim.
"""

import math

import numpy as np
import torch

from features.threads import one_thread

_RATE, _TEMPERATURE = 0.05, 0.05
_CUBIC = (-10.5322, 4.0309, 0.0520, 0.0037)
"""Coefficients of 1, D, D² and D³ of the published critical n, fitted there on widths of 4 to 45."""


def critical_items(dim: int) -> int:
    """Returns the published number of items at which a width stops to tell all pairs apart; 0 below width 4."""
    return max(0, round(float(np.polynomial.polynomial.polyval(dim, _CUBIC))))


def pairs_solved(items: int, dim: int, *, steps: int = 1_000, seed: int = 0) -> float:
    """Optimises free embeddings of items and of one query for each pair.

    Args:
        items: n, 3 or more.
        dim: D.
        steps: Most steps; the run ends when every pair is solved.
        seed: Decides the start.

    Returns:
        Share of the pairs whose query has its two items as its two nearest; 1.0 if all are solved.
    """
    left, right = (torch.from_numpy(one) for one in np.triu_indices(items, 1))
    rows = torch.arange(len(left))
    negative = torch.zeros(len(left), items)
    negative[rows, left] = negative[rows, right] = -torch.inf
    best = 0.0
    with one_thread():
        draw = torch.Generator().manual_seed(seed)
        documents = torch.nn.functional.normalize(torch.randn(items, dim, generator=draw)).requires_grad_()
        # A query starts between its two items.
        queries = (documents[left] + documents[right]).detach().requires_grad_()
        optimizer = torch.optim.Adam([documents, queries], lr=_RATE)
        for step in range(steps):
            scores = torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(documents).T
            lower = torch.minimum(scores[rows, left], scores[rows, right])
            solved = float(((scores + negative).max(dim=1).values < lower).float().mean())
            best = max(best, solved)
            if solved == 1.0:
                return 1.0
            for group in optimizer.param_groups:
                group["lr"] = _RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
            others = torch.logsumexp(scores / _TEMPERATURE + negative, dim=1)
            loss = sum(
                torch.nn.functional.softplus(others - scores[rows, side] / _TEMPERATURE).mean()
                for side in (left, right)
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[union-attr]
            optimizer.step()
    return best
