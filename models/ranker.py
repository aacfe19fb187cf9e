"""The ranker: DCN-V2 over what the unified table returns (Wang et al., WWW 2021).

    x = [pooled lookups (B, K · D), numeric (B, n)]        logit = w · [cross(x), MLP(x)]

Crosses are low-rank (eq. 3 of the paper); cross nets and MLP are TorchRec's.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torchrec.modules.crossnet import LowRankCrossNet
from torchrec.modules.mlp import MLP

from models.lookup import Batch
from models.table.unified import Table


@dataclass(frozen=True)
class NetworkConfig:
    """Shape of the dense part."""

    cross_layers: int = 2
    cross_rank: int = 64
    hidden: tuple[int, ...] = (128, 64)


class Network(nn.Module):
    """The dense part: (B, width) float32 in, logits (B,) out.

    Args:
        width: of the input.
        config: layers.
        seed: of the start.
    """

    def __init__(self, width: int, config: NetworkConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.cross = LowRankCrossNet(width, config.cross_layers, min(config.cross_rank, width))
            self.mlp = MLP(width, list(config.hidden))
            self.head = nn.Linear(width + config.hidden[-1], 1)

    def forward(self, pooled: Tensor, numeric: Tensor) -> Tensor:
        inputs = torch.cat([pooled, numeric], dim=1)
        logits: Tensor = self.head(torch.cat([self.cross(inputs), self.mlp(inputs)], dim=1)).squeeze(1)
        return logits


class Ranker(nn.Module):
    """Table and network together: a batch in, logits (B,) out."""

    def __init__(self, table: nn.Module, network: Network) -> None:
        super().__init__()
        self.table_module = table
        self.network = network

    @property
    def table(self) -> Table:
        return cast(Table, self.table_module)

    def forward(self, batch: Batch) -> Tensor:
        logits: Tensor = self.network(self.table(batch), batch.numeric)
        return logits
