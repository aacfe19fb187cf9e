"""Trains torch-rechub's network of a kind on `rankers`' arrays, in the peers' environment without Tessera.

    python networks.py --kind dcn-v2|deepfm|din|self-attention DATA RESULT --seed S

Loader, trainer, early stopping and initial values are the library's own, with its default rate and weight decay. The
widths of the layers, the batch, the threads, the epochs and the patience are Tessera's.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

BATCH, THREADS, EPOCHS, PATIENCE = 512, 1, 8, 2
HIDDEN, ATTENTION, HEADS = (128, 64), (36,), 2
CROSS_LAYERS, CROSS_RANK = 2, 64
_HISTORY, _NUMBERS = "history", "numbers"


def arrays(directory: Path) -> tuple[dict[str, Any], Any]:
    """Reads a part: the inputs by name, and the labels (N,) float32."""
    found = {path.stem: np.load(path) for path in sorted(directory.glob("*.npy"))}
    labels = found.pop("labels")
    return found, labels


def network(kind: str, shapes: dict[str, Any]) -> Any:
    """Builds the network for the inputs that `shapes` describes."""
    from torch_rechub.basic.features import (  # type: ignore[import-not-found]
        DenseFeature,
        SequenceFeature,
        SparseFeature,
    )
    from torch_rechub.models.ranking import BST, DIN, DCNv2, DeepFM  # type: ignore[import-not-found]

    dim, own = shapes["dim"], shapes["fields"]
    fields = {
        field["name"]: SequenceFeature(field["name"], field["rows"], dim, pooling=field["pooling"], padding_idx=0)
        if field["pooling"]
        else SparseFeature(field["name"], field["rows"], dim, padding_idx=0)
        for field in own
    }
    rows = {field["name"]: field["rows"] for field in own}
    item = shapes["item"]

    def past(pooling: str) -> Any:
        return SequenceFeature(_HISTORY, rows[item], dim, pooling=pooling, shared_with=item, padding_idx=0)

    deep = {"dims": list(HIDDEN), "dropout": 0.0}
    if kind in ("dcn-v2", "deepfm"):
        sparse = [*fields.values(), past("mean")]
        dense = [DenseFeature(_NUMBERS, shapes["numbers"])] if shapes["numbers"] else []
        if kind == "deepfm":
            return DeepFM(dense + sparse, sparse, {**deep, "activation": "relu"})
        relu = {**deep, "activation": "relu"}
        return DCNv2(dense + sparse, CROSS_LAYERS, relu, low_rank=CROSS_RANK, num_experts=1)
    rest = [field for name, field in fields.items() if name != item]
    if kind == "din":
        return DIN(rest, [past("concat")], [fields[item]], deep, {"dims": list(ATTENTION)})
    return BST(rest, [past("concat")], [fields[item]], {**deep, "activation": "relu"}, nhead=HEADS, dropout=0.0)


def trained(kind: str, data: Path, seed: int) -> dict[str, Any]:
    """Trains the network to its early stop and scores the test part."""
    from ctr import measure, timed  # type: ignore[import-not-found]
    from torch_rechub.trainers import CTRTrainer  # type: ignore[import-not-found]
    from torch_rechub.utils.data import DataGenerator  # type: ignore[import-not-found]

    torch.manual_seed(seed)
    torch.set_num_threads(THREADS)
    train, validation, test = (arrays(data / name) for name in ("train", "validation", "test"))
    model = network(kind, json.loads((data / "shapes.json").read_text()))
    loaders = DataGenerator(*train).generate_dataloader(*validation, *test, batch_size=BATCH)
    epochs = 0
    with tempfile.TemporaryDirectory() as kept:
        trainer = CTRTrainer(model, n_epoch=EPOCHS, earlystop_patience=PATIENCE, device="cpu", model_path=kept)
        epoch = trainer.train_one_epoch

        def counted(*given: Any) -> Any:
            nonlocal epochs
            epochs += 1
            return epoch(*given)

        trainer.train_one_epoch = counted
        run = measure(
            len(train[1]),
            lambda: timed(lambda: trainer.fit(loaders[0], loaders[1])),
            lambda: np.array(trainer.predict(model, loaders[2])),
            test[1],
        )
    return {**asdict(run), "epochs": epochs, "parameters": sum(own.numel() for own in model.parameters())}


def main() -> None:
    """Trains one network and writes its figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", required=True, choices=("dcn-v2", "deepfm", "din", "self-attention"))
    parser.add_argument("data", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    args = parser.parse_args()
    args.result.write_text(json.dumps(trained(args.kind, args.data, args.seed)))


if __name__ == "__main__":
    main()
