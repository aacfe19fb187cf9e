"""Files that the stages of a run write for one another."""

from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from features.aggregate.plan import NOTHING
from features.aggregate.stored import read_plan
from features.durable import write_file
from features.frame import Frame, stored_frame
from features.frame_blocks import shown_items
from features.jobs.shard import read_shards
from models.semantic_id.codebook.quantizer import Quantizer
from models.semantic_id.tokens import Scheme, Tokenizer, fit_tokenizer
from models.table.schema import SEMANTIC_ID

AGGREGATES = "aggregates.safetensors"
"""Name of the file in the stage `frame` that holds the plan and the state of the aggregates."""
PROFILE = "profile.json"
"""Name of the file in the stage `frame` that holds the profile of the dataset."""


def with_content(items: pl.DataFrame, assigned: Path) -> pl.DataFrame:
    """Adds the vectors and codes of the stage `assign`."""
    named = read_shards(assigned / "codes").rename({"vector": "content_vector", "codes": "semantic_codes"})
    return items.join(named, on="item_id", how="left", maintain_order="left")


def with_tokens(
    frame: Frame, scheme: Scheme, quantizer: Quantizer, *, pieces: int | None = None
) -> tuple[Frame, Tokenizer]:
    """Adds the tokens of the items' codes. Tokens by `pieces` depend on the impressions of the training part."""
    coded = frame.items["semantic_codes"].is_not_null()
    codes = frame.items["semantic_codes"].filter(coded).to_numpy().reshape(-1, quantizer.levels)
    shown = shown_items(frame.blocks("train"), frame.items.height)[coded.to_numpy()]
    tokenizer = fit_tokenizer(scheme, quantizer.levels, quantizer.codes, codes, shown, pieces=pieces)
    tokens = tokenizer.column(frame.items["semantic_codes"]).alias(SEMANTIC_ID)
    return frame.replace(items=frame.items.with_columns(tokens)), tokenizer


def read_frame(directory: Path) -> Frame:
    """Opens the frame of the stage `frame`."""
    path = directory / AGGREGATES
    # An earlier release made no aggregates.
    return stored_frame(directory, read_plan(path) if path.is_file() else NOTHING)


def write_json(path: Path, data: Any) -> None:
    """Writes indented JSON durably."""
    write_file(path, msgspec.json.format(msgspec.json.encode(data), indent=2) + b"\n")
