"""The unified embedding table: one TorchRec table that every categorical feature reads.

Feature multiplexing (Coleman et al., "Unified Embedding", NeurIPS 2023): each feature does some salted lookups into
one row range and concatenates them. Row-wise Adagrad runs fused in the backward pass, so a step touches only the
rows that a batch read, and fbgemm's CPU kernel gives the same bits on every run.

Shape letters: B batch, K lookups, D dim, R rows, V values of a batch.
"""

import torchrec
from torch import Tensor, nn
from torch.nn import functional
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection

from features.device import CPU, Device, DeviceError
from models.table.batch import Batch
from models.table.reference import EPSILON, RowPrecision, by_example, start_rows
from models.table.schema import Schema

_ALL = "all lookups"


class UnifiedTable(nn.Module):
    """Table on TorchRec's fused kernel.

    Args:
        schema: K lookups, R rows, D dim.
        learning_rate: Rate of the fused row-wise Adagrad.
        seed: Seed of the uniform start.
        device: Device of the rows.
        precision: `float16` halves the memory of the rows on a GPU; updates are rounded stochastically.
    """

    def __init__(
        self,
        schema: Schema,
        *,
        learning_rate: float,
        seed: int = 0,
        device: Device = CPU,
        precision: RowPrecision = "float32",
    ) -> None:
        super().__init__()
        if device.is_cpu and precision != "float32":
            raise DeviceError('training.row_precision: float16 rows need a GPU; use float32, or device = "cuda"')
        device.require(schema.rows * (schema.dim * (4 if precision == "float32" else 2) + 4), "the table")
        self._lookups = len(schema.keys)
        self._dim = schema.dim
        self.collection = FusedEmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name="unified",
                    num_embeddings=schema.rows,
                    embedding_dim=schema.dim,
                    feature_names=[_ALL],
                    pooling=PoolingType.SUM,
                    data_type=DataType.FP32 if precision == "float32" else DataType.FP16,
                )
            ],
            optimizer_type=torchrec.optim.RowWiseAdagrad,
            optimizer_kwargs={"lr": learning_rate, "eps": EPSILON},
            device=device.torch,
        )
        self._kernel = self.collection._emb_modules[0]._emb_module
        start_rows(self.weight, device.generator(seed))

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

    def step(self) -> None:
        """Does nothing: the backward pass has updated the rows."""

    def forward(self, batch: Batch) -> Tensor:
        if batch.offsets is not None:
            pooled: Tensor = self._kernel(batch.values, batch.offsets, per_sample_weights=batch.weights)
            return pooled.view(batch.size, -1)
        # All lookups read one table: one key with K · B bags costs half of what K keys with B bags do, and the kernel
        # without TorchRec's modules around it half of the rest.
        offsets = functional.pad(batch.lengths.cumsum(0), (1, 0))
        return by_example(self._kernel(batch.values, offsets), batch)
