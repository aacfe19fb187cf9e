"""Trains a ranker over one embedding method and scores the tensors that the method would store.

The ranker is DCN-V2 over the vectors of all fields and the numeric columns (Wang et al., WWW 2021), with Adam and early
stopping on validation log loss. After each epoch the stored tensors are loaded into a twin that has never been trained.
The twin is validated, kept and in the end tested: quantized, pruned, packed as it would be served.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from features.threads import one_thread
from models.compressed.fields import Fields, Part
from models.compressed.method import EmbeddingMethod, footprint
from models.ranker.evaluate import Quality, quality
from models.ranker.network import Network, NetworkConfig

_SCORE_ROWS = 8_192
_LOOKUP_ROWS = 4_096
_LOOKUPS = 21

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class FitConfig:
    """Training configuration, the same for all methods.

    Validation log loss may rise for an epoch and fall again. If a method stopped at the first rise, chance would decide
    more than the method does. This is the reason for the patience.
    """

    batch: int = 512
    rate: float = 1e-3
    max_epochs: int = 6
    patience: int = 2
    network: NetworkConfig = field(default_factory=lambda: NetworkConfig(cross_layers=1, cross_rank=64, hidden=(192,)))
    seed: int = 0


@dataclass(frozen=True)
class Fitted:
    """Result of a fit.

    Attributes:
        auc, log_loss: Measures on the test part, of the best epoch.
        validation_auc, validation_log_loss: Measures of the same epoch, on the part that chose it.
        bytes: Bytes of the stored tensors.
        train_seconds: Seconds of all epochs, including validation.
        lookup_ms: Median time of a lookup of 4,096 examples, on one thread.
        epochs: Number of trained epochs; the best may be up to `patience` before the last.
    """

    auc: float
    log_loss: float
    validation_auc: float
    validation_log_loss: float
    bytes: int
    train_seconds: float
    lookup_ms: float
    epochs: int


@one_thread()
def fit(
    method: EmbeddingMethod, fields: Fields, config: FitConfig, *, progress: Progress = lambda done, total: None
) -> Fitted:
    """Trains `method` in place and measures it.

    Args:
        method: Method as `at` built it.
        fields: Fields whose parts are used.
        config: Configuration of the training.
        progress: Called with (examples done, most examples in all epochs).
    """
    start = time.perf_counter()
    served = copy.deepcopy(method).eval()
    dim = served(torch.from_numpy(fields.offsets[:-1])[None]).shape[-1]
    width = len(fields.names) * dim + fields.parts["train"].numeric.shape[1]
    network = Network(width, config.network, seed=config.seed)
    optimizer = torch.optim.Adam([*method.parameters(), *network.parameters()], lr=config.rate, fused=True)
    rng = np.random.default_rng(config.seed)
    losses: list[float] = []
    best: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None
    for epoch in range(config.max_epochs):
        order = torch.from_numpy(rng.permutation(len(fields.parts["train"].labels)))
        _epoch(method, network, optimizer, fields.parts["train"], order, config, epoch, progress)
        stored = method.stored()
        served.restore(stored)
        found = _quality(served, network, fields.parts["validation"])
        losses.append(_number(found.log_loss))
        if losses[-1] == min(losses):
            best = stored, {name: tensor.clone() for name, tensor in network.state_dict().items()}
        elif len(losses) - 1 - int(np.argmin(losses)) >= config.patience:
            break
        if epoch + 1 < config.max_epochs:
            method.after_epoch(epoch)
    assert best is not None
    seconds = time.perf_counter() - start
    served.restore(best[0])
    network.load_state_dict(best[1])
    validation, test = (_quality(served, network, fields.parts[part]) for part in ("validation", "test"))
    return Fitted(
        auc=_number(test.auc),
        log_loss=_number(test.log_loss),
        validation_auc=_number(validation.auc),
        validation_log_loss=_number(validation.log_loss),
        bytes=footprint(best[0]),
        train_seconds=seconds,
        lookup_ms=_lookup_ms(served, fields.parts["train"].codes),
        epochs=len(losses),
    )


def _epoch(
    method: EmbeddingMethod,
    network: Network,
    optimizer: torch.optim.Optimizer,
    part: Part,
    order: Tensor,
    config: FitConfig,
    epoch: int,
    progress: Progress,
) -> None:
    codes, numeric, labels = (torch.from_numpy(column)[order] for column in (part.codes, part.numeric, part.labels))
    size = len(order)
    steps = -(-size // config.batch)
    method.train()
    for number, at in enumerate(range(0, size, config.batch)):
        rows = slice(at, at + config.batch)
        logits = network(method(codes[rows]).flatten(1), numeric[rows])
        loss = functional.binary_cross_entropy_with_logits(logits, labels[rows]) + method.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(epoch * steps + number + 1, steps)
        progress(epoch * size + min(at + config.batch, size), config.max_epochs * size)


@torch.no_grad()
def predict(method: EmbeddingMethod, network: Network, part: Part) -> NDArray[np.float32]:
    """Returns probabilities (E,) float32 of a part's examples, in order."""
    out = np.zeros(len(part.labels), dtype=np.float32)
    for at in range(0, len(out), _SCORE_ROWS):
        rows = slice(at, at + _SCORE_ROWS)
        vectors = method(torch.from_numpy(part.codes[rows])).flatten(1)
        out[rows] = torch.sigmoid(network(vectors, torch.from_numpy(part.numeric[rows]))).numpy()
    return out


def _quality(method: EmbeddingMethod, network: Network, part: Part) -> Quality:
    return quality(part.labels, predict(method, network, part))


@torch.no_grad()
def _lookup_ms(method: EmbeddingMethod, codes: NDArray[np.int64]) -> float:
    batch = torch.from_numpy(codes[:_LOOKUP_ROWS])
    taken = []
    for _ in range(_LOOKUPS):
        start = time.perf_counter()
        method(batch)
        taken.append(time.perf_counter() - start)
    return 1_000 * statistics.median(taken)


def _number(value: float | None) -> float:
    """Returns a measure as a number. The measure of a part that has one label only is NaN."""
    return float("nan") if value is None else value
