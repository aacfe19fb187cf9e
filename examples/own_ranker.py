"""A ranker of your own: a torch module over what the table returns, named by `package.module:Class`.

    tessera demo --small  # makes a dataset under out/demo
    python examples/own_ranker.py out/demo/synthetic/dataset.toml out/own-ranker

`tessera serve` and `tessera stream` import the class too: add its directory to PYTHONPATH, or install its package.
`tests/contract/test_network.py` holds the laws that every network keeps.
"""

import sys

import torch
from torch import Tensor, nn

import tessera
from models.networks.inputs import NetworkInputs, NetworkReads
from tessera.pipeline.options import load_options


class GatedProducts(nn.Module):
    """Products of neighbouring fields, each weighed by a gate that reads the whole example."""

    def __init__(self, reads: NetworkReads, *, hidden: tuple[int, ...] = (32,)) -> None:
        super().__init__()
        self.gate = nn.Linear(reads.flat, reads.fields)
        self.deep = nn.Sequential(nn.Linear(2 * reads.flat - reads.numbers, hidden[0]), nn.ReLU())
        self.head = nn.Linear(hidden[0], reads.tasks)

    def forward(self, inputs: NetworkInputs) -> Tensor:
        """Returns a logit for each example, (B,), or for each example and task."""
        flat = torch.cat([inputs.fields.flatten(1), inputs.numbers], dim=1)
        gates = torch.sigmoid(self.gate(flat)).unsqueeze(2)
        products = gates * inputs.fields * inputs.fields.roll(1, dims=1)
        return self.head(self.deep(torch.cat([flat, products.flatten(1)], dim=1))).squeeze(1)


def main(dataset: str, out: str, *, kind: str = "own_ranker:GatedProducts") -> "tessera.Bundle":
    """Trains a dataset with this ranker, and else with its `[run]` table. Returns the bundle."""
    options = load_options(tessera.load_dataset(dataset), [f"ranker.kind={kind}", "ranker.options.hidden=[32]"])
    bundle = tessera.run(tessera.load_dataset(dataset), out, options).bundle
    scores = bundle.rank(bundle.users["user_id"][0], bundle.items["item_id"].to_list()[:50])
    auc = bundle.manifest.metrics["quality"]["ranker"]["all"]["auc"]
    print(f"{bundle.id}: test AUC {auc:.3f}, scores from {scores.min():.3f} to {scores.max():.3f}")
    return bundle


if __name__ == "__main__":
    main(*sys.argv[1:])
