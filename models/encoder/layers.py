"""Tunes the top layers of a transformer by pairs of items, from the states of the tokens below these layers.

    texts ─▶ lower layers, once ─▶ states on disk (float16) ─▶ top layers, tuned ─▶ mean of the tokens ─▶ unit vector

The lower layers run once for each text, and every step of the fit runs the top layers alone. The result is a directory
that `sentence-transformers` opens, so it is an encoder as any other.

Shape letters: N texts, L tokens, D width, B pairs of a batch.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from features.durable import write_directory
from features.errors import DatasetError
from features.threads import one_thread
from models.encoder.losses import LossOptions, PairBatch, contrastive
from models.encoder.pairs import Task
from models.encoder.tune import TrainingRows, held_out_recall, held_out_rows

_BATCH = 32


@dataclass(frozen=True)
class LayerOptions:
    """Choices of a fit.

    Attributes:
        layers: Number of top layers to tune.
        tokens: Most tokens L of a text.
        rounds: Most rounds; a round visits each item that has a pair once.
        patience: Rounds without a better one after which the fit ends.
        batch: B.
        rate: Learning rate of AdamW.
        loss: Choices of the loss.
        seed: Seed of the batches and the held-out items.
    """

    layers: int = 2
    tokens: int = 64
    rounds: int = 12
    patience: int = 2
    batch: int = 128
    rate: float = 1e-4
    loss: LossOptions = field(default_factory=LossOptions)
    seed: int = 0


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
    lower = len(top_layers(model, 0)) - options.layers
    lengths = np.ones(len(texts), dtype=np.int64)
    shape = (len(texts), options.tokens, int(transformer.config.hidden_size))
    states = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    order = np.argsort([len(text) for text in texts], kind="stable")
    with torch.inference_mode(), one_thread():
        for start in range(0, len(texts), _BATCH):
            rows = order[start : start + _BATCH]
            read = model.tokenizer(
                [texts[row] for row in rows],
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


def top_layers(model: Any, count: int) -> list[torch.nn.Module]:
    """Returns the last `count` layers of a transformer, lowest first; all layers for 0.

    Raises:
        DatasetError: The layers need more than states and a mask, or the tokens are not pooled by their mean.
    """
    transformer = model[0].auto_model
    kind = type(transformer).__name__
    if kind != "BertModel":
        raise DatasetError(f"model of kind {kind}: only layers of a BertModel can be tuned; tune a head instead")
    if model[1].pooling_mode not in ("mean", ("mean",), ["mean"]):
        raise DatasetError(
            f"model pooled by {model[1].pooling_mode}: only mean pooling can be tuned; tune a head instead"
        )
    layers = list(transformer.encoder.layer)
    if count > len(layers):
        raise DatasetError(f"layers: expected at most {len(layers)}, got {count}")
    return layers[-count:] if count else layers


class TopLayers(torch.nn.Module):
    """Copies of the top layers, and the mean of the tokens behind them."""

    def __init__(self, model: Any, count: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(copy.deepcopy(top_layers(model, count)))
        # Dropout would make a fit of few rounds noisier, and its draws would have to be kept for a repeat.
        self.eval()

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Returns unit vectors (B, D) of states (B, l, D) under a mask (B, l)."""
        unseen = (~mask)[:, None, None, :] * torch.finfo(states.dtype).min
        for layer in self.layers:
            found = layer(states, attention_mask=unseen)
            states = found[0] if isinstance(found, tuple) else found
        weights = mask[:, :, None].to(states.dtype)
        return functional.normalize((states * weights).sum(dim=1) / weights.sum(dim=1), dim=1)

    def encode(self, read: TokenStates) -> NDArray[np.float32]:
        """Returns the vectors (N, D) of all texts."""
        order = np.argsort(read.lengths, kind="stable")
        vectors = np.zeros((len(order), read.states.shape[2]), dtype=np.float32)
        with torch.inference_mode():
            for start in range(0, len(order), 4 * _BATCH):
                rows = order[start : start + 4 * _BATCH]
                vectors[rows] = self(*read.batch(rows)).numpy()
        return vectors


def tune_layers(
    model: Any,
    read: TokenStates,
    task: Task,
    options: LayerOptions,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[TopLayers, tuple[float, ...]]:
    """Fits the top layers of a model; items held out inside training choose the round.

    Args:
        model: Opened sentence-transformers model; it stays as it is.
        read: States of the N items' texts.
        task: Pairs of the N items.
        options: Choices of the fit.
        progress: Called after each round with the number of finished rounds and the most.

    Returns:
        The layers of the best round, and the recall of held-out items before the fit and after each round.
    """
    with one_thread():
        tuned = TopLayers(model, options.layers)
        adam = torch.optim.AdamW(tuned.parameters(), lr=options.rate)
        rows = TrainingRows(task, ~held_out_rows(task, options.seed))
        recalls = [held_out_recall(tuned.encode(read), task, options.seed)]
        best, kept = 0, copy.deepcopy(tuned.state_dict())
        for number in range(1, options.rounds + 1):
            rng = np.random.default_rng([options.seed, 16, number])
            for first, second in rows.batches(rng, options.batch):
                vectors = tuned(*read.batch(np.concatenate([first, second])))
                batch = PairBatch(vectors[: len(first)], vectors[len(first) :], *rows.known(first, second))
                loss = contrastive(batch, options.loss, number / options.rounds)
                adam.zero_grad()
                loss.backward()
                adam.step()
            recalls.append(held_out_recall(tuned.encode(read), task, options.seed))
            progress(number, options.rounds)
            if recalls[-1] > recalls[best]:
                best, kept = number, copy.deepcopy(tuned.state_dict())
            elif number - best >= options.patience:
                break
        tuned.load_state_dict(kept)
        return tuned, tuple(recalls)


def save_tuned(model: Any, tuned: TopLayers, directory: Path) -> None:
    """Writes the model with tuned layers into a directory that does not exist, in safetensors."""
    changed = copy.deepcopy(model)
    layers = changed[0].auto_model.encoder.layer
    for place, layer in enumerate(tuned.layers, len(layers) - len(tuned.layers)):
        layers[place].load_state_dict(layer.state_dict())
    write_directory(directory, lambda made: changed.save(str(made), create_model_card=False))
