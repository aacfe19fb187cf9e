"""DLRM: dot products of pairs of fields, then an MLP (Naumov et al., 2019, arXiv:1906.00091, section 2)."""

import torch
from torch import Tensor, nn

from models.networks.inputs import NetworkInputs, NetworkReads
from models.networks.layers import stack


class Dlrm(nn.Module):
    """The numbers go through an MLP to one more field. The top MLP reads that field and the products of all pairs.

    Args:
        reads: Shapes of the inputs.
        bottom: Widths of the hidden layers between the numbers and their field.
        top: Widths of the hidden layers over the products.
    """

    def __init__(
        self, reads: NetworkReads, *, bottom: tuple[int, ...] = (64,), top: tuple[int, ...] = (128, 64)
    ) -> None:
        super().__init__()
        self.bottom = stack(reads.numbers, (*bottom, reads.dim)) if reads.numbers else None
        fields = reads.fields + (self.bottom is not None)
        own = reads.dim if self.bottom is not None else 0
        self._pairs: Tensor
        self.register_buffer("_pairs", torch.tril_indices(fields, fields, -1), persistent=False)
        self.top = stack(own + fields * (fields - 1) // 2, top)
        self.head = nn.Linear(top[-1], reads.tasks)

    def forward(self, inputs: NetworkInputs) -> Tensor:
        """See `RankerNetwork`."""
        fields, parts = inputs.fields, []
        if self.bottom is not None:
            dense = self.bottom(inputs.numbers)
            fields, parts = torch.cat([dense.unsqueeze(1), fields], dim=1), [dense]
        products = fields @ fields.transpose(1, 2)
        one, two = self._pairs[0], self._pairs[1]
        logits: Tensor = self.head(self.top(torch.cat([*parts, products[:, one, two]], dim=1)))
        return logits.squeeze(1)
