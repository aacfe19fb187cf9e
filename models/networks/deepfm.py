"""DeepFM: a factorization machine and an MLP over the same vectors (Guo et al., IJCAI 2017, equations 1 to 4)."""

from torch import Tensor, nn

from models.networks.inputs import NetworkInputs, NetworkReads
from models.networks.layers import flat, stack


class DeepFm(nn.Module):
    """Logit of first order, of pairs and of the MLP, added. Several tasks share the logit of pairs.

    The paper gives each value a weight of first order. Here a linear layer reads the value's vector, since the table
    has one vector a value. The sum over pairs is divided by the number of fields: the first steps of Adagrad move a
    row so far that the sum over many fields would drown the rest.

    Args:
        reads: Shapes of the inputs.
        hidden: Widths of the MLP's hidden layers.
    """

    def __init__(self, reads: NetworkReads, *, hidden: tuple[int, ...] = (128, 64)) -> None:
        super().__init__()
        self.first = nn.Linear(reads.flat, reads.tasks)
        self.deep = stack(reads.flat, hidden)
        self.head = nn.Linear(hidden[-1], reads.tasks, bias=False)

    def forward(self, inputs: NetworkInputs) -> Tensor:
        """See `RankerNetwork`."""
        x, fields = flat(inputs), inputs.fields
        # Σ_{i<j} v_i · v_j = ½ Σ_d ((Σ_i v_id)² − Σ_i v_id²)
        pairs = 0.5 * (fields.sum(dim=1).square() - fields.square().sum(dim=1)).sum(dim=1) / fields.shape[1]
        logits: Tensor = self.first(x) + pairs.unsqueeze(1) + self.head(self.deep(x))
        return logits.squeeze(1)
