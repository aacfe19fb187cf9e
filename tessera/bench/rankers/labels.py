"""`labels`: one ranker of several tasks beside a ranker of its own for each task, on the same rows.

A dataset with one label over numbers, such as `rating >= 4`, becomes one with three tasks: the rule, and the rules one
below and one above it. All rankers read the same frame, history and aggregates, with items by id and metadata.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console

from features.dataset.descriptor import Dataset
from features.dataset.label import TASK, parse_rule
from features.errors import DatasetError
from features.frame import Frame
from models.networks.kinds import DEFAULT
from models.ranker.evaluate import quality
from models.ranker.network import NetworkConfig
from models.ranker.train import TrainConfig, predict_part_tasks, train
from models.table.admission import Admission
from models.table.default_schema import default_schema
from models.table.schema import Schema
from tessera.bench.harness.data import dataset_frame, remembered
from tessera.bench.harness.result import BenchResult, Claim, at_least
from tessera.bench.harness.rows import measured_rows
from tessera.pipeline.options import RunOptions, load_options

_KINDS = (DEFAULT, "mmoe")
_ALONE = "alone"
_MOST_BEHIND = -0.002


def labels(
    dataset: Dataset, out: Path, *, seeds: int, console: Console, options: RunOptions | None = None
) -> BenchResult:
    """Measures each task's test AUC, of one ranker of all tasks in two kinds and of a ranker of each task alone.

    Args:
        dataset: Dataset with several tasks, or with one label by a rule over numbers.
        out: Directory of kept results, so that a later call continues there.
        seeds: Number of seeds, from 0; they decide initial values and the order of examples.
        console: Prints progress.
        options: Choices of the run; None for those of the descriptor.

    Raises:
        DatasetError: No three tasks can be made of the dataset's label.
    """
    several = with_tasks_of_rule(dataset)
    chosen = load_options(several) if options is None else options
    frame = dataset_frame(several, history_length=chosen.history_length, aggregates=chosen.aggregates)
    schema = default_schema(several, frame, chosen.shape, history_length=chosen.history_length)
    tasks = several.events.tasks
    assert tasks is not None
    config = replace(chosen.train_config(), device="cpu")
    networks = {
        DEFAULT: replace(config.network, tasks=tasks.weights, judge=tasks.judge),
        "mmoe": NetworkConfig(kind="mmoe", content=config.network.content, tasks=tasks.weights, judge=tasks.judge),
    }
    decided_by = several.model_dump(mode="json", exclude={"source"}), chosen.choices()
    rows = measured_rows()
    for seed in range(seeds):
        of_seed = replace(config, seed=seed)
        arms = {kind: partial(_trained, schema, frame, replace(of_seed, network=networks[kind])) for kind in _KINDS}
        plain = replace(of_seed, network=replace(config.network, tasks={}, judge=""))
        for task in tasks.labels:
            arms[f"{_ALONE}-{task}"] = partial(_trained, schema, alone(frame, task), plain)
        for name, work in arms.items() if seed % 2 else reversed(arms.items()):
            console.print(f"labels: seed {seed}, {name}")
            kept = remembered(out / f"{name}-{seed}.json", __name__, (*decided_by, seed, name), work)
            for number, auc in enumerate(kept["test_auc"]):
                model, _, task = name.partition("-") if name.startswith(_ALONE) else (name, "", [*tasks.labels][number])
                shown = {key: value for key, value in kept.items() if key != "test_auc"}
                rows.append({"model": model, "task": task, "seed": seed, "test_auc": auc} | shown)
    return BenchResult("labels", dataset.name, seeds, rows, claims(rows))


def with_tasks_of_rule(dataset: Dataset) -> Dataset:
    """Returns a dataset of several tasks; see the module.

    Raises:
        DatasetError: The dataset has one label that is no rule over numbers.
    """
    if dataset.events.labels:
        return dataset
    label = dataset.events.label
    rule = parse_rule(label.positive) if label.positive is not None else None
    if rule is None or rule.op != ">=" or not isinstance(rule.value, float):
        raise DatasetError(
            f'{dataset.source}: labels needs [events.labels], or a label such as positive = ">= 4"; declare either'
        )
    tasks = {
        f"at_least_{value:g}".replace(".", "_"): {"column": label.column, "positive": f">= {value:g}"}
        for value in (rule.value - 1, rule.value, rule.value + 1)
    }
    events = dataset.events.model_dump(exclude={"label"}) | {"labels": tasks, "judge": [*tasks][1]}
    return Dataset.model_validate(dataset.model_dump(exclude={"events"}) | {"events": events})


def alone(frame: Frame, task: str) -> Frame:
    """Returns the frame whose label is that of one task, with the rows on which it is known."""
    examples = frame.examples.with_columns(label=pl.col(f"{TASK}{task}")).filter(pl.col("label").is_not_null())
    return frame.replace(examples=examples.select(pl.exclude(f"^{TASK}.*$")))


def claims(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """Judges each task's mean over the seeds."""

    def mean(model: str, task: str) -> float:
        return float(np.mean([row["test_auc"] for row in rows if (row["model"], row["task"]) == (model, task)]))

    return [
        at_least(
            f"test AUC of {task}, {kind} of all tasks over a ranker of its own", mean(kind, task) - own, _MOST_BEHIND
        )
        for task in dict.fromkeys(row["task"] for row in rows)
        for own in (mean(_ALONE, task),)
        for kind in _KINDS
    ]


def _trained(schema: Schema, frame: Frame, config: TrainConfig) -> dict[str, Any]:
    began = time.process_time()
    trained = train(schema, frame, config)
    cpu_s = time.process_time() - began
    test = frame.blocks("test")
    found = predict_part_tasks(trained.ranker, schema, frame, test, Admission(trained.sketch, schema.admission))
    names = [f"{TASK}{task}" for task in config.network.tasks] or ["label"]
    known = test.whole(*names).cast(pl.Float32).fill_null(np.nan).to_numpy()
    predicted = found.reshape(len(known), -1)
    return {
        "test_auc": [quality(known[:, place], predicted[:, place]).auc for place in range(len(names))],
        "epochs": len(trained.epochs),
        "cpu_s": cpu_s,
        "table_bytes": 4 * schema.rows * schema.dim,
        "parameters": sum(own.numel() for own in trained.ranker.network.parameters()),
    }
