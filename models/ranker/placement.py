"""The position path: a bias of the logit that only the place of an item decides, beside the network.

    logit = network(table, history, content, …) + path(position, surface, …)

(Zhao et al., "Recommending What Video to Watch Next", RecSys 2019, the shallow tower; Guo et al., "PAL", RecSys 2019.)
The path reads no item and no user, and the network reads no placement. So the order of items at one place does not
depend on the path. A server has no position yet, and uses a constant: the mean of the path over the training rows.

The path is a sum of cells: one for each column, and one for each pair of the position and another column, since the
position matters differently on each surface.

Shape letters: B batch, C columns of the placement.
"""

from collections.abc import Iterable, Sequence
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.table.placement import PlacementColumn

# Adam moves a cell by about the rate of the network in a step. A curve of positions spans several units of a logit, and
# must be learnt before the items have learnt it in its place.
_GAIN = 16.0


class PlacementPath(nn.Module):
    """Bias (B,) of cells (B, C).

    Args:
        columns: C columns of the placement, C ≥ 1.

    Attributes:
        weight: (cells,) float32 weight of each cell of all terms; the bias is their sum times a gain.
        reference: () float32 constant that a server adds.
    """

    reference: Tensor

    def __init__(self, columns: Sequence[PlacementColumn]) -> None:
        super().__init__()
        self.columns = tuple(columns)
        position = [place for place, one in enumerate(columns) if one.positions]
        words = [place for place, one in enumerate(columns) if not one.positions]
        # Columns of each term.
        self._terms = [(place,) for place in range(len(columns))] + list(product(position, words))
        self._starts = [0]
        for term in self._terms:
            size = int(np.prod([columns[place].cells for place in term]))
            self._starts.append(self._starts[-1] + size)
        self.weight = nn.Parameter(torch.zeros(self._starts[-1]))
        self.register_buffer("reference", torch.zeros(()))

    def forward(self, cells: Tensor) -> Tensor:
        """Returns the bias (B,) of cells (B, C) int64."""
        found = self.weight.new_zeros(len(cells))
        for term, start in zip(self._terms, self._starts, strict=False):
            index = cells[:, term[0]]
            for place in term[1:]:
                index = index * self.columns[place].cells + cells[:, place]
            found = found + self.weight[start + index]
        return found * _GAIN

    @torch.no_grad()
    def settle(self, blocks: Iterable[NDArray[np.int64]]) -> None:
        """Sets the constant of a server to the mean of the bias over rows, given as blocks of cells (N, C)."""
        total, count = 0.0, 0
        for cells in blocks:
            total, count = total + float(self(torch.from_numpy(cells)).double().sum()), count + len(cells)
        self.reference.fill_(total / max(count, 1))

    @torch.no_grad()
    def curves(self) -> list[dict[str, str | float]]:
        """Returns the bias of each known value of each column, less the constant of a server.

        The other columns are unknown. A row has `column`, `value` and `logit`.
        """
        rows: list[dict[str, str | float]] = []
        for place, one in enumerate(self.columns):
            cells = torch.zeros((one.cells, len(self.columns)), dtype=torch.int64, device=self.weight.device)
            cells[:, place] = torch.arange(one.cells)
            biases = (self(cells) - self.reference).tolist()
            rows += [
                {"column": one.column, "value": value, "logit": bias}
                for value, bias in zip(one.values[1:], biases[1:], strict=True)
            ]
        return rows
