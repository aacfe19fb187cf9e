"""RQ-VAE: a residual-quantized autoencoder (Lee et al., CVPR 2022; TIGER, Rajput et al., NeurIPS 2023).

These measures keep it from collapsing onto a few codes:
- inputs centred and scaled to unit mean variance (unit-norm text vectors otherwise train to "predict the mean");
- reconstruction and quantisation terms with the same reduction: both summed over dimensions, averaged over the batch;
- the autoencoder warms up unquantised, then every level's codes start from k-means on its residuals;
- dead codes move to random residuals, and training ends with a stretch free of such resets;
- that stretch ends when the error on vectors held back from training no longer falls.
"""

import hashlib
import itertools
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from features.device import CPU, Device
from features.errors import BundleError, DatasetError
from features.threads import one_thread
from models.semantic_id.codebook.alike import AlikeDraws, AlikePairs, alike_loss
from models.semantic_id.codebook.estimator import balanced_codes, rotated, straight_through
from models.semantic_id.codebook.quantizer import DESCRIPTION, MAX_CODES, TENSORS, refuse_not_finite, refuse_width

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
_ENCODE_ROWS, _ENCODE_ROWS_OF_A_CARD = 4_096, 1 << 17
_DECODE_ROWS = 1 << 17


Gradient = Literal["straight-through", "rotation"]


@dataclass(frozen=True)
class RqVaeConfig:
    """Configuration of an RQ-VAE codebook; `levels`, `codes` and `latent` also set its shape.

    Attributes:
        gradient: Estimator that passes the loss to the encoder: straight through, as if there were no codes, or by the
            rotation and scale from the latent to its codes (Fifty et al., 2024, eq. 4.2).
        sinkhorn: ε of a balanced assignment on the last level in training (LC-Rec, Zheng et al., ICDE 2024: .003); 0
            for none. A frozen codebook always takes the nearest code: a balanced assignment would depend on the batch.
        patience: Checks without a lower validation error before training stops; one every 50 steps after the last
            reset.
    """

    levels: int = 3
    codes: int = MAX_CODES
    latent: int = 32
    hidden: tuple[int, ...] = (256, 128)
    commitment: float = 0.25
    steps: int = 1_500
    batch: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    gradient: Gradient = "straight-through"
    sinkhorn: float = 0.0
    patience: int = 4
    seed: int = 0


class RqVae(nn.Module):
    """Frozen or training codebook; a `Quantizer`.

    Shape letters: N items, D dim, H latent dim, Q levels, K codes. Buffers: `mean` (D,), `scale` ().

    Attributes:
        device: Device on which `encode` computes. The codes do not depend on it.

    Args:
        dim: D of the vectors.
        config: Shape and training settings.
    """

    def __init__(self, dim: int, config: RqVaeConfig) -> None:
        super().__init__()
        self.config = config
        self.dim = dim
        self.device = CPU
        widths = (dim, *config.hidden, config.latent)
        self.encoder = _mlp(widths)
        self.decoder = _mlp(widths[::-1])
        self.codebooks = nn.Parameter(torch.zeros(config.levels, config.codes, config.latent))
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(()))

    @property
    def id(self) -> str:
        digest = hashlib.sha256(msgspec.json.encode(asdict(self.config)))
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + tensor.float().numpy().tobytes())
        return f"rqvae-{digest.hexdigest()[:12]}"

    @property
    def levels(self) -> int:
        return self.config.levels

    @property
    def codes(self) -> int:
        return self.config.codes

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the loss () and the codes (B, Q) of standardised inputs (B, D)."""
        latent = self.encoder(inputs)
        quantized, codes, residuals = self._quantize(latent, sinkhorn=self.config.sinkhorn)
        terms = sum(
            self.config.commitment * _squared(residual - chosen.detach()) + _squared(residual.detach() - chosen)
            for residual, chosen in residuals
        )
        passed = rotated if self.config.gradient == "rotation" else straight_through
        decoded = self.decoder(passed(latent, quantized.detach()))
        return (_squared(inputs - decoded) + terms).mean(), codes

    def quantized(self, inputs: Tensor) -> Tensor:
        """Returns the sum of the codes of standardised inputs (B, D), (B, H); the gradient goes to the encoder."""
        latent = self.encoder(inputs)
        return straight_through(latent, self._quantize(latent)[0])

    def _quantize(self, latent: Tensor, *, sinkhorn: float = 0.0) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        residual, total = latent, torch.zeros_like(latent)
        codes, pairs = [], []
        for level in range(self.config.levels):
            book = self.codebooks[level]
            distances = _distances(residual.detach(), book.detach())
            last = level == self.config.levels - 1
            code = balanced_codes(distances, sinkhorn) if sinkhorn and last else distances.argmin(dim=1)
            chosen = functional.embedding(code, book)
            codes.append(code)
            pairs.append((residual, chosen))
            total = total + chosen
            residual = residual - chosen.detach()
        return total, torch.stack(codes, dim=1), pairs

    @torch.no_grad()
    def encode(self, vectors: NDArray[np.float32]) -> NDArray[np.uint16]:
        """Maps (N, D) float32 to codes (N, Q) uint16.

        Computes in float64 on `device`: the last bits of a float32 product depend on the batch size and the device, and
        would decide near ties.

        Raises:
            DatasetError: The vectors have a wrong width, or NaN or infinite values.
        """
        vectors = refuse_width(vectors, self.dim, self.id)
        device = self.device
        if device.is_cpu:
            refuse_not_finite(vectors)
        wide = self._wide().to(device.torch)
        rows = _ENCODE_ROWS if device.is_cpu else _ENCODE_ROWS_OF_A_CARD
        out = np.zeros((len(vectors), self.levels), dtype=np.uint16)
        for start in range(0, len(vectors), rows):
            block = device.put(vectors[start : start + rows])
            if not device.is_cpu and not bool(torch.isfinite(block).all()):
                refuse_not_finite(vectors)
            block = block.double()
            latent = wide.encoder((block - wide.mean) / wide.scale)
            out[start : start + len(block)] = wide._quantize(latent)[1].cpu().numpy()
        return out

    @torch.no_grad()
    def decode(self, codes: NDArray[np.uint16]) -> NDArray[np.float32]:
        """Maps codes (N, Q) to vectors (N, D) float32."""
        wide = self._wide()
        index = torch.from_numpy(np.asarray(codes).astype(np.int64))
        out = np.zeros((len(index), self.dim), dtype=np.float32)
        for start in range(0, len(index), _DECODE_ROWS):
            block = index[start : start + _DECODE_ROWS]
            latent = sum(wide.codebooks[level][block[:, level]] for level in range(self.levels))
            out[start : start + len(block)] = (wide.decoder(latent) * wide.scale + wide.mean).float().numpy()
        return out

    def _wide(self) -> "RqVae":
        """Returns a float64 twin of the frozen codebook."""
        # A module draws its initial weights from torch's global generator, which must not advance here.
        with torch.random.fork_rng(devices=[]):
            twin = RqVae(self.dim, self.config).double()
        twin.load_state_dict(self.state_dict())
        return twin.requires_grad_(False)

    def save(self, directory: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, directory / TENSORS)
        (directory / DESCRIPTION).write_bytes(
            msgspec.json.encode({"kind": "rqvae", "id": self.id, "dim": self.dim, "config": asdict(self.config)})
        )


def load(directory: Path) -> RqVae:
    """Loads a codebook that `save` wrote, and refuses a codebook that was altered.

    Raises:
        BundleError: A file is missing or cut short, or the tensors do not give the id they were saved under.
    """
    path = directory / DESCRIPTION
    if not path.is_file():
        raise BundleError(f"{path} is missing: {directory} does not hold a codebook")
    try:
        description = msgspec.json.decode(path.read_bytes())
        with torch.random.fork_rng(devices=[]):
            model = RqVae(description["dim"], msgspec.convert(description["config"], RqVaeConfig))
        model.load_state_dict(load_file(directory / TENSORS))
    except (
        msgspec.DecodeError,
        UnicodeDecodeError,
        LookupError,
        TypeError,
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:
        raise BundleError(f"{directory} does not hold a whole codebook: {error}; fetch or fit it again") from error
    if model.id != description["id"]:
        raise BundleError(f"{directory / TENSORS}: is codebook {model.id}, expected {description['id']}")
    return model.eval().requires_grad_(False)


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
        learn(_squared(batch - model.decoder(model.encoder(batch))).mean())

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
    return float(_squared(inputs - model.decoder(model._quantize(model.encoder(inputs))[0])).mean())


@torch.no_grad()
def _start_codes(model: RqVae, inputs: Tensor, generator: torch.Generator, device: Device) -> None:
    """Starts each level's codes from k-means on its residuals."""
    sample = inputs[device.put(torch.randperm(len(inputs), generator=generator)[:_KMEANS_SAMPLE])]
    residual = model.encoder(sample)
    means = _means if device.is_cpu else lloyd
    for level in range(model.levels):
        book = means(residual, model.codes, model.config.seed)
        model.codebooks[level] = book
        residual = residual - book[_distances(residual, book).argmin(dim=1)]


def _means(residual: Tensor, count: int, seed: int) -> Tensor:
    """Returns centroids (count, H) of residuals (N, H) by scikit-learn's k-means."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # The health report shows a codebook with fewer distinct residuals than codes.
        warnings.simplefilter("ignore", ConvergenceWarning)
        means = KMeans(count, n_init=1, max_iter=_KMEANS_ROUNDS, random_state=seed).fit(residual.numpy())
    return torch.from_numpy(means.cluster_centers_.astype(np.float32))


def lloyd(residual: Tensor, count: int, seed: int) -> Tensor:
    """Returns centroids (count, H) of residuals (N, H) on their device, by Lloyd's algorithm from k-means++ seeds.

    Sums are products with a matrix of ones and zeros: sums by atomic additions would differ from run to run. An empty
    cluster keeps its centroid.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(count, generator=generator, dtype=torch.float64).to(residual.device)
    own = (residual**2).sum(dim=1)
    nearest = torch.full_like(own, torch.inf)
    picked = residual[(draws[0] * len(residual)).long()]
    found = [picked]
    for number in range(1, count):
        nearest = torch.minimum(nearest, (own - 2 * residual @ picked + (picked**2).sum()).clamp(min=0))
        chances = nearest.double().cumsum(0)
        picked = residual[torch.searchsorted(chances, draws[number] * chances[-1]).clamp(max=len(residual) - 1)]
        found.append(picked)
    book = torch.stack(found)
    for _ in range(_KMEANS_ROUNDS):
        owner = functional.one_hot(_distances(residual, book).argmin(dim=1), count).to(residual.dtype)
        sizes = owner.sum(dim=0).unsqueeze(1)
        book = torch.where(sizes > 0, owner.T @ residual / sizes.clamp(min=1), book)
    return book


@torch.no_grad()
def _reset_dead_codes(model: RqVae, inputs: Tensor, used: Tensor, generator: torch.Generator) -> None:
    drawn = torch.randint(len(inputs), (max(model.codes, 256),), generator=generator)
    sample = inputs[drawn.to(inputs.device)]
    residuals = [residual for residual, _ in model._quantize(model.encoder(sample))[2]]
    for level, residual in enumerate(residuals):
        dead = torch.nonzero(used[level] == 0).squeeze(1)
        chosen = torch.randperm(len(residual), generator=generator)[: len(dead)]
        model.codebooks[level, dead] = residual[chosen.to(residual.device)]


def _mlp(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _squared(difference: Tensor) -> Tensor:
    return (difference**2).sum(dim=-1)


def _distances(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Returns squared distances (B, K) without the vectors' own lengths; argmin takes the lowest code in a tie."""
    return (codebook**2).sum(dim=1) - 2 * vectors @ codebook.T
