"""RQ-VAE: a residual-quantized autoencoder (Lee et al., CVPR 2022; TIGER, Rajput et al., NeurIPS 2023).

Inputs are centred and scaled to unit mean variance: unit-norm text vectors otherwise train to "predict the mean".
Reconstruction and quantisation terms have the same reduction: both are summed over dimensions and averaged over the
batch. `rqvae_fit` trains the codebook.
"""

import hashlib
import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from features.device import CPU
from features.errors import BundleError
from models.semantic_id.codebook.estimator import balanced_codes, rotated, straight_through
from models.semantic_id.codebook.quantizer import DESCRIPTION, MAX_CODES, TENSORS, refuse_not_finite, refuse_width

_ENCODE_ROWS, _ENCODE_ROWS_OF_A_CARD = 4_096, 1 << 15
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
        quantized, codes, residuals = self.quantize(latent, sinkhorn=self.config.sinkhorn)
        terms = sum(
            self.config.commitment * squared(residual - chosen.detach()) + squared(residual.detach() - chosen)
            for residual, chosen in residuals
        )
        passed = rotated if self.config.gradient == "rotation" else straight_through
        decoded = self.decoder(passed(latent, quantized.detach()))
        return (squared(inputs - decoded) + terms).mean(), codes

    def quantized(self, inputs: Tensor) -> Tensor:
        """Returns the sum of the codes of standardised inputs (B, D), (B, H); the gradient goes to the encoder."""
        latent = self.encoder(inputs)
        return straight_through(latent, self.quantize(latent)[0])

    def quantize(self, latent: Tensor, *, sinkhorn: float = 0.0) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Returns of latents (B, H) the sum of their codes (B, H), the codes (B, Q), and each level's residuals.

        A level's pair holds the residuals (B, H) before the level and the codes (B, H) that it chose.
        """
        residual, total = latent, torch.zeros_like(latent)
        codes, pairs = [], []
        for level in range(self.config.levels):
            book = self.codebooks[level]
            found = distances(residual.detach(), book.detach())
            last = level == self.config.levels - 1
            code = balanced_codes(found, sinkhorn) if sinkhorn and last else found.argmin(dim=1)
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
        wide = self._wide().to(device.torch)
        rows = _ENCODE_ROWS if device.is_cpu else _ENCODE_ROWS_OF_A_CARD
        staging = device.staging()
        found, finite = [], torch.ones((), dtype=torch.bool, device=device.torch)
        # The processor sends a block while the device codes the one before, and waits for the codes once.
        for start in range(0, len(vectors), rows):
            block = staging.put_array(vectors[start : start + rows])
            finite &= torch.isfinite(block).all()
            latent = wide.encoder((block.double() - wide.mean) / wide.scale)
            found.append(wide.quantize(latent)[1].to(torch.int32))
        codes = torch.cat(found) if found else torch.zeros((0, self.levels), dtype=torch.int32)
        out = codes.cpu().numpy().astype(np.uint16)
        if not bool(finite):
            refuse_not_finite(vectors)
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


def _mlp(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def squared(difference: Tensor) -> Tensor:
    """Returns the squared lengths (B,) of rows (B, D)."""
    return (difference**2).sum(dim=-1)


def distances(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Returns squared distances (B, K) without the vectors' own lengths; argmin takes the lowest code in a tie."""
    return (codebook**2).sum(dim=1) - 2 * vectors @ codebook.T
