"""Bring vectors of your own: an npy file beside the catalogue becomes the base of Semantic IDs, index and ranker.

    tessera demo --small  # makes a dataset under out/demo
    python examples/own_vectors.py out/demo/synthetic/dataset.toml out/own-vectors

A model of yours made the vectors; here a random projection of the letters of each title stands for it. The space has a
name, so vectors of the model's next version cannot be mixed with those of this version.
"""

import os
import sys
from pathlib import Path

import numpy as np

import tessera
from features.dataset.tables import read_items

SPACE = "letters-v1"
DIM = 32


def vector(text: str) -> np.ndarray:
    """Returns the vector (DIM,) that a model of yours gives to an item."""
    counts = np.bincount(np.frombuffer(text.lower().encode() or b" ", dtype=np.uint8), minlength=256)
    return np.random.default_rng(0).normal(size=(DIM, 256)) @ counts


def main(dataset: str, out: str, *, until: str = "publish") -> tessera.RunResult:
    """Writes the vectors and a descriptor that names them, and runs; returns the result."""
    described, place = tessera.load_dataset(dataset), Path(out).absolute()
    items = read_items(described)
    assert items is not None
    place.mkdir(parents=True, exist_ok=True)
    np.save(place / "letters.npy", np.array([vector(text) for text in items["text"]], dtype=np.float32))
    folder = os.path.relpath(described.directory, place)
    lines = described.source.read_text().replace('path = "', f'path = "{folder}/').splitlines()
    # The vectors take the place of the text.
    brought = f'vectors = {{ letters = {{ file = "letters.npy", space = "{SPACE}" }} }}'
    lines = [brought if line.startswith("text = ") else line for line in lines]
    (place / "dataset.toml").write_text("\n".join(lines))
    result = tessera.run(tessera.load_dataset(place / "dataset.toml"), place / "run", until=until)
    if result.bundle is not None:
        codes = result.bundle.semantic_ids(vectors={"letters": vector("a red bicycle")[None]})
        print(f"encoder {result.bundle.manifest.encoder}; a red bicycle is {'.'.join(map(str, codes[0]))}")
    return result


if __name__ == "__main__":
    main(*sys.argv[1:3])
