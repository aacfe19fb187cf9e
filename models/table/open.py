"""Opens the table to train: TorchRec's fused table, or its plain twin if TorchRec is not installed."""

from typing import TYPE_CHECKING

from features.device import CPU, Device
from models.table.engine import fused
from models.table.reference import ReferenceTable, RowPrecision
from models.table.schema import Schema

if TYPE_CHECKING:
    from models.table.unified import UnifiedTable


def open_table(
    schema: Schema,
    *,
    learning_rate: float,
    seed: int = 0,
    device: Device = CPU,
    precision: RowPrecision = "float32",
) -> "ReferenceTable | UnifiedTable":
    """Returns an untrained table. Both kinds give the same numbers; the fused table is much faster.

    Raises:
        TesseraError: TorchRec is installed, but does not load.
        DeviceError: The card does not hold the table, or a processor is asked for rows of 16 bits.
    """
    module = fused("models.table.unified")
    if module is None:
        return ReferenceTable(schema, learning_rate=learning_rate, seed=seed)
    table: UnifiedTable = module.UnifiedTable(
        schema, learning_rate=learning_rate, seed=seed, device=device, precision=precision
    )
    return table
