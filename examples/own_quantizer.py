"""A quantizer of your own: `fit` and `load`, and one line that registers it.

    tessera demo --small  # makes a dataset under out/demo
    python examples/own_quantizer.py out/demo/synthetic/dataset.toml out/own-quantizer

This one gives each level the nearest of K random directions of what the levels before left over.
`tests/contract/test_quantizer.py` holds the laws that every quantizer keeps.
"""

import hashlib
import sys
from pathlib import Path

import msgspec
import numpy as np
from safetensors.numpy import load_file, save_file

import tessera
from models.semantic_id.codebook.kinds import CodebookShape
from models.semantic_id.codebook.quantizer import DESCRIPTION, TENSORS, refuse_not_finite, refuse_width
from tessera.pipeline.options import load_options

NAME = "random-directions"


class RandomDirections:
    """Q levels of K directions each, (Q, K, D) float32, of decreasing length."""

    def __init__(self, books: np.ndarray) -> None:
        self._books = books
        self.levels, self.codes, self._dim = books.shape
        self.id = f"{NAME}-{hashlib.sha256(books.tobytes()).hexdigest()[:12]}"

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """Maps (N, D) float32 to codes (N, Q) uint16, each vector by itself."""
        left = refuse_width(vectors, self._dim, self.id).astype(np.float64)
        refuse_not_finite(left)
        codes = np.zeros((len(left), self.levels), dtype=np.uint16)
        for level, book in enumerate(self._books.astype(np.float64)):
            # Summed row by row, so that a vector's code does not depend on its batch.
            distances = [((book - row) ** 2).sum(axis=1) for row in left]
            codes[:, level] = [int(found.argmin()) for found in distances]
            left = left - book[codes[:, level]]
        return codes

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Maps codes (N, Q) back to vectors (N, D) float32."""
        return sum(book[codes[:, level]] for level, book in enumerate(self._books)).astype(np.float32)

    def save(self, directory: Path) -> None:
        """Writes what `load` reads; the field `kind` is the name that is registered."""
        save_file({"books": self._books}, directory / TENSORS)
        (directory / DESCRIPTION).write_bytes(msgspec.json.encode({"kind": NAME, "id": self.id}))


class RandomDirectionsKind:
    """Kind of codebook: fits and loads `RandomDirections`."""

    def fit(self, vectors: np.ndarray, shape: CodebookShape, *, options, start, progress) -> RandomDirections:
        """Draws the directions; a real quantizer learns them from `vectors` (N, D)."""
        refuse_not_finite(vectors)
        rng = np.random.default_rng(shape.seed)
        books = rng.normal(size=(shape.levels, shape.codes, vectors.shape[1]))
        spread = np.linalg.norm(vectors - vectors.mean(axis=0), axis=1).mean()
        lengths = spread * 0.5 ** np.arange(1, shape.levels + 1)
        books *= (lengths / np.linalg.norm(books, axis=2).mean(axis=1))[:, None, None]
        books[0] += vectors.mean(axis=0)
        return RandomDirections(books.astype(np.float32))

    def load(self, directory: Path) -> RandomDirections:
        """Loads what `save` wrote."""
        return RandomDirections(load_file(directory / TENSORS)["books"])


tessera.register_quantizer(NAME, RandomDirectionsKind())


def main(dataset: str, out: str, *, until: str = "publish") -> Path:
    """Runs a dataset with this quantizer, and else with its `[run]` table; returns the directory of the run."""
    options = load_options(tessera.load_dataset(dataset), [f"quantizer={NAME}"])
    result = tessera.run(dataset, out, options, until=until)
    print(f"{NAME}: {', '.join(f'{stage} {seconds:.1f} s' for stage, seconds in result.executed.items())}")
    return result.directory


if __name__ == "__main__":
    main(*sys.argv[1:3])
