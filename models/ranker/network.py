"""The ranker: DCN-V2 over what the unified table returns (Wang et al., WWW 2021).

    x = [pooled lookups, attended history, numeric (B, n), projected content]      logit = w · [cross(x), MLP(x)]

Crosses are low-rank (eq. 3 of the paper); cross nets and MLP are TorchRec's (see `models.ranker.dcn`).

Shape letters: B batch, K lookups, D dim, L history length, W width of the attended features together.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.ranker.dcn import cross_net, mlp
from models.ranker.placement import PlacementPath
from models.table.batch import Batch
from models.table.reference import EmbeddingTable
from models.table.schema import Schema


@dataclass(frozen=True)
class NetworkConfig:
    """Shape of the dense part.

    Attributes:
        cross_layers, cross_rank: Layers and rank of the cross net.
        hidden: Widths of the MLP's layers.
        attention: Width of the keys and queries with which a history is weighed.
        content: Width to which an item's content vector is projected.
    """

    cross_layers: int = 2
    cross_rank: int = 64
    hidden: tuple[int, ...] = (128, 64)
    attention: int = 32
    content: int = 32


class Network(nn.Module):
    """DCN-V2 in parallel form: inputs (B, ·) float32 that together are (B, width), logits (B,) out.

    Args:
        width: Width of the input.
        config: Layers of the network.
        seed: Seed of the initial weights.
        plain: True builds the layers without TorchRec, which takes seconds to load. The numbers are the same.
    """

    def __init__(self, width: int, config: NetworkConfig, *, seed: int = 0, plain: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.cross = cross_net(width, config.cross_layers, min(config.cross_rank, width), plain=plain)
            self.mlp = mlp(width, config.hidden, plain=plain)
            self.head = nn.Linear(width + config.hidden[-1], 1)

    def forward(self, *inputs: Tensor) -> Tensor:
        x = torch.cat(inputs, dim=1)
        # The head's two halves are applied apart: concatenating its input would copy x once more.
        of_cross, of_mlp = self.head.weight.split([x.shape[1], self.head.in_features - x.shape[1]], dim=1)
        crossed, deep = functional.linear(self.cross(x), of_cross), functional.linear(self.mlp(x), of_mlp)
        return (crossed + deep + self.head.bias).squeeze(1)


class TargetAttention(nn.Module):
    """Weighs a history by the candidate (after Zhou et al., "Deep Interest Network", KDD 2018).

        a_l = exp(s_l) / (1 + Σ exp(s)),   s_l = (Q candidate) · (K item_l) / √d,   out = Σ a_l item_l

    The 1 gives no weight to a history without relevant items, or without items.

    Args:
        width: W, of an item.
        inner: d, of keys and queries.
    """

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, inner, bias=False)
        self.key = nn.Linear(width, inner, bias=False)

    def forward(self, candidate: Tensor, items: Tensor, visits: Tensor) -> Tensor:
        """Returns (B, W) from candidates (B, W) and items (B, L, W); each example has its first `visits` (B,) items."""
        keys = self.key(items)
        scores = (keys @ self.query(candidate).unsqueeze(2)).squeeze(2) / math.sqrt(keys.shape[2])
        scores = scores.masked_fill(
            torch.arange(items.shape[1], device=items.device) >= visits.unsqueeze(1), -torch.inf
        )
        weights = torch.softmax(functional.pad(scores, (1, 0)), dim=1)[:, 1:]
        return (weights.unsqueeze(1) @ items).squeeze(1)


class DensePart(nn.Module):
    """Dense part of the ranker: all layers that follow the table.

    Args:
        schema: Outputs of the table, and the other inputs.
        config: Layers of the network.
        seed: Seed of the initial weights.
        plain: See `Network`.
    """

    def __init__(self, schema: Schema, config: NetworkConfig, *, seed: int = 0, plain: bool = False) -> None:
        super().__init__()
        self.config = config
        self._schema = schema
        self._columns: dict[str, Tensor] = {}
        columns = _columns(schema)
        self._attended = [feature for feature in schema.features if feature.pooling == "attention"]
        candidates = {feature.column: feature.name for feature in schema.of("item")}
        pooled = [columns[f.name] for f in schema.features if f.pooling != "attention"]
        unattended = torch.cat(pooled) if pooled else torch.zeros(0, dtype=torch.int64)
        self._keep_columns(plain=unattended, **{f"items_{one.name}": columns[one.name] for one in self._attended})
        width = len(unattended) + len(schema.numeric)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self._attended:
                candidate = torch.cat([columns[candidates[feature.column]] for feature in self._attended])
                self._keep_columns(candidate=candidate)
                self.attention = TargetAttention(len(candidate), config.attention)
                width += len(candidate)
            if schema.content:
                self.content = nn.Linear(schema.content, config.content)
                width += config.content
        self.network = Network(width, config, seed=seed, plain=plain)
        if schema.placement:
            self.placement = PlacementPath(schema.placement)

    def forward(self, pooled: Tensor, batch: Batch) -> Tensor:
        """Returns logits (B,) of the table's output (B, K · D) and the batch it came from.

        Without cells of the placement, the constant of the position path takes their place.
        """
        dtype = self.network.head.weight.dtype
        pooled = pooled.to(dtype)
        inputs = [pooled[:, self._columns["plain"]] if self._attended else pooled]
        if self._attended:
            slots = self._schema.history_length
            past = [self._columns[f"items_{one.name}"] for one in self._attended]
            items = torch.cat([pooled[:, own].view(len(pooled), slots, -1) for own in past], dim=2)
            assert batch.visits is not None
            inputs.append(self.attention(pooled[:, self._columns["candidate"]], items, batch.visits))
        if batch.content is not None:
            inputs.append(self.content(batch.content.to(dtype)))
        logits: Tensor = self.network(*inputs, batch.numeric.to(dtype))
        if self._schema.placement:
            path = self.placement
            logits = logits + (path.reference if batch.placement is None else path(batch.placement))
        return logits

    def _keep_columns(self, **columns: Tensor) -> None:
        self._columns |= columns

    def _apply(self, move: Callable[..., Tensor], recurse: bool = True) -> "DensePart":
        """Moves the numbers of columns with the parameters. They are no buffers: the schema decides them, so no bundle
        stores them, and no change of precision may touch them."""
        super()._apply(move, recurse)
        device = self.network.head.weight.device
        self._columns = {name: own.to(device) for name, own in self._columns.items()}
        return self


class Ranker(nn.Module):
    """Table and dense part together: a batch in, logits (B,) out."""

    def __init__(self, table: nn.Module, network: DensePart) -> None:
        super().__init__()
        self.table_module = table
        self.network = network

    @property
    def table(self) -> EmbeddingTable:
        return cast(EmbeddingTable, self.table_module)

    def forward(self, batch: Batch) -> Tensor:
        logits: Tensor = self.network(self.table(batch), batch)
        return logits


def _columns(schema: Schema) -> dict[str, Tensor]:
    """Maps each feature to its columns of the table's output."""
    found: dict[str, Tensor] = {}
    start = 0
    for feature in schema.features:
        width = schema.slots(feature) * feature.chunks * schema.dim
        found[feature.name] = torch.arange(start, start + width)
        start += width
    return found
