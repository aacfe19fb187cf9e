"""Coded items of a run, for the commands and the page on Semantic IDs."""

from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.errors import TesseraError
from tessera.pipeline.stage import finished_key

_TITLE = 70


@dataclass(frozen=True)
class Coded:
    """Items of a run: ids, texts, vectors (N, D) and codes (N, Q)."""

    ids: list[str]
    texts: list[str]
    vectors: NDArray[np.float32]
    codes: NDArray[np.uint16]

    def title(self, row: int) -> str:
        """Returns the first 70 characters of an item's text."""
        text = " ".join(self.texts[row].split())
        return text if len(text) <= _TITLE else text[: _TITLE - 1] + "…"


def counted(items: int) -> str:
    """Returns a count with its noun: `1 item`, `2 items`."""
    return f"{items:,} item{'' if items == 1 else 's'}"


def load_coded(run: Path) -> Coded:
    """Reads the output of the stages `encode` and `assign`.

    Raises:
        TesseraError: the directory holds no such run, or a damaged one.
    """
    from features.jobs.shard import read_shards

    for stage in ("encode", "assign"):
        finished_key(run / stage)
    coded = read_shards(run / "assign" / "codes")
    texts = read_shards(run / "encode" / "texts").select("item_id", "text")
    joined = coded.join(texts, on="item_id", how="left", maintain_order="left")
    return Coded(
        ids=joined["item_id"].to_list(),
        texts=joined["text"].fill_null("").to_list(),
        vectors=joined["vector"].to_numpy().astype(np.float32),
        codes=joined["codes"].to_numpy().astype(np.uint16),
    )


def published(path: Path, coded: Coded) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Reads published IDs.

    Args:
        path: JSON of item id → list of tokens, or a list of such lists in catalogue order.
        coded: Items of the run.

    Returns:
        Codes (M, Q), with a number for each distinct token, and the run's vectors (M, D) of the same items.

    Raises:
        TesseraError: The file has another form, or names none of the items.
    """
    try:
        document = msgspec.json.decode(path.read_bytes())
        numbers = {str(row) for row in range(len(coded.ids))}
        if isinstance(document, dict) and document.keys() == numbers != set(coded.ids):
            # The keys are numbers from 0 and no ids: rows of the catalogue.
            document = [document[str(row)] for row in range(len(coded.ids))]
        rows = list(document.items()) if isinstance(document, dict) else list(zip(coded.ids, document, strict=False))
        tokens = pl.DataFrame([list(map(str, tokens)) for _, tokens in rows], orient="row")
    except (msgspec.DecodeError, OSError, TypeError, ValueError, pl.exceptions.PolarsError) as error:
        raise TesseraError(f"{path}: expected JSON of item id → list of as many tokens each ({error})") from error
    row_of = {name: row for row, name in enumerate(coded.ids)}
    known = [(number, row_of[str(name)]) for number, (name, _) in enumerate(rows) if str(name) in row_of]
    if not known:
        raise TesseraError(f"{path}: none of its {len(rows):,} ids is an item of the run, such as {coded.ids[0]!r}")
    theirs, ours = np.array(known).T
    codes = np.stack([tokens[name].cast(pl.Categorical).to_physical().to_numpy() for name in tokens.columns], axis=1)
    return codes[theirs].astype(np.int64), coded.vectors[ours]
