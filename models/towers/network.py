"""The networks of the two towers: an item's parts become its vector, a user's visits and parts become another.

    item  v = unit(id · kept + codes + W [columns, numbers, content])
    user  u = unit(states(v of the visits, gaps)[newest] + id · kept + W [columns, numbers])

The visits pass blocks of causal self-attention (Kang and McAuley, "SASRec", ICDM 2018). A bias by the distance of two
visits takes the place of a position's vector, so a state depends on the visits before it alone, and a window of visits
trains all its states at once. A state also reads the time until the next visit, or until the request, in log buckets.

Shape letters: N items or users, B sequences, L visits, W width, H heads.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from models.networks.layers import within
from models.towers.config import TowerConfig

GAPS = 64
"""Buckets of the time between two visits: bucket b > 0 holds the gaps from 2^(b-1) to below 2^b."""
_START, _SCALE = 0.02, 14.0


class TowerParts(NamedTuple):
    """Parts of N items or users that a tower reads.

    Attributes:
        id: (N, W) rows of the id; 0 where training did not see the id.
        codes: (N, W) sum of the rows of the Semantic ID; None without Semantic IDs.
        rest: (N, P) pooled rows of the columns, numbers and content; P may be 0.
    """

    id: Tensor
    codes: Tensor | None
    rest: Tensor


@dataclass(frozen=True)
class TowerReads:
    """Widths P of what each tower reads beside ids and codes."""

    item: int
    user: int


class EntityTower(nn.Module):
    """Adds the parts of an item, or of a user.

    Args:
        width: W.
        rest: P.
        hidden: Share of the ids that training hides.
    """

    def __init__(self, width: int, rest: int, hidden: float) -> None:
        super().__init__()
        self._hidden = hidden
        self.rest = nn.Linear(rest, width, bias=False) if rest else None

    def forward(self, parts: TowerParts) -> Tensor:
        """Returns the sums (N, W)."""
        found = parts.id
        if self.training and self._hidden:
            found = found * (torch.rand(len(found), 1) >= self._hidden)
        if parts.codes is not None:
            found = found + parts.codes
        if self.rest is not None:
            found = found + self.rest(parts.rest)
        return found


class TowerNetwork(nn.Module):
    """Dense part of both towers.

    Args:
        config: Shape.
        reads: Widths of the inputs.
        length: L.
        seed: Seed of the initial weights.
    """

    def __init__(self, config: TowerConfig, reads: TowerReads, length: int, *, seed: int = 0) -> None:
        super().__init__()
        self._dropout, self._width = config.dropout, config.width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.item = EntityTower(config.width, reads.item, config.id_dropout)
            self.user = EntityTower(config.width, reads.user, config.user_dropout)
            self.gaps = nn.Embedding(GAPS, config.width)
            nn.init.normal_(self.gaps.weight, std=_START)
            self.blocks = nn.ModuleList(
                _VisitBlock(config.width, config.heads, length, config.dropout) for _ in range(config.blocks)
            )
            self.last = nn.LayerNorm(config.width)
            self.scale = nn.Parameter(torch.tensor(math.log(_SCALE)))

    def items(self, parts: TowerParts) -> Tensor:
        """Returns the vectors (N, W) of items; 0 for an item without any part."""
        return functional.normalize(self.item(parts), dim=1)

    def users(self, states: Tensor, parts: TowerParts) -> Tensor:
        """Returns the vectors (N, W) of users from their newest states (N, W)."""
        return functional.normalize(states + self.user(parts), dim=1)

    def users_of(self, states: Tensor, parts: TowerParts, rows: NDArray[np.int64]) -> Tensor:
        """Returns the vectors (T, W) of states (T, W), each of the user `rows` (T,) of the parts."""
        return functional.normalize(states + self.user(parts)[torch.from_numpy(rows)], dim=1)

    def states(self, visited: Tensor, gaps: Tensor, lengths: Tensor) -> Tensor:
        """Returns the state (B, L, W) after each visit; slots from `lengths` on mean nothing.

        Args:
            visited: (B, L, W) item vectors, oldest first.
            gaps: (B, L) buckets of the time until what the state predicts.
            lengths: (B,) number of visits.
        """
        found = visited * math.sqrt(self._width) + self.gaps(gaps)
        found = functional.dropout(found, self._dropout, self.training) * within(visited, lengths)
        for block in self.blocks:
            found = block(found)
        states: Tensor = self.last(found)
        return states


class _VisitBlock(nn.Module):
    """Causal self-attention with a bias by distance, then a feed-forward layer, each with a norm before it."""

    def __init__(self, width: int, heads: int, length: int, dropout: float) -> None:
        super().__init__()
        self._heads, self._dropout = heads, dropout
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.reads, self.writes = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.distance = nn.Parameter(torch.zeros(heads, length))
        self.inner = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, width))

    def forward(self, states: Tensor) -> Tensor:
        batch, length, width = states.shape
        query, key, value = (
            self.reads(self.before(states)).view(batch, length, 3, self._heads, -1).permute(2, 0, 3, 1, 4)
        )
        seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=self._bias(length))
        seen = self.writes(seen.transpose(1, 2).reshape(batch, length, width))
        states = states + functional.dropout(seen, self._dropout, self.training)
        found: Tensor = states + functional.dropout(self.inner(self.between(states)), self._dropout, self.training)
        return found

    def _bias(self, length: int) -> Tensor:
        """Returns (1, H, L, L): the bias of each older visit by its distance, minus infinity for newer visits."""
        places = torch.arange(length)
        distance = places[:, None] - places[None, :]
        bias = self.distance[:, distance.clamp(min=0)]
        return bias.masked_fill(distance < 0, float("-inf")).unsqueeze(0)


def gap_buckets(gaps: Tensor) -> Tensor:
    """Returns the buckets (…) int64 of times (…) int64 between visits; a negative time counts as none."""
    # float64 holds every gap below 2^53 exactly, so a bucket's limit never moves.
    exponents = torch.frexp(gaps.clamp(min=0).double()).exponent
    return exponents.long().clamp(max=GAPS - 1)
