"""`resize`: a table resized without retraining, beside one retrained at that size.

The default schema's ranker, without content, is trained at its own size, then its table is resized by half and by
double. Each is scored as it is, and after as many steps as one tenth of what retraining at that size took; retraining
stops early on validation, and the epochs without a gain count as steps.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch.nn import functional

from features.dataset.descriptor import Dataset
from features.dataset.input_files import file_hashes
from features.frame import Frame
from features.history import DEFAULT_LENGTH
from features.threads import fixed_threads
from models.ranker.evaluate import quality
from models.ranker.loading import ahead, assembler, examples, sighted
from models.ranker.network import Ranker
from models.ranker.resize import resized
from models.ranker.train import TrainConfig, predict, train
from models.table.admission import Admission, Sketch
from models.table.default_schema import default_schema
from models.table.schema import Schema
from tessera.bench.harness.data import dataset_frame, remembered
from tessera.bench.harness.result import BenchResult, Claim, at_most
from tessera.bench.harness.rows import measured_rows

FACTORS = (0.5, 2.0)
_SHARE = 0.1  # of the steps of retraining
_TOLERANCE = 0.003


def resize(
    dataset: Dataset, out: Path, *, seeds: int, console: Console, config: TrainConfig | None = None
) -> BenchResult:
    """Measures test AUC after resizing by half and by double, before and after a short training.

    Args:
        dataset: Dataset with its own split.
        out: Directory with a file for each seed, so that a later call continues there.
        seeds: Number of seeds, from 0; they decide a random split, initial values and the order of examples.
        config: of all trainings; its seed is replaced.
    """
    rows = measured_rows()
    source = dataset.model_dump(mode="json", exclude={"source"})
    for seed in range(seeds):
        console.print(f"{dataset.name}: resize, seed {seed}")
        seeded = replace(config or TrainConfig(), seed=seed)
        key = ("resize", source, file_hashes(dataset), asdict(seeded))
        work = partial(_one_seed, dataset, seeded, console)
        rows += remembered(out / f"resize-{dataset.name}-{seed}.json", __name__, key, work)["rows"]
    return BenchResult("resize", dataset.name, seeds, rows, _claims(rows))


def _one_seed(dataset: Dataset, config: TrainConfig, console: Console) -> dict[str, Any]:
    frame = dataset_frame(dataset, seed=config.seed, history_length=DEFAULT_LENGTH)
    schema = default_schema(dataset, frame)
    per_epoch = -(-frame.part("train").height // config.batch)
    first = train(schema, frame, config)
    results: list[dict[str, Any]] = []

    def note(size: Schema, ranker: Ranker, sketch: Sketch, how: str, steps: int) -> None:
        row = {"seed": config.seed, "rows": size.rows, "how": how, "steps": steps}
        results.append(row | {"test_auc": _test_auc(frame, size, ranker, sketch)})
        console.print(f"  {size.rows:,} rows, {how}, {steps:,} steps: test AUC {results[-1]['test_auc']:.4f}")

    note(schema, first.ranker, first.sketch, "trained", per_epoch * len(first.epochs))
    exact = schema.rows - schema.hashed_rows
    for factor in FACTORS:
        rows = exact + round(schema.hashed_rows * factor)
        size, ranker = resized(schema, first.ranker, rows=rows, table_rate=config.table_rate)
        again = train(size, frame, config)
        steps = per_epoch * len(again.epochs)
        note(size, again.ranker, again.sketch, "retrained", steps)
        note(size, ranker, first.sketch, "resized", 0)
        tune(size, ranker, frame, config, steps=int(_SHARE * steps))
        note(size, ranker, first.sketch, "resized+tuned", int(_SHARE * steps))
    return {"rows": results}


def tune(schema: Schema, ranker: Ranker, frame: Frame, config: TrainConfig, *, steps: int) -> None:
    """Trains a ranker in place for so many steps of the train part in random order, with a fresh Adam."""
    part = frame.part("train")
    rows = examples(part)
    source = sighted(schema, frame, frame.blocks("train")).with_events(part)
    optimizer = torch.optim.Adam(ranker.network.parameters(), lr=config.network_rate, fused=True)
    rng = np.random.default_rng([config.seed, steps])
    passes = -(-steps * config.batch // len(rows))
    order = np.concatenate([rng.permutation(len(rows)) for _ in range(passes)])[: steps * config.batch]
    with fixed_threads(config.threads):
        pieces = np.array_split(order, steps) if steps else []
        for batch in ahead(lambda index: source.batch(rows.take(index)), pieces):
            loss = functional.binary_cross_entropy_with_logits(ranker(batch), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ranker.table.step()


def _test_auc(frame: Frame, schema: Schema, ranker: Ranker, sketch: Sketch) -> float:
    test = frame.part("test")
    rows = examples(test)
    source = assembler(schema, frame, test, Admission(sketch, schema.admission))
    auc = quality(rows.labels, predict(ranker, source, rows)).auc
    return float("nan") if auc is None else auc


def _claims(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    judged = []
    for size in dict.fromkeys(row["rows"] for row in rows if row["how"] == "retrained"):
        mean = {
            how: float(np.mean([row["test_auc"] for row in rows if (row["rows"], row["how"]) == (size, how)]))
            for how in ("retrained", "resized+tuned")
        }
        loss = mean["retrained"] - mean["resized+tuned"]
        claim = f"{size:,} rows: test AUC of retraining over resizing and a tenth of its steps"
        judged.append(at_most(claim, loss, _TOLERANCE))
    return judged
