"""DIN: each visited item is weighed by the candidate (Zhou et al., KDD 2018, equation 3 and figure 2)."""

import torch
from torch import Tensor, nn

from models.networks.inputs import NetworkInputs, NetworkReads
from models.networks.layers import flat, stack, within


class Din(nn.Module):
    """The weight of an item is an MLP of item, candidate, difference and product. The weighted items are averaged.

    The paper's activation Dice normalises over the other examples of a batch. PReLU takes its place, with a layer norm
    (Ba et al., 2016, equation 4) over the inputs. The paper's sum grows with the history, so the mean is taken.

    Args:
        reads: Shapes of the inputs.
        attention: Widths of the hidden layers of an item's weight.
        hidden: Widths of the hidden layers over all.
    """

    sequence = True

    def __init__(
        self, reads: NetworkReads, *, attention: tuple[int, ...] = (36,), hidden: tuple[int, ...] = (128, 64)
    ) -> None:
        super().__init__()
        if reads.width:
            self.weigh = stack(4 * reads.width, attention, nn.PReLU)
            self.weight = nn.Linear(attention[-1], 1)
        self.before = nn.LayerNorm(reads.flat + reads.width)
        self.deep = stack(reads.flat + reads.width, hidden, nn.PReLU)
        self.head = nn.Linear(hidden[-1], reads.tasks)

    def forward(self, inputs: NetworkInputs) -> Tensor:
        """See `RankerNetwork`."""
        parts = [flat(inputs)]
        if inputs.history is not None:
            items, visits = inputs.history, inputs.visits
            assert inputs.candidate is not None
            assert visits is not None
            target = inputs.candidate.unsqueeze(1).expand_as(items)
            weights = self.weight(self.weigh(torch.cat([items, target, items - target, items * target], dim=2)))
            # Without a visit the sum is 0.
            parts.append((weights * within(items, visits) * items).sum(dim=1) / visits.clamp(min=1).unsqueeze(1))
        logits: Tensor = self.head(self.deep(self.before(torch.cat(parts, dim=1))))
        return logits.squeeze(1)
