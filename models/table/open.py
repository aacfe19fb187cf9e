"""Opens the table to train: TorchRec's fused table, or its plain twin if TorchRec is not installed."""

from typing import TYPE_CHECKING

from models.table.engine import fused
from models.table.reference import ReferenceTable
from models.table.schema import Schema

if TYPE_CHECKING:
    from models.table.unified import UnifiedTable


def open_table(schema: Schema, *, learning_rate: float, seed: int = 0) -> "ReferenceTable | UnifiedTable":
    """Returns an untrained table. Both kinds give the same numbers; the fused table is much faster.

    Raises:
        TesseraError: TorchRec is installed, but does not load.
    """
    module = fused("models.table.unified")
    kind: type[ReferenceTable | UnifiedTable] = module.UnifiedTable if module else ReferenceTable
    return kind(schema, learning_rate=learning_rate, seed=seed)
