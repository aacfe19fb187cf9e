"""`training-blocks`: memory of training at ten times the events, and test AUC of many blocks beside that of one.

The pipeline builds the frame of the dataset once. For memory, its examples are written once and ten times over, with
the same users and items. A process of its own trains an epoch on each. The dataset needs about a million events, so
that the training part once is about a full block. For quality, the examples are trained on as one block and as eight,
and, as the control, as one block in another random order: two orders of the same block differ by noise alone.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console

from features.dataset.descriptor import Dataset, load_dataset
from features.dataset.split import PARTS
from features.errors import TesseraError
from features.frame import Frame
from features.frame_blocks import block_count, block_of, block_path, held_blocks, write_block
from features.jobs.shard import write_parquet
from models.ranker.evaluate import quality
from models.ranker.train import TrainConfig, predict_part, train
from models.table.admission import Admission
from models.table.default_schema import default_schema
from tessera.bench.harness.data import remembered
from tessera.bench.harness.result import BenchResult, Claim, at_most
from tessera.bench.harness.rows import measured_rows
from tessera.bench.peers.ctr import resident_gb
from tessera.pipeline.artifact import AGGREGATES, read_frame
from tessera.pipeline.options import RunOptions, load_options
from tessera.pipeline.run import run

TIMES, BLOCKS = 10, 8
ONE_BLOCK, MANY_BLOCKS, OTHER_ORDER = "one block", "eight blocks", "one block, other order"
ORDERS = {ONE_BLOCK: 1, MANY_BLOCKS: BLOCKS, OTHER_ORDER: 1}
_MOST_MEMORY, _MOST_APART, _MOST_OF_NOISE = 1.15, 0.001, 1.5


def training_blocks(
    dataset: Dataset, out: Path, *, seeds: int, console: Console, options: RunOptions | None = None
) -> BenchResult:
    """Measures memory once, and quality in each seed.

    Args:
        dataset: Dataset with its own split.
        out: Directory of the frames, and of kept results, so that a later call continues there.
        seeds: Number of seeds, from 0; they decide initial values and the order of examples.
        console: Prints progress.
        options: Choices of the run; None for those of the descriptor.
    """
    chosen = load_options(dataset) if options is None else options
    run(dataset, out / "run", chosen, console=console, registry=None, until="frame")
    frame, config = read_frame(out / "run" / "frame"), chosen.train_config()
    rows = measured_rows()
    for times in (1, TIMES):
        console.print(f"training-blocks: memory, {times} times the events")
        rows.append({"measured": "memory", "times": times} | _memory(dataset, out, times))
    decided_by = dataset.model_dump(mode="json", exclude={"source"}), chosen.choices()
    for seed in range(seeds):
        for order, blocks in ORDERS.items():
            console.print(f"training-blocks: seed {seed}, {order}")
            arranged = in_another_order(frame, seed) if order == OTHER_ORDER else in_blocks(frame, blocks)
            work = partial(_trained, dataset, arranged, chosen, replace(config, seed=seed))
            kept = out / f"quality-{order.replace(' ', '-')}-{seed}.json"
            found = remembered(kept, __name__, (*decided_by, seed, order), work)
            rows.append({"measured": "quality", "seed": seed, "order": order, "blocks": blocks} | found)
    return BenchResult("training-blocks", dataset.name, seeds, rows, claims(rows))


def claims(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """Judges memory, and quality by the mean of the seeds and by the seed that speaks most against it.

    One seed is judged against the control, since one order differs from another by more than the bound of the mean.
    """
    peak = {row["times"]: row["peak_gb"] for row in rows if row["measured"] == "memory"}
    auc = {(row["seed"], row["order"]): row["test_auc"] for row in rows if row["measured"] == "quality"}
    seeds = sorted({seed for seed, _ in auc})
    blocks = [auc[seed, MANY_BLOCKS] - auc[seed, ONE_BLOCK] for seed in seeds]
    control = [auc[seed, OTHER_ORDER] - auc[seed, ONE_BLOCK] for seed in seeds]
    noise = max(_MOST_APART, *map(abs, control))
    return [
        at_most(f"peak memory of training on {TIMES} times the events over once", peak[TIMES] / peak[1], _MOST_MEMORY),
        at_most(f"mean distance of test AUC, {BLOCKS} blocks from one block", abs(float(np.mean(blocks))), _MOST_APART),
        at_most("largest such distance over that of another order of one block", _most(blocks) / noise, _MOST_OF_NOISE),
    ]


def _most(distances: Sequence[float]) -> float:
    return max(map(abs, distances))


def in_another_order(frame: Frame, seed: int) -> Frame:
    """Returns the frame with its training part in memory, as one block whose examples are permuted."""
    rows = frame.part("train")
    order = np.random.default_rng([seed, 1]).permutation(rows.height)
    parts = {part: held_blocks(rows[order] if part == "train" else frame.part(part), 1) for part in PARTS}
    return Frame(frame.users, frame.items, parts, frame.aggregates)


def in_blocks(frame: Frame, count: int) -> Frame:
    """Returns the frame with each part in memory, as so many blocks."""
    parts = {part: held_blocks(frame.part(part), count) for part in PARTS}
    return Frame(frame.users, frame.items, parts, frame.aggregates)


def write_repeated(frame: Frame, directory: Path, times: int) -> None:
    """Writes the frame with its examples so many times over, in blocks; each copy has events of its own."""
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "examples").mkdir(parents=True)
    write_parquet(frame.users, directory / "users.parquet")
    write_parquet(frame.items, directory / "items.parquet")
    examples = frame.all_blocks()
    span = 1 + max(int(block["event"].to_numpy().max()) for block in examples.frames("event") if block.height)
    for part in PARTS:
        rows = frame.part(part)
        count = block_count(times * rows.height)
        for number in range(count):
            copies = []
            for copy in range(times):
                later = rows.with_columns(pl.col("event") + pl.lit(copy * span, dtype=pl.UInt32))
                copies.append(later.filter(block_of(later["event"].to_numpy(), count) == number))
            write_block(pl.concat(copies), block_path(directory, part, number))


def _memory(dataset: Dataset, out: Path, times: int) -> dict[str, Any]:
    """Trains an epoch on the repeated examples in a process of its own."""
    directory = out / f"{times}-times"
    write_repeated(read_frame(out / "run" / "frame"), directory, times)
    shutil.copy(out / "run" / "frame" / AGGREGATES, directory / AGGREGATES)
    command = [sys.executable, "-m", __name__, str(dataset.source), str(directory)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise TesseraError(f"training-blocks: the training of {directory} failed: {ended.stderr[-500:].strip()}")
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def train_once(descriptor: Path, directory: Path) -> dict[str, Any]:
    """Trains an epoch on the frame in a directory; returns its examples and blocks, and the peak memory in GB."""
    dataset, frame = load_dataset(descriptor), read_frame(directory)
    options = load_options(dataset)
    schema = default_schema(dataset, frame, options.shape, history_length=options.history_length)
    train(schema, frame, replace(options.train_config(), max_epochs=1))
    found = {"examples": frame.height("train"), "blocks": len(frame.blocks("train"))}
    return found | {"peak_gb": resident_gb("VmHWM")}


def _trained(dataset: Dataset, frame: Frame, options: RunOptions, config: TrainConfig) -> dict[str, Any]:
    schema = default_schema(dataset, frame, options.shape, history_length=options.history_length)
    trained = train(schema, frame, config)
    test = frame.blocks("test")
    predicted = predict_part(trained.ranker, schema, frame, test, Admission(trained.sketch, schema.admission))
    measured = asdict(quality(test.whole("label")["label"].to_numpy().astype(np.float32), predicted))
    return {"examples": frame.height("train"), "epochs": len(trained.epochs), "test_auc": measured["auc"]}


if __name__ == "__main__":
    print(json.dumps(train_once(Path(sys.argv[1]), Path(sys.argv[2]))))
