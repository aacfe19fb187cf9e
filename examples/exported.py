"""Read an export back without Tessera: its schema, and training rows joined with their items by polars alone.

tessera demo --small  # makes a run under out/demo-small
tessera export out/demo-small/run --out export
python examples/exported.py export
"""

import json
import sys
from pathlib import Path

import polars as pl


def main(directory: str) -> dict[str, pl.DataFrame]:
    """Prints the columns of the items, and joins each part's examples with their items; returns the rows by part."""
    export = Path(directory)
    schema = json.loads((export / "schema.json").read_text())
    print(f"{schema['name']}, export {schema['id']}")
    for column in schema["tables"]["items"]["columns"]:
        shape = "".join(f"{'any number' if size is None else size} x " for size in column["shape"])
        models = "".join(f", by {kind} {name}" for kind, name in column["models"].items())
        print(f"  {column['name']}: {shape}{column['dtype']}{models}. {column['meaning']}")

    items = pl.read_parquet(export / "items").select("item_id", "content_vector", "semantic_codes")
    parts = {}
    for part in ("train", "validation", "test"):
        # A part is a directory: a reader of the test part opens no other file.
        examples = pl.read_parquet(export / "examples" / f"split={part}")
        parts[part] = examples.join(items, on="item_id", how="left", maintain_order="left")
        known = parts[part]["history"].list.len().mean()
        print(f"{part}: {examples.height:,} examples, {known:.1f} items in a history on average")
    return parts


if __name__ == "__main__":
    main(sys.argv[1])
