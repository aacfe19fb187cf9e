"""The top layers of a transformer on cached states of the tokens below them.

    texts ─▶ lower layers, once ─▶ states on disk (float16) ─▶ top layers, tuned ─▶ pooling at each exit ─▶ unit vector

The lower layers run once for each text, and every step of a fit runs the top layers alone. The result is a directory
that `sentence-transformers` opens, so it is an encoder as any other.

Shape letters: N texts, L tokens, D width, B texts of a batch.
"""

import copy
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch.nn import functional

from features.content.encoder import content_id
from features.content.transformer.latent import LatentPooling, save_latent
from features.content.transformer.reading import pooling_place
from features.durable import write_directory, write_file
from features.errors import DatasetError, TesseraError
from features.threads import one_thread
from models.encoder.losses import LossOptions

_BATCH = 32


@dataclass(frozen=True)
class LayerOptions:
    """Choices of a fit of top layers.

    Attributes:
        layers: Number of top layers to tune; 0 tunes the pooling alone.
        tokens: Most tokens L of a text.
        pool: `mean`, or `latent` for latent attention, which is trained too.
        exits: Layers at which vectors leave the network, such as 5 and 6 of 6; each is trained. The last layer alone
            by default. Li et al., "2D Matryoshka Sentence Embeddings" (2024).
        prefixes: Widths at which the first values alone are trained too; none by default.
        rounds: Most rounds; a round visits each item that has a pair once.
        patience: Rounds without a better one after which the fit ends.
        batch: B, at least 2.
        rate: Learning rate of AdamW.
        loss: Choices of the loss.
        seed: Seed of the batches, the held-out items and the first weights.

    Raises:
        TesseraError: A value is out of its range, or nothing would be tuned.
    """

    layers: int = 2
    tokens: int = 64
    pool: Literal["mean", "latent"] = "mean"
    exits: tuple[int, ...] = ()
    prefixes: tuple[int, ...] = ()
    rounds: int = 12
    patience: int = 2
    batch: int = 128
    rate: float = 1e-4
    loss: LossOptions = field(default_factory=LossOptions)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pool not in ("mean", "latent"):
            raise TesseraError(f"pool: expected mean or latent, got {self.pool!r}")
        least = {"layers": 0, "tokens": 1, "rounds": 1, "patience": 1, "batch": 2, "seed": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise TesseraError(f"{name}: expected {bound} or more, got {getattr(self, name)}")
        for name in ("exits", "prefixes"):
            if any(value < 1 for value in getattr(self, name)):
                raise TesseraError(f"{name}: expected numbers of 1 or more, got {getattr(self, name)}")
        if not self.layers and self.pool == "mean":
            raise TesseraError("layers: 0 with the pool mean tunes nothing; choose layers, or the pool latent")


@dataclass(frozen=True)
class TokenStates:
    """States of the tokens below the tuned layers.

    Attributes:
        states: (N, L, D) float16, usually a memory-mapped file; 0 behind the last token.
        lengths: (N,) int64 tokens of each text, at least 1.
    """

    states: NDArray[np.float16]
    lengths: NDArray[np.int64]

    def batch(self, rows: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns states (B, l, D) float32 of some rows, cut to the longest, and their mask (B, l)."""
        lengths = self.lengths[rows]
        most = int(lengths.max(initial=1))
        states = torch.from_numpy(self.states[rows, :most].astype(np.float32))
        return states, torch.from_numpy(np.arange(most)[None, :] < lengths[:, None])


def token_states(model: Any, texts: Sequence[str], path: Path, options: LayerOptions) -> TokenStates:
    """Runs the lower layers over texts and writes the states to a file.

    Args:
        model: Opened sentence-transformers model.
        texts: N texts.
        path: File of the states, N · L · D · 2 bytes; an existing file is replaced.
        options: Choices of the fit.

    Raises:
        DatasetError: The model's layers cannot be tuned one by one; see `top_layers`.
    """
    transformer = model[0].auto_model
    lower = len(all_layers(model)) - len(top_layers(model, options.layers))
    lengths = np.ones(len(texts), dtype=np.int64)
    shape = (len(texts), options.tokens, int(transformer.config.hidden_size))
    states = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    order = np.argsort([len(text) for text in texts], kind="stable")
    with torch.inference_mode(), one_thread():
        for start in range(0, len(texts), _BATCH):
            rows = order[start : start + _BATCH]
            read = model.tokenizer(
                [str(texts[row]) for row in rows],
                padding=True,
                truncation=True,
                max_length=options.tokens,
                return_tensors="pt",
            )
            found = transformer(**read, output_hidden_states=True).hidden_states[lower]
            lengths[rows] = read["attention_mask"].sum(dim=1).numpy()
            states[rows, : found.shape[1]] = found.numpy().astype(np.float16)
    states.flush()
    return TokenStates(states, lengths)


def kept_states(model: Any, space: str, texts: Sequence[str], directory: Path, options: LayerOptions) -> TokenStates:
    """Returns the states of texts, which are made once and kept in a directory.

    Args:
        model: Opened sentence-transformers model.
        space: Id of the model's space.
        texts: N texts.
        directory: Directory of the states. States of other texts, of another model or depth are replaced.
        options: Choices of the fit.

    Raises:
        DatasetError: The model's layers cannot be tuned one by one; see `top_layers`.
    """
    parts = (space, str(options.layers), str(options.tokens), *map(str, texts))
    key = content_id("states", *(part.encode() for part in parts))
    kept, lengths, states = directory / "key", directory / "lengths.safetensors", directory / "states.npy"
    if kept.is_file() and kept.read_text(encoding="utf-8") == key:
        return TokenStates(np.load(states, mmap_mode="r"), load_file(lengths)["lengths"])
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    read = token_states(model, texts, states, options)
    save_file({"lengths": read.lengths}, lengths)
    write_file(kept, key.encode())
    return read


def all_layers(model: Any) -> list[torch.nn.Module]:
    """Returns the layers of a transformer, lowest first.

    Raises:
        DatasetError: The layers need more than states and a mask.
    """
    transformer = model[0].auto_model
    kind = type(transformer).__name__
    if kind != "BertModel":
        raise DatasetError(f"model of kind {kind}: only layers of a BertModel can be tuned; tune a head instead")
    return list(transformer.encoder.layer)


def top_layers(model: Any, count: int) -> list[torch.nn.Module]:
    """Returns the last `count` layers of a transformer, lowest first.

    Raises:
        DatasetError: The layers need more than states and a mask, the tokens are not pooled by their mean, or the
            layers are fewer.
    """
    layers = all_layers(model)
    pooling = model[pooling_place(model)].pooling_mode
    if pooling not in ("mean", ("mean",), ["mean"]):
        raise DatasetError(f"model pooled by {pooling}: only mean pooling can be tuned; tune a head instead")
    if count > len(layers):
        raise DatasetError(f"layers: expected at most {len(layers)}, got {count}")
    return layers[len(layers) - count :]


class TopLayers(torch.nn.Module):
    """Copies of the top layers, and the pooling at each exit.

    Attributes:
        total: Number of layers of the model.
        exits: Layers at which vectors leave, lowest first.
        pooling: Latent attention; None for the mean.

    Args:
        model: Opened sentence-transformers model.
        options: Choices of the fit.

    Raises:
        DatasetError: The layers cannot be tuned, or an exit is not among the states and the tuned layers.
    """

    def __init__(self, model: Any, options: LayerOptions) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(copy.deepcopy(top_layers(model, options.layers)))
        width, self.total = int(model[0].auto_model.config.hidden_size), len(all_layers(model))
        self.pooling = LatentPooling(width, seed=options.seed) if options.pool == "latent" else None
        self._lower = self.total - options.layers
        self.exits = tuple(sorted(set(options.exits))) or (self.total,)
        for one in self.exits:
            if not self._lower <= one <= self.total:
                raise DatasetError(f"exits: expected {self._lower} to {self.total}, got {one}; tune more layers")
        if self.pooling is None and self.exits[-1] == self._lower:
            raise DatasetError(f"exits: nothing is tuned up to layer {self._lower}; name an exit above it")
        # Dropout would make a fit of few rounds noisier, and its draws would have to be kept for a repeat.
        self.eval()

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        """Returns the unit vectors (B, D) at each exit, of states (B, l, D) under a mask (B, l)."""
        unseen = (~mask)[:, None, None, :] * torch.finfo(states.dtype).min
        found = [self._pooled(states, mask)] if self._lower in self.exits else []
        for number, layer in enumerate(self.layers, self._lower + 1):
            made = layer(states, attention_mask=unseen)
            states = made[0] if isinstance(made, tuple) else made
            if number in self.exits:
                found.append(self._pooled(states, mask))
        return found

    def _pooled(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if self.pooling is not None:
            return functional.normalize(self.pooling.pool(states, mask), dim=1)
        weights = mask[:, :, None].to(states.dtype)
        return functional.normalize((states * weights).sum(dim=1) / weights.sum(dim=1), dim=1)

    def encode(self, read: TokenStates) -> dict[int, NDArray[np.float32]]:
        """Returns the vectors (N, D) of all texts at each exit, by its layer."""
        order = np.argsort(read.lengths, kind="stable")
        vectors = {one: np.zeros((len(order), read.states.shape[2]), dtype=np.float32) for one in self.exits}
        with torch.inference_mode():
            for start in range(0, len(order), 4 * _BATCH):
                rows = order[start : start + 4 * _BATCH]
                for one, found in zip(self.exits, self(*read.batch(rows)), strict=True):
                    vectors[one][rows] = found.numpy()
        return vectors


def save_tuned(model: Any, tuned: TopLayers, directory: Path) -> None:
    """Writes the model with tuned layers, and its latent attention, into a directory that does not exist."""
    changed = copy.deepcopy(model)
    layers = changed[0].auto_model.encoder.layer
    for place, layer in enumerate(tuned.layers, len(layers) - len(tuned.layers)):
        layers[place].load_state_dict(layer.state_dict())

    def write(made: Path) -> None:
        changed.save(str(made), create_model_card=False)
        if tuned.pooling is not None:
            save_latent(tuned.pooling, made)

    write_directory(directory, write)
