"""An encoder of your own: a module with `fit` and `load`, and one line that registers it.

    tessera demo --small  # makes a dataset under out/demo
    python examples/own_encoder.py out/demo/synthetic/dataset.toml out/own-encoder

This encoder sums a fixed random vector for each word, so it needs no fitting. `tests/contract/test_encoder.py` holds
the laws that every encoder keeps.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import tessera
from features.content.encoder import DESCRIPTION, content_id, unit
from features.errors import BundleError
from tessera.pipeline.options import load_options

NAME = "random-words"


class RandomWords:
    """Sum of a random vector for each word, scaled to unit length.

    Args:
        dim: D, width of a vector.
        seed: decides the vectors.
    """

    def __init__(self, dim: int, seed: int) -> None:
        self.dim, self._seed = dim, seed
        self.id = content_id(NAME, dim.to_bytes(8), seed.to_bytes(8))

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Returns (N, D) float32; each text has the same vector in any batch."""
        return unit(np.array([self._sum(text) for text in texts]).reshape(len(texts), self.dim))

    def save(self, directory: Path) -> None:
        """Writes what `load` reads; the field `kind` is the name that is registered."""
        described = {"kind": NAME, "id": self.id, "dim": self.dim, "seed": self._seed}
        (directory / DESCRIPTION).write_text(json.dumps(described))

    def _sum(self, text: str) -> np.ndarray:
        total = np.zeros(self.dim)
        for word in text.lower().split():
            total += np.random.default_rng([self._seed, *word.encode()]).normal(size=self.dim)
        return total


class RandomWordsKind:
    """Kind of encoder: fits and loads `RandomWords`."""

    def fit(self, texts: Sequence[str], *, dim: int, seed: int, model: str | None) -> RandomWords:
        """Makes an encoder for a catalogue; `model` is `encoder_model` of the run."""
        return RandomWords(dim, seed)

    def load(self, directory: Path) -> RandomWords:
        """Loads what `save` wrote; refuses a file that was altered."""
        described = json.loads((directory / DESCRIPTION).read_text())
        encoder = RandomWords(described["dim"], described["seed"])
        if encoder.id != described["id"]:
            raise BundleError(f"{directory}: holds encoder {encoder.id}, expected {described['id']}; fetch it again")
        return encoder


tessera.register_encoder(NAME, RandomWordsKind())


def main(dataset: str, out: str, *, until: str = "publish") -> Path:
    """Runs a dataset with this encoder, and else with its `[run]` table; returns the directory of the run."""
    options = load_options(tessera.load_dataset(dataset), ["encoder_dim=64", f"encoder={NAME}"])
    result = tessera.run(dataset, out, options, until=until)
    print(f"{NAME}: {', '.join(f'{stage} {seconds:.1f} s' for stage, seconds in result.executed.items())}")
    return result.directory


if __name__ == "__main__":
    main(*sys.argv[1:3])
