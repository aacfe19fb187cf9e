"""The towers' range of the unified table: the last rows, which the ranker neither reads nor trains."""

import numpy as np
import torch
from numpy.typing import NDArray

from models.ranker.network import DensePart, Ranker
from models.table.open import open_table
from models.table.schema import Schema


@torch.no_grad()
def with_reserved(
    schema: Schema, ranker: Ranker, rows: NDArray[np.float32], *, table_rate: float
) -> tuple[Schema, Ranker]:
    """Returns a ranker whose table ends with the given rows, in place of those that were reserved before.

    Args:
        schema, ranker: Ranker with its schema; they are not changed.
        rows: (R, D) rows of the range; R may be 0.
        table_rate: Learning rate of the new table.
    """
    wanted = schema.with_reserved(len(rows))
    table = open_table(wanted, learning_rate=table_rate)
    own = schema.rows - schema.reserved
    table.weight[:own] = ranker.table.weight[:own]
    table.accumulator[:own] = ranker.table.accumulator[:own]
    table.weight[own:] = torch.from_numpy(rows)
    table.accumulator[own:] = 0
    network = DensePart(wanted, ranker.network.config)
    network.load_state_dict(ranker.network.state_dict())
    return wanted, Ranker(table, network).train(ranker.training)
