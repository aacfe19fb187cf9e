"""The unified table divided among processes: each holds one range of rows, trained by TorchRec's fused kernel.

TorchRec's DistributedModelParallel sends each lookup to the process that holds its row, and the pooled rows back. Its
planner does not divide rows on processors, so the plan is written here: one table, row-wise, the fused kernel.

Shape letters: B batch of this process, K lookups, D dim, R rows, r rows of this process.
"""

from typing import Any

import torch
import torch.distributed as dist
import torchrec
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward  # type: ignore[attr-defined]
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from models.ranker.network import DensePart, Ranker
from models.table.batch import Batch
from models.table.reference import EPSILON, by_example
from models.table.row_files import RowRange, row_ranges
from models.table.schema import Schema

_ALL, _NAME, _PATH = "all lookups", "unified", "table_module.collection"


class ShardedTable(nn.Module):
    """Range of the unified table's rows; `divided` gives it to TorchRec.

    Args:
        schema: K lookups, R rows, D dim.
    """

    def __init__(self, schema: Schema) -> None:
        super().__init__()
        config = EmbeddingBagConfig(
            name=_NAME,
            num_embeddings=schema.rows,
            embedding_dim=schema.dim,
            feature_names=[_ALL],
            pooling=PoolingType.SUM,
        )
        # On `meta` no row has memory: each process gets memory for its own rows from the plan.
        self.collection = torchrec.EmbeddingBagCollection(tables=[config], device=torch.device("meta"))

    @property
    def weight(self) -> Tensor:
        """(r, D) float32, the live rows of this process."""
        found: Tensor = self._kernel.split_embedding_weights()[0].detach()
        return found

    @property
    def accumulator(self) -> Tensor:
        """(r,) float32, the live row-wise Adagrad state of this process's rows."""
        found: Tensor = self._kernel.split_optimizer_states()[0][0].detach()
        return found

    def step(self) -> None:
        """Does nothing: the backward pass has updated the rows."""

    def forward(self, batch: Batch) -> Tensor:
        """Returns (B, K · D). All processes must call it together, with batches of one size."""
        bags = KeyedJaggedTensor(keys=[_ALL], values=batch.values, lengths=batch.lengths)
        return by_example(self.collection(bags).values(), batch)

    @property
    def _kernel(self) -> Any:
        # TorchRec keeps its lookups out of `modules()`.
        lookup: Any = self.collection._lookups[0]
        return getattr(lookup, "module", lookup)._emb_modules[0]._emb_module


def divided(schema: Schema, network: DensePart, *, table_rate: float) -> tuple[nn.Module, Ranker]:
    """Returns the ranker whose rows are divided among the processes of the default group, without values yet.

    Returns:
        The model to call in training, which averages the network's gradients over the processes, and the ranker inside
        it, whose table is this process's range of rows.
    """
    table = ShardedTable(schema)
    optimizer = {"lr": table_rate, "eps": EPSILON}
    _apply_optimizer_in_backward(torchrec.optim.RowWiseAdagrad, table.collection.parameters(), optimizer)
    sharder: Any = EmbeddingBagCollectionSharder()
    plan = construct_module_sharding_plan(
        table.collection,
        {_NAME: row_wise(compute_kernel=EmbeddingComputeKernel.FUSED.value)},
        sharder=sharder,
        local_size=dist.get_world_size(),
        world_size=dist.get_world_size(),
        device_type="cpu",
    )
    model = DistributedModelParallel(
        Ranker(table, network), device=torch.device("cpu"), plan=ShardingPlan(plan={_PATH: plan}), sharders=[sharder]
    )
    ranker: Ranker = model.module
    return model, ranker


def own_range(schema: Schema) -> RowRange:
    """Returns the range of rows of this process."""
    return row_ranges(schema.rows, dist.get_world_size())[dist.get_rank()]
