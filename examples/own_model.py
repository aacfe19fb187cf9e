"""Put the unified table into a PyTorch model of your own, and train it on a plain DataFrame.

No descriptor and no bundle: `FrameBatches` hashes the columns, `UnifiedTable` is an `nn.Module` like any other.

    python examples/own_model.py
"""

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from tessera import FrameBatches, UnifiedTable, frame_schema


class TwoLayers(nn.Module):
    """A model that embeds its columns by one shared table."""

    def __init__(self, table: UnifiedTable, width: int) -> None:
        super().__init__()
        self.table = table
        self.layers = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, batch) -> Tensor:
        return self.layers(self.table(batch)).squeeze(1)


def clicks(rows: int, seed: int) -> pl.DataFrame:
    """Clicks that depend on user and tag: an even user likes red things, an odd one blue ones."""
    rng = np.random.default_rng(seed)
    user, tag = rng.integers(0, 50, rows), rng.integers(0, 2, rows)
    return pl.DataFrame(
        {
            "user": user,
            "item": rng.integers(0, 500, rows),
            "tags": [["red", "new"] if red else ["blue"] for red in tag],
            "clicked": (user % 2 == tag).astype(np.float32),
        }
    )


def main(steps: int = 150) -> float:
    """Trains the model; returns its accuracy on rows that it has not seen."""
    torch.manual_seed(0)
    schema = frame_schema({"user": 2, "item": 2, "tags": 1}, rows=4_096, dim=8)
    table = UnifiedTable(schema, learning_rate=0.1)
    model = TwoLayers(table, width=len(schema.keys) * schema.dim)
    # The table trains itself in the backward pass, by row-wise Adagrad; the optimizer is for the layers alone.
    optimizer = torch.optim.Adam(model.layers.parameters(), lr=0.01)

    train, test = clicks(6_000, seed=1), clicks(1_000, seed=2)
    batches, labels = FrameBatches(schema, train), torch.from_numpy(train["clicked"].to_numpy().copy())
    rng = np.random.default_rng(0)
    for _ in range(steps):
        index = rng.integers(0, len(batches), 256)
        loss = nn.functional.binary_cross_entropy_with_logits(model(batches.batch(index)), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with torch.no_grad():
        guessed = model(FrameBatches(schema, test).batch()) > 0
    accuracy = float((guessed.numpy() == (test["clicked"].to_numpy() == 1)).mean())
    print(f"accuracy on new rows: {accuracy:.2f}")
    return accuracy


if __name__ == "__main__":
    main()
