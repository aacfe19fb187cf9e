"""Latent attention: pooling that lets each token state read a small trained table before the states are averaged.

    token state h ─▶ softmax(h · Kᵀ / √D) · K ─▶ two layers ─▶ h + result ─▶ mean of the tokens

The second of the two layers begins at zero, so that an untrained pooling is the mean. Lee et al., "NV-Embed: Improved
Techniques for Training LLMs as Generalist Embedding Models" (ICLR 2025), section 3.1; the sum with h is ours.

Shape letters: B texts, L tokens, D width, K latents, H hidden width.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional

from features.errors import DatasetError

FILE = "latent.safetensors"
LATENTS = 64
"""K."""


class LatentPooling(torch.nn.Module):
    """Pooling with a trained table, in the place of a model's own pooling.

    Args:
        width: D.
        latents: K.
        seed: Seed of the first weights.
    """

    pooling_mode = "latent"

    def __init__(self, width: int, latents: int = LATENTS, seed: int = 0) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(seed)
        self.embedding_dimension = width
        self.table = torch.nn.Parameter(torch.randn(latents, width, generator=drawn))
        self.first = torch.nn.Parameter(torch.randn(width, width, generator=drawn) / width**0.5)
        self.second = torch.nn.Parameter(torch.zeros(width, width))

    def pool(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Returns vectors (B, D) of token states (B, L, D) under a mask (B, L)."""
        shares = torch.softmax(states @ self.table.T / states.shape[2] ** 0.5, dim=2)
        states = states + functional.gelu(shares @ self.table @ self.first) @ self.second
        weights = mask[:, :, None].to(states.dtype)
        return (states * weights).sum(dim=1) / weights.sum(dim=1)

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Adds the vectors to the features of a batch, as sentence-transformers calls a pooling."""
        pooled = self.pool(features["token_embeddings"], features["attention_mask"])
        return features | {"sentence_embedding": pooled}

    def get_embedding_dimension(self) -> int:
        """Returns D."""
        return self.embedding_dimension


def save_latent(pooling: LatentPooling, directory: Path) -> None:
    """Writes a trained pooling into the directory of its model."""
    save_file({name: tensor.contiguous() for name, tensor in pooling.state_dict().items()}, directory / FILE)


def load_latent(directory: Path, *, width: int) -> LatentPooling:
    """Loads the pooling that a model's directory carries.

    Raises:
        DatasetError: The directory carries none, or a pooling of another width.
    """
    try:
        tensors = load_file(directory / FILE)
        found = LatentPooling(width, len(tensors["table"]))
        found.load_state_dict(tensors)
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise DatasetError(
            f"pool latent: {directory} carries no latent attention of width {width} that can be read "
            f"({type(error).__name__}); fit it by `tessera encoder tune`, or choose another pool"
        ) from error
    return found.eval()
