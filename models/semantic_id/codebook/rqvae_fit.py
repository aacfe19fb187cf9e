"""Trains an RQ-VAE codebook.

These measures keep the codebook from collapsing onto a few codes:
- the autoencoder warms up unquantised, then every level's codes start from k-means on its residuals;
- dead codes move to random residuals, and training ends with a stretch free of such resets;
- that stretch ends when the error on vectors held back from training no longer falls.

Shape letters: N items, D dim, H latent dim, Q levels, K codes.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from features.device import CPU, Device
from features.errors import DatasetError
from features.threads import one_thread
from models.semantic_id.codebook.alike import AlikeDraws, AlikePairs, alike_loss
from models.semantic_id.codebook.clustering import lloyd
from models.semantic_id.codebook.quantizer import refuse_not_finite
from models.semantic_id.codebook.rqvae import RqVae, RqVaeConfig, distances, squared

_WARM_UP = 0.2
# Share of the steps at which a training from another codebook begins: after the resets, which would rename codes, and
# late, since every step moves items to other codes.
_WARM_START = 0.98
_RESETS_UNTIL = 0.7
_RESET_EVERY = 50
_CHECK_EVERY = 50
_CHECKED = 0.05  # share of the vectors on which early stopping measures the error
# A change smaller than this is within the noise of the checked vectors. Of states this close to the best, the latest is
# kept, since it fits the catalogue itself, most of what will be coded, better.
_NOISE = 0.01
_KMEANS_SAMPLE, _KMEANS_ROUNDS = 20_000, 30


def fit(
    vectors: NDArray[np.float32],
    config: RqVaeConfig,
    *,
    start: RqVae | None = None,
    alike: AlikePairs | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    device: Device = CPU,
) -> RqVae:
    """Trains a codebook on (N, D) float32 vectors.

    Args:
        vectors: Items to learn from; hold some back to measure the error on.
        config: Configuration; `config.seed` decides everything random.
        start: Codebook of the same shape to continue from, with its weights, codes and standardisation.
        alike: Pairs of rows of `vectors` whose codes shall be near; None for codes of content alone.
        progress: Called with (steps done, steps).
        device: Device of the training. A GPU gives other bits than a processor, and the same bits twice.

    Raises:
        DatasetError: There are fewer vectors than codes per level, or NaN or infinite values.
    """
    refuse_not_finite(vectors)
    if len(vectors) < config.codes:
        raise DatasetError(f"codes: {config.codes} a level need as many items, got {len(vectors)}; choose fewer codes")
    order = np.random.default_rng([config.seed, 2]).permutation(len(vectors))
    checked, fitted = np.split(order, [min(int(len(vectors) * _CHECKED), len(vectors) - config.codes)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = RqVae(vectors.shape[1], config)
    if start is not None:
        model.load_state_dict(start.state_dict())
    else:
        mean = vectors[fitted].mean(axis=0)
        model.mean.copy_(torch.from_numpy(mean))
        model.scale.copy_(torch.tensor(max(float((vectors[fitted] - mean).std()), 1e-6)))
    inputs = device.put((torch.from_numpy(vectors) - model.mean) / model.scale)
    model.to(device.torch)
    drawn = AlikeDraws(alike, inputs, config.batch, config.seed) if alike is not None else None
    with one_thread():
        begin = 0.0 if start is None else _WARM_START
        _train(model, inputs[fitted], inputs[checked], drawn, progress, begin=begin, device=device)
    model.device = device
    return model.cpu().eval().requires_grad_(False)


def _train(
    model: RqVae,
    inputs: Tensor,
    checked: Tensor,
    alike: AlikeDraws | None,
    progress: Callable[[int, int], None],
    *,
    begin: float,
    device: Device = CPU,
) -> None:
    """Trains from the share `begin` of the steps to the end.

    Keeps the last state whose error on `checked` (n, D) is as low as any other's.
    """
    config = model.config
    generator = torch.Generator().manual_seed(config.seed)
    on_card: dict[str, Any] = {} if device.is_cpu else {"fused": True, "capturable": True}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, **on_card
    )
    used = torch.zeros(config.levels, config.codes, dtype=torch.int64, device=inputs.device)
    rows = torch.zeros(min(config.batch, len(inputs)), dtype=torch.int64, device=inputs.device)

    def learn(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def warm() -> None:
        batch = inputs[rows]
        learn(squared(batch - model.decoder(model.encoder(batch))).mean())

    def quantised() -> None:
        loss, codes = model(inputs[rows])
        for level in range(config.levels):
            used[level].index_add_(0, codes[:, level], torch.ones_like(rows))
        if alike is not None:
            loss = loss + alike.weight * alike_loss(*(model.quantized(side) for side in alike.draw()))
        learn(loss)

    # Pairs are drawn on the processor in each step, so a step with pairs is no graph.
    captured = device.captured if alike is None else lambda step: step
    warm_step, step_of_codes = captured(warm), captured(quantised)
    warm_up, resets_until = int(config.steps * _WARM_UP), int(config.steps * _RESETS_UNTIL)
    best, kept, waited = float("inf"), None, 0
    for step in range(int(config.steps * begin), config.steps):
        if step == warm_up:
            _start_codes(model, inputs, generator, device)
        rows.copy_(device.put(torch.randint(len(inputs), (len(rows),), generator=generator)), non_blocking=True)
        (warm_step if step < warm_up else step_of_codes)()
        if warm_up <= step < resets_until and (step + 1) % _RESET_EVERY == 0:
            _reset_dead_codes(model, inputs, used, generator)
            used.zero_()
        progress(step + 1, config.steps)
        last = step + 1 == config.steps
        if len(checked) and (last or (step >= resets_until and (step + 1) % _CHECK_EVERY == 0)):
            error = _error(model, checked)
            if error < best * (1 + _NOISE):
                best, waited = min(best, error), 0
                kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            elif (waited := waited + 1) == config.patience:
                break
    if kept is not None:
        model.load_state_dict(kept)
    progress(config.steps, config.steps)


@torch.no_grad()
def _error(model: RqVae, inputs: Tensor) -> float:
    """Returns the mean squared error of standardised inputs (n, D), coded by the nearest codes."""
    return float(squared(inputs - model.decoder(model.quantize(model.encoder(inputs))[0])).mean())


@torch.no_grad()
def _start_codes(model: RqVae, inputs: Tensor, generator: torch.Generator, device: Device) -> None:
    """Starts each level's codes from k-means on its residuals."""
    sample = inputs[device.put(torch.randperm(len(inputs), generator=generator)[:_KMEANS_SAMPLE])]
    residual = model.encoder(sample)
    means = _means if device.is_cpu else partial(lloyd, rounds=_KMEANS_ROUNDS)
    for level in range(model.levels):
        book = means(residual, model.codes, model.config.seed)
        model.codebooks[level] = book
        residual = residual - book[distances(residual, book).argmin(dim=1)]


def _means(residual: Tensor, count: int, seed: int) -> Tensor:
    """Returns centroids (count, H) of residuals (N, H) by scikit-learn's k-means."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # The health report shows a codebook with fewer distinct residuals than codes.
        warnings.simplefilter("ignore", ConvergenceWarning)
        means = KMeans(count, n_init=1, max_iter=_KMEANS_ROUNDS, random_state=seed).fit(residual.numpy())
    return torch.from_numpy(means.cluster_centers_.astype(np.float32))


@torch.no_grad()
def _reset_dead_codes(model: RqVae, inputs: Tensor, used: Tensor, generator: torch.Generator) -> None:
    drawn = torch.randint(len(inputs), (max(model.codes, 256),), generator=generator)
    sample = inputs[drawn.to(inputs.device)]
    residuals = [residual for residual, _ in model.quantize(model.encoder(sample))[2]]
    for level, residual in enumerate(residuals):
        dead = torch.nonzero(used[level] == 0).squeeze(1)
        chosen = torch.randperm(len(residual), generator=generator)[: len(dead)]
        model.codebooks[level, dead] = residual[chosen.to(residual.device)]
