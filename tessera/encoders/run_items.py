"""The items of a run as fits and reports of encoders read them: vectors, texts, likes, and pairs by any source."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.content.content import contents
from features.content.kinds import load_encoder
from features.content.passages import sentences
from features.errors import DatasetError
from features.jobs.sample import take_rows
from features.jobs.shard import each_shard, read_shards
from models.encoder.likes import Likes
from models.encoder.pairs import Task, co_liked, shared_value, teacher, text_pairs
from models.semantic_id.vectors import SampledVectors, read_vectors
from tessera.pipeline.artifact import read_frame

CO_LIKED, COLUMN = "co-liked", "column:"
TEXT_PAIRS = ("ict", "bfs", "title")
SOURCES = f"{CO_LIKED}, {COLUMN}NAME, {', '.join(TEXT_PAIRS)}, or a parquet file of first, second and score"


class RunItems:
    """Items of a run with their vectors: at most the sample that encoders are fitted on.

    Attributes:
        run: Directory of the run.
        found: Vectors of the items.
        ids: Id of each item.
        known: True for each item whose vector is not zero.
        encoder_id: Id of the run's encoder.

    Args:
        run: Directory of a run with the stages `encode` and `frame`.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.found: SampledVectors = read_vectors(run / "encode" / "vectors")
        self.ids = read_shards(run / "encode" / "vectors", ["item_id"])["item_id"][self.found.rows]
        self.known: NDArray[np.bool_] = np.any(self.found.vectors, axis=1)
        self.encoder_id: str = load_encoder(run / "encode" / "encoder").id

    def tasks(self, sources: Sequence[str], seed: int) -> list[Task]:
        """Returns the task of each source."""
        return [self._task(source, seed) for source in sources]

    def _task(self, source: str, seed: int) -> Task:
        vectors = self.found.vectors
        if source == CO_LIKED:
            return co_liked(vectors, self.likes(), self.known)
        if source.startswith(COLUMN):
            return shared_value(vectors, self._values(source[len(COLUMN) :]), self.known, name=source, seed=seed)
        if source in TEXT_PAIRS:
            return self._text_pairs(source, seed)
        if source.endswith(".parquet"):
            return teacher(Path(source), vectors, self.ids.to_list(), self.known)
        raise DatasetError(f"pairs {source!r}: unknown source; expected {SOURCES}")

    def likes(self, parts: Sequence[str] = ("train",)) -> Likes:
        """Returns the likes of some parts of the frame.

        Fits read the training part alone: later events would leak into what the fit is judged by.
        """
        frame = read_frame(self.run / "frame")
        rows = frame.items.select("item_id").join(
            pl.DataFrame({"item_id": self.ids}).with_row_index("row"), on="item_id", how="left", maintain_order="left"
        )["row"]
        examples = pl.concat([frame.blocks(part).whole("user", "item", "label") for part in parts])
        liked = examples.filter(pl.col("label") == 1)
        events = liked.with_columns(row=rows[liked["item"]]).drop_nulls("row")
        return Likes(events["user"].to_numpy(), events["row"].to_numpy().astype(np.int64), len(self.ids))

    def texts(self) -> list[str]:
        """Reads the text of each item."""
        return take_rows(each_shard(self.run / "encode" / "texts", ["text"]), self.found.rows)["text"].to_list()

    def contents(self) -> list[str]:
        """Returns the content of each item, with the fields that the encoder may read."""
        return contents(take_rows(each_shard(self.run / "encode" / "texts"), self.found.rows))

    def _values(self, name: str) -> list[list[str]]:
        items = read_frame(self.run / "frame").items
        if name not in items.columns:
            there = ", ".join(column for column in items.columns if column != "item_id")
            raise DatasetError(f"pairs {COLUMN}{name}: the items have no column {name!r}; they have {there}")
        column = pl.DataFrame({"item_id": self.ids}).join(
            items.select("item_id", name), on="item_id", how="left", maintain_order="left"
        )[name]
        if isinstance(column.dtype, pl.List):
            return [value or [] for value in column.cast(pl.List(pl.String)).to_list()]
        return [[] if value is None else [value] for value in column.cast(pl.String).to_list()]

    def _text_pairs(self, source: str, seed: int) -> Task:
        """Returns two texts of each item: a sentence and the rest of its text (ict), the first sentence and a later
        sentence (bfs), or the first line and the rest (title)."""
        texts = self.texts()
        rng = np.random.default_rng([seed, 8])
        wholes, pieces, items = [], [], []
        for item, text in enumerate(texts):
            split = [part for part in text.split("\n", 1) if part.strip()] if source == "title" else sentences(text)
            if len(split) > 1 and self.known[item]:
                place = int(rng.integers(1, len(split)))
                wholes.append(" ".join(split[:place] + split[place + 1 :]) if source == "ict" else split[0])
                pieces.append(split[place])
                items.append(item)
        encoder = load_encoder(self.run / "encode" / "encoder")
        return text_pairs(source, encoder.encode(wholes), encoder.encode(pieces), np.array(items, dtype=np.int64))
