"""Tunes top layers by pairs of items; items held out inside training choose the round.

A fit that is stopped after any round goes on from its checkpoint to the same bits.

Shape letters: N texts, B pairs of a batch.
"""

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from features.durable import write_file
from features.errors import TesseraError
from features.threads import one_thread
from models.encoder.losses import PairBatch, contrastive, cuts
from models.encoder.pairs import Task
from models.encoder.tuning.layers import LayerOptions, TokenStates, TopLayers
from models.encoder.tuning.rows import HeldOut, TrainingRows, held_out_rows

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def tune_layers(
    model: Any,
    read: TokenStates,
    tasks: Sequence[Task],
    options: LayerOptions,
    *,
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[TopLayers, tuple[float, ...]]:
    """Fits the top layers of a model; each batch is of one task.

    Args:
        model: Opened sentence-transformers model; it stays as it is.
        read: States of the N items' texts.
        tasks: Pairs of the N items.
        options: Choices of the fit.
        checkpoint: File of the state after the last round. A fit of the same tasks and options goes on from it.
        progress: Called after each round with the number of finished rounds and the most.

    Returns:
        The layers of the best round, and the recall of held-out items before the fit and after each round, the mean
        over tasks and exits.

    Raises:
        TesseraError: A task has other rows than the states, or no pair.
    """
    for task in tasks:
        if len(task.item) != len(read.lengths) or not task.pairs:
            raise TesseraError(
                f"pairs {task.name}: {task.pairs} pairs of {len(task.item)} rows; expected pairs of the "
                f"{len(read.lengths)} items; use co-liked items, a column or a file of pairs"
            )
    with one_thread():
        fit = _LayerFit(model, read, tasks, options)
        if checkpoint is not None:
            fit.restore(checkpoint)
        while not fit.finished:
            fit.advance()
            if checkpoint is not None:
                write_file(checkpoint, fit.state())
            progress(len(fit.recalls) - 1, options.rounds)
        return fit.best_layers(), tuple(fit.recalls)


class _LayerFit:
    """State of a fit: the layers, the layers of the best round, Adam's moments, and the recalls so far."""

    def __init__(self, model: Any, read: TokenStates, tasks: Sequence[Task], options: LayerOptions) -> None:
        self._read, self._options = read, options
        self._tuned = TopLayers(model, options)
        self._adam = torch.optim.AdamW(self._tuned.parameters(), lr=options.rate)
        held_out = [held_out_rows(task, options.seed) for task in tasks]
        self._rows = [TrainingRows(task, ~rows) for task, rows in zip(tasks, held_out, strict=True)]
        self._wanted = [HeldOut(task, rows) for task, rows in zip(tasks, held_out, strict=True)]
        self._key = _key(read, tasks, options)
        self._best = copy.deepcopy(self._tuned.state_dict())
        self.recalls: list[float] = []

    @property
    def finished(self) -> bool:
        done, best = len(self.recalls) - 1, int(np.argmax(self.recalls)) if self.recalls else 0
        return done >= self._options.rounds or done - best >= self._options.patience

    def advance(self) -> None:
        """Does one round; before the first round, measures the layers as they are."""
        if not self.recalls:
            self.recalls.append(self._recall())
        number, options = len(self.recalls), self._options
        rng = np.random.default_rng([options.seed, 16, number])
        batches = [(rows, pair) for rows in self._rows for pair in rows.batches(rng, options.batch)]
        order = np.arange(len(batches)) if len(self._rows) == 1 else rng.permutation(len(batches))
        for place in order:
            rows, (first, second) = batches[place]
            known, size = rows.known(first, second), len(first)
            exits = self._tuned(*self._read.batch(np.concatenate([first, second])))
            whole = [PairBatch(own[:size], own[size:], *known) for own in exits]
            parts = [part for batch in whole for part in cuts(batch, options.prefixes)]
            share = number / options.rounds
            loss = torch.stack([contrastive(part, options.loss, share) for part in parts]).mean()
            self._adam.zero_grad()
            loss.backward()
            self._adam.step()
        self.recalls.append(self._recall())
        if self.recalls[-1] > max(self.recalls[:-1]):
            self._best = copy.deepcopy(self._tuned.state_dict())

    def _recall(self) -> float:
        vectors = self._tuned.encode(self._read).values()
        return float(np.mean([wanted.recall(own) for wanted in self._wanted for own in vectors]))

    def best_layers(self) -> TopLayers:
        """Returns the layers of the best round."""
        self._tuned.load_state_dict(self._best)
        return self._tuned

    def state(self) -> bytes:
        tensors = {f"now.{name}": tensor for name, tensor in self._tuned.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self._best.items()}
        for number, own in self._adam.state_dict()["state"].items():
            tensors |= {f"{name}.{number}": own[name] for name in _MOMENTS}
        described = msgspec.json.encode({"key": self._key, "recalls": self.recalls})
        tensors["state"] = torch.frombuffer(bytearray(described), dtype=torch.uint8)
        return bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))

    def restore(self, path: Path) -> None:
        """Continues from a state of the same fit; a missing or damaged state, or that of another fit, is ignored."""
        try:
            tensors = load(path.read_bytes())
            described: dict[str, Any] = msgspec.json.decode(tensors["state"].numpy().tobytes())
        except (OSError, SafetensorError, KeyError, msgspec.DecodeError):
            return
        if described["key"] != self._key:
            return
        self.recalls = described["recalls"]
        own = self._tuned.state_dict().keys()
        self._tuned.load_state_dict({name: tensors[f"now.{name}"] for name in own})
        self._best = {name: tensors[f"best.{name}"] for name in own}
        # A layer above the highest exit is not trained and has no moments.
        trained = [n for n in range(len(list(self._tuned.parameters()))) if f"step.{n}" in tensors]
        moments = {number: {name: tensors[f"{name}.{number}"] for name in _MOMENTS} for number in trained}
        self._adam.load_state_dict(self._adam.state_dict() | {"state": moments})


def _key(read: TokenStates, tasks: Sequence[Task], options: LayerOptions) -> str:
    digest = hashlib.sha256(msgspec.json.encode(asdict(options)))
    digest.update(read.lengths.tobytes())
    for start in range(0, len(read.states), 256):
        digest.update(np.ascontiguousarray(read.states[start : start + 256]).tobytes())
    for task in tasks:
        for array in (task.item, task.alike.indptr, task.alike.indices, task.alike.data):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
