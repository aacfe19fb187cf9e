"""Which table trains here: TorchRec's fused one, or its plain twin where fbgemm cannot be had."""

from models.schema import Schema
from models.table.reference import ReferenceTable

try:
    from models.table.unified import UnifiedTable as _Table
except ImportError:
    _Table = ReferenceTable  # type: ignore[assignment, misc]


def open_table(schema: Schema, *, learning_rate: float, seed: int = 0) -> "ReferenceTable | _Table":
    """An untrained table; both kinds give the same numbers, the fused one much faster."""
    return _Table(schema, learning_rate=learning_rate, seed=seed)
