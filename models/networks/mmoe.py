"""MMoE: tasks share experts, and each task mixes them by a gate of its own (Ma et al., KDD 2018, equations 6 to 8)."""

import torch
from torch import Tensor, nn

from models.networks.inputs import NetworkInputs, NetworkReads
from models.networks.layers import flat, stack


class Mmoe(nn.Module):
    """Each task weighs the experts' outputs by a softmax of the input. A tower over the mixture gives its logit.

    Shape letters: X experts, H width of an expert's output.

    Args:
        reads: Shapes of the inputs.
        experts: Number X of experts.
        expert: Widths of an expert's layers; the last is H.
        tower: Widths of a task's hidden layers.
    """

    def __init__(
        self,
        reads: NetworkReads,
        *,
        experts: int = 4,
        expert: tuple[int, ...] = (64, 32),
        tower: tuple[int, ...] = (32,),
    ) -> None:
        super().__init__()
        if experts < 1:
            raise ValueError(f"experts {experts} is below 1")
        self.experts = nn.ModuleList(stack(reads.flat, expert) for _ in range(experts))
        self.gates = nn.ModuleList(nn.Linear(reads.flat, experts, bias=False) for _ in range(reads.tasks))
        self.towers = nn.ModuleList(
            nn.Sequential(stack(expert[-1], tower), nn.Linear(tower[-1], 1)) for _ in range(reads.tasks)
        )

    def forward(self, inputs: NetworkInputs) -> Tensor:
        """See `RankerNetwork`."""
        x = flat(inputs)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        logits = []
        for gate, tower in zip(self.gates, self.towers, strict=True):
            shares = torch.softmax(gate(x), dim=1).unsqueeze(1)
            logits.append(tower((shares @ outputs).squeeze(1)))
        return torch.cat(logits, dim=1).squeeze(1)
