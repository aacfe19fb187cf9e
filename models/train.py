"""Training a ranker on a frame: seeded, early-stopped on validation log loss, the same bits on every run.

Shape letters: E examples, B batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from features.determinism import one_thread
from features.frame import Frame
from features.history import Jagged
from models.lookup import Assembler, Entities, Examples
from models.ranker import Network, NetworkConfig, Ranker
from models.schema import Schema
from models.table.unified import UnifiedTable

_SCORE_ROWS = 8_192


@dataclass(frozen=True)
class TrainConfig:
    """How a ranker is trained."""

    batch: int = 512
    max_epochs: int = 8
    patience: int = 1
    table_rate: float = 0.1
    network_rate: float = 1e-3
    network: NetworkConfig = field(default_factory=NetworkConfig)
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """What training leaves.

    Attributes:
        ranker: as of the best epoch.
        epochs: validation log loss after each epoch.
    """

    ranker: Ranker
    epochs: tuple[float, ...]


def assembler(schema: Schema, frame: Frame, part: pl.DataFrame) -> Assembler:
    """Looks up a frame's users and items, and the events' own columns of one part."""
    return Assembler(
        schema,
        Entities(schema, "user", frame.users),
        Entities(schema, "item", frame.items),
        Entities(schema, "event", part),
    )


def examples(part: pl.DataFrame) -> Examples:
    """A part of a frame as aligned columns; `context` counts its rows."""
    history = part["history"]
    return Examples(
        user=part["user"].to_numpy().astype(np.int64),
        item=part["item"].to_numpy().astype(np.int64),
        history=Jagged(
            history.explode(empty_as_null=False).to_numpy().astype(np.int64),
            np.concatenate([[0], np.cumsum(history.list.len().to_numpy())]).astype(np.int64),
        ),
        labels=part["label"].to_numpy().astype(np.float32),
        context=np.arange(part.height, dtype=np.int64),
    )


@one_thread()
def train(
    schema: Schema,
    frame: Frame,
    config: TrainConfig,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Trained:
    """Trains on the frame's train part and keeps the epoch with the lowest log loss on its validation part.

    Args:
        progress: called with (examples done, examples in all epochs at most).
    """
    part = frame.part("train")
    source, rows = assembler(schema, frame, part), examples(part)
    held_out = frame.part("validation")
    check = assembler(schema, frame, held_out), examples(held_out)
    ranker = new_ranker(schema, config)
    optimizer = torch.optim.Adam(ranker.network.parameters(), lr=config.network_rate)
    losses: list[float] = []
    best = snapshot(ranker)
    rng = np.random.default_rng(config.seed)
    for epoch in range(config.max_epochs):
        done = epoch * len(rows)
        for index in _shuffled(len(rows), config.batch, rng):
            batch = source.batch(rows.take(index))
            loss = functional.binary_cross_entropy_with_logits(ranker(batch), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += len(index)
            progress(done, config.max_epochs * len(rows))
        found = predict(ranker, *check)
        losses.append(_log_loss(found, check[1].labels))
        if losses[-1] == min(losses):
            best = snapshot(ranker)
        elif len(losses) - 1 - int(np.argmin(losses)) >= config.patience:
            break
    restore(ranker, best)
    progress(config.max_epochs * len(rows), config.max_epochs * len(rows))
    return Trained(ranker.eval(), tuple(losses))


def new_ranker(schema: Schema, config: TrainConfig) -> Ranker:
    """An untrained ranker, decided by the configuration's seed."""
    table = UnifiedTable(schema, learning_rate=config.table_rate, seed=config.seed)
    return Ranker(table, Network(schema.width, config.network, seed=config.seed))


def _shuffled(count: int, batch: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    order = rng.permutation(count)
    for start in range(0, count, batch):
        yield order[start : start + batch]


def snapshot(ranker: Ranker) -> dict[str, Tensor]:
    """Copies the table's rows and optimizer state and the network's parameters."""
    found = {f"network.{name}": tensor.clone() for name, tensor in ranker.network.state_dict().items()}
    return found | {"table.weight": ranker.table.weight.clone(), "table.accumulator": ranker.table.accumulator.clone()}


def restore(ranker: Ranker, state: dict[str, Tensor]) -> None:
    """Puts back what `snapshot` copied."""
    prefix = "network."
    ranker.network.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    ranker.table.weight.copy_(state["table.weight"])
    ranker.table.accumulator.copy_(state["table.accumulator"])


@one_thread()
@torch.no_grad()
def predict(ranker: Ranker, source: Assembler, rows: Examples) -> NDArray[np.float32]:
    """Probabilities (E,) float32 of the examples, in order."""
    out = np.zeros(len(rows), dtype=np.float32)
    for start in range(0, len(rows), _SCORE_ROWS):
        index = np.arange(start, min(start + _SCORE_ROWS, len(rows)))
        out[index] = torch.sigmoid(ranker(source.batch(rows.take(index)))).numpy()
    return out


def _log_loss(probabilities: NDArray[np.float32], labels: NDArray[np.float32]) -> float:
    clipped = torch.from_numpy(probabilities).double().clamp(1e-7, 1 - 1e-7)
    return float(functional.binary_cross_entropy(clipped, torch.from_numpy(labels).double()))
