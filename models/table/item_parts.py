"""Parts of an item that a ranker may read: its id, its Semantic ID, its content vector, its declared columns."""

from collections.abc import Collection
from dataclasses import replace
from typing import Literal

from features.errors import BundleError
from models.table.schema import SEMANTIC_ID, Schema

ItemPart = Literal["id", "code", "content", "metadata"]
ITEM_PARTS: tuple[ItemPart, ...] = ("id", "code", "content", "metadata")
"""The parts, in the order in which they are named."""


def parts_of(schema: Schema) -> tuple[ItemPart, ...]:
    """Returns the parts of an item that a schema reads."""
    columns = {feature.column for feature in schema.of("item")}
    numeric = any(numeric.of == "item" for numeric in schema.numeric)
    has = {
        "id": "item_id" in columns,
        "code": SEMANTIC_ID in columns,
        "content": schema.content > 0,
        "metadata": bool(columns - {"item_id", SEMANTIC_ID}) or numeric,
    }
    return tuple(part for part in ITEM_PARTS if has[part])


def reading(schema: Schema, parts: Collection[str]) -> Schema:
    """Returns the schema that reads these parts of the candidate item; a history is read as before.

    A history that attention weighs is read through the columns that the candidate has.

    Raises:
        BundleError: A part is unknown, or the schema does not have it.
    """
    has = parts_of(schema)
    for part in parts:
        if part not in has:
            raise BundleError(f"reads: the items have no {part!r}; choose of {', '.join(has)}")
    left_out = {feature.column for feature in schema.of("item") if _part(feature.column) not in parts}

    def kept(of: str, column: str, pooling: str) -> bool:
        return column not in left_out or (of != "item" and pooling != "attention")

    return replace(
        schema,
        features=tuple(one for one in schema.features if kept(one.of, one.column, one.pooling)),
        numeric=tuple(one for one in schema.numeric if one.of != "item" or "metadata" in parts),
        content=schema.content if "content" in parts else 0,
    )


def _part(column: str) -> ItemPart:
    return {"item_id": "id", SEMANTIC_ID: "code"}.get(column, "metadata")  # type: ignore[return-value]
