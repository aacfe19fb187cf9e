"""The unified embedding table: one TorchRec table that every categorical feature reads.

Feature multiplexing (Coleman et al., "Unified Embedding", NeurIPS 2023): each feature does some salted lookups into
one row range and concatenates them. Row-wise Adagrad runs fused in the backward pass, so a step touches only the
rows that a batch read, and fbgemm's CPU kernel gives the same bits on every run.

Shape letters: B batch, K lookups, D dim, R rows, V values of a batch.
"""

from typing import Protocol

import torch
import torchrec
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from models.lookup import Batch
from models.schema import Schema

# Uniform, narrow: a standard normal start costs about five points of AUC (methods: initialisation).
_INIT = 0.05


class Table(Protocol):
    """What reads and trains the rows; the fused table and its plain twin give the same numbers."""

    def __call__(self, batch: Batch) -> Tensor:
        """Returns (B, K · D) float32: per example and lookup the sum of its rows, or their mean where asked."""
        ...

    @property
    def weight(self) -> Tensor:
        """(R, D) float32, the live rows; writing to it in place changes what the next batch reads."""
        ...

    @property
    def accumulator(self) -> Tensor:
        """(R,) float32, the live row-wise Adagrad state."""
        ...


class UnifiedTable(nn.Module):
    """The table on TorchRec's fused kernel.

    Args:
        schema: K lookups, R rows, D dim.
        learning_rate: of the fused row-wise Adagrad.
        seed: of the uniform start.
    """

    def __init__(self, schema: Schema, *, learning_rate: float, seed: int = 0) -> None:
        super().__init__()
        self._keys = list(schema.keys)
        self._dim = schema.dim
        self.collection = FusedEmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name="unified",
                    num_embeddings=schema.rows,
                    embedding_dim=schema.dim,
                    feature_names=self._keys,
                    pooling=PoolingType.SUM,
                )
            ],
            optimizer_type=torchrec.optim.RowWiseAdagrad,
            optimizer_kwargs={"lr": learning_rate, "eps": 1e-8},
            device=torch.device("cpu"),
        )
        self._kernel = self.collection._emb_modules[0]._emb_module
        with torch.no_grad():
            start = torch.rand(schema.rows, schema.dim, generator=torch.Generator().manual_seed(seed))
            self.weight.copy_((start * 2 - 1) * _INIT)

    @property
    def weight(self) -> Tensor:
        found: Tensor = self._kernel.split_embedding_weights()[0].detach()
        return found

    @property
    def accumulator(self) -> Tensor:
        found: Tensor = self._kernel.split_optimizer_states()[0][0].detach()
        return found

    def set_learning_rate(self, learning_rate: float) -> None:
        """Sets the rate of the next backward pass."""
        self._kernel.set_learning_rate(learning_rate)

    def forward(self, batch: Batch) -> Tensor:
        bags = KeyedJaggedTensor(keys=self._keys, values=batch.values, lengths=batch.lengths)
        return scaled(self.collection(bags).values(), batch, self._dim)


def scaled(pooled: Tensor, batch: Batch, dim: int) -> Tensor:
    """Turns sums (B, K · D) into means where the batch says so."""
    return (pooled.view(batch.size, -1, dim) * batch.scale.unsqueeze(2)).flatten(1)
