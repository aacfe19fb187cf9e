"""Self-attention over the history (after Kang and McAuley, "SASRec", ICDM 2018, section III), as a ranker.

SASRec scores all items by the state of its last position. Here the state is one more input of an MLP, beside the
candidate and the other features, since a ranker scores given candidates.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.networks.inputs import NetworkInputs, NetworkReads
from models.networks.layers import flat, stack, within


class SelfAttention(nn.Module):
    """Blocks of causal self-attention. The MLP reads the last state, its product with the candidate, and the rest.

    Args:
        reads: Shapes of the inputs.
        blocks: Number of blocks.
        heads: Heads of a block.
        inner: Width of a state, a multiple of `heads`.
        hidden: Widths of the hidden layers over all.
    """

    sequence = True

    def __init__(
        self,
        reads: NetworkReads,
        *,
        blocks: int = 1,
        heads: int = 2,
        inner: int = 32,
        hidden: tuple[int, ...] = (128, 64),
    ) -> None:
        super().__init__()
        if inner % heads:
            raise ValueError(f"inner {inner} is no multiple of heads {heads}")
        if reads.width:
            self.item = nn.Linear(reads.width, inner)
            self.place = nn.Parameter(torch.empty(reads.history, inner).normal_(std=0.02))
            self.blocks = nn.ModuleList(_Block(inner, heads) for _ in range(blocks))
            self.last = nn.LayerNorm(inner)
        self.deep = stack(reads.flat + (2 * inner if reads.width else 0), hidden)
        self.head = nn.Linear(hidden[-1], reads.tasks)

    def forward(self, inputs: NetworkInputs) -> Tensor:
        """See `RankerNetwork`."""
        parts = [flat(inputs)]
        if inputs.history is not None:
            assert inputs.candidate is not None
            assert inputs.visits is not None
            state = self._state(inputs.history, inputs.visits)
            parts += [state, state * self.item(inputs.candidate)]
        logits: Tensor = self.head(self.deep(torch.cat(parts, dim=1)))
        return logits.squeeze(1)

    def _state(self, history: Tensor, visits: Tensor) -> Tensor:
        """Returns the state (B, inner) at the newest item, 0 without items. Places count back from the newest item."""
        length = history.shape[1]
        places = (visits.unsqueeze(1) - 1 - torch.arange(length, device=history.device)).clamp(min=0)
        states = (self.item(history) + self.place[places]) * within(history, visits)
        for block in self.blocks:
            states = block(states)
        newest = (visits - 1).clamp(min=0).view(-1, 1, 1).expand(-1, 1, states.shape[2])
        found: Tensor = self.last(states).gather(1, newest).squeeze(1)
        return found * (visits > 0).unsqueeze(1)


class _Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each with a residual and a norm before it."""

    def __init__(self, inner: int, heads: int) -> None:
        super().__init__()
        self._heads = heads
        self.before, self.between = nn.LayerNorm(inner), nn.LayerNorm(inner)
        self.reads, self.writes = nn.Linear(inner, 3 * inner), nn.Linear(inner, inner)
        self.forward_layer = nn.Sequential(nn.Linear(inner, inner), nn.ReLU(), nn.Linear(inner, inner))

    def forward(self, states: Tensor) -> Tensor:
        batch, length, inner = states.shape
        query, key, value = (
            self.reads(self.before(states)).view(batch, length, 3, self._heads, -1).permute(2, 0, 3, 1, 4)
        )
        # A state sees older items alone, so slots behind the newest item change nothing before them.
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        states = states + self.writes(seen.transpose(1, 2).reshape(batch, length, inner))
        found: Tensor = states + self.forward_layer(self.between(states))
        return found
