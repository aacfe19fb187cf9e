"""`cold-start --users`: quality for users that training never saw, beside rates that only count.

Two ways make a user new. `held out`: a seeded tenth of the users has no training and no validation event, and all their
events are judged. `later`: the descriptor's split leaves users whose first event comes after the training part. Known
users are judged by the test part. The ranker is that of `tessera run`, and its variants differ in the dropout of users
alone. The running rates know every event strictly before the judged event, as the ranker's history does.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.console import Console

from features.dataset.descriptor import Dataset
from features.errors import DatasetError
from features.frame import Frame
from models.ranker.evaluate import by_novelty, novelty, rate_baselines
from models.ranker.loading import assembler, examples
from models.ranker.train import predict, train
from models.table.admission import Admission
from models.table.default_schema import default_schema, hashed_id_schema
from tessera.bench.harness.data import progress_bar, remembered
from tessera.bench.harness.result import BenchResult, Claim, at_least
from tessera.bench.harness.rows import measured_rows
from tessera.pipeline.artifact import read_frame
from tessera.pipeline.options import RunOptions, load_options
from tessera.pipeline.run import run

HELD_OUT, LATER = "held out", "later"
RUNNING, HASHED_ID, DEFAULT, UNHIDDEN = "user-item-running", "hashed id", "default", "default, user dropout 0"
RANKERS: dict[str, float | None] = {
    HASHED_ID: None,
    UNHIDDEN: 0.0,
    DEFAULT: None,
    "default, user dropout 0.3": 0.3,
    "default, user dropout 0.5": 0.5,
}
"""Share of the examples in which the user is hidden, by ranker; None for the default share."""
_NEW_SHARE = 0.1
_GAIN, _LOSS = 0.01, -0.001


def new_users(
    dataset: Dataset, out: Path, *, seeds: int, console: Console, rankers: Sequence[str] = tuple(RANKERS)
) -> BenchResult:
    """Trains every ranker in every seed and both ways; finished ones are kept in `out`.

    Args:
        dataset: Dataset with users.
        out: Directory of the run up to its frame, and of the results.
        seeds: Number of seeds, from 0; each decides the held-out users and the ranker.
        rankers: Names in `RANKERS`.

    Raises:
        DatasetError: The dataset has no users.
    """
    if dataset.events.user is None:
        raise DatasetError(f"{dataset.source}: cold-start --users needs [events] user; this dataset has none")
    rows = measured_rows()
    with progress_bar(console) as progress:
        task = progress.add_task("new users", total=2 * seeds * len(rankers))
        for seed in range(seeds):
            options = load_options(dataset, [f"seed={seed}"])
            made = run(dataset, out / f"run-{seed}", options, console=console, registry=None, until="frame")
            frame = read_frame(made.directory / "frame")
            for way, world in ((HELD_OUT, held_out(frame, seed)), (LATER, frame)):
                for name, found in rate_baselines(world).items():
                    rows.append(_row(way, seed, name, measured(world, found)))
                for name in rankers:
                    path = out / f"{way.replace(' ', '-')}-{list(RANKERS).index(name)}-{seed}.json"
                    work = partial(_trained, dataset, world, options, name)
                    decided_by = (dataset.model_dump(mode="json", exclude={"source"}), options.choices(), way, name)
                    rows.append(_row(way, seed, name, remembered(path, __name__, decided_by, work)))
                    progress.advance(task)
    return BenchResult("cold-start --users", dataset.name, seeds, rows, claims(rows))


def held_out(frame: Frame, seed: int) -> Frame:
    """Returns the frame whose test part is that of the known users, and all events of a seeded tenth of the users."""
    new = np.random.default_rng([seed, 3]).random(frame.users.height) < _NEW_SHARE
    of_new = pl.Series(new[frame.examples["user"].to_numpy()])
    other = novelty(frame, "user")
    assert other is not None
    # Other users without a training event would be counted as held out.
    later = pl.Series(np.unique(other.ids[~other.known]), dtype=frame.examples["user"].dtype).implode()
    kept = of_new | (frame.examples["split"] != "test") | ~frame.examples["user"].is_in(later)
    split = pl.when(of_new).then(pl.lit("test")).when(kept).then(pl.col("split")).otherwise(pl.lit("unused"))
    return frame.replace(examples=frame.examples.with_columns(split=split))


def measured(frame: Frame, probabilities: NDArray[np.floating]) -> dict[str, Any]:
    """Measures probabilities (N,) of a frame's test part for all, known and unseen users."""
    labels = frame.part("test")["label"].to_numpy().astype(np.float32)
    found = by_novelty(labels, probabilities, None, novelty(frame, "user"))
    return {part: asdict(found[part]) for part in ("all", "known_users", "unseen_users")}


def _trained(dataset: Dataset, frame: Frame, options: RunOptions, name: str) -> dict[str, Any]:
    schema = default_schema(dataset, frame, options.shape, history_length=options.history_length)
    config, share = options.train_config(), RANKERS[name]
    if share is not None:
        config = replace(config, dropout=replace(config.dropout, user=share))
    if name == HASHED_ID:
        schema = hashed_id_schema(schema)
    trained = train(schema, frame, config)
    test = frame.part("test")
    source = assembler(schema, frame, test, Admission(trained.sketch, schema.admission))
    return measured(frame, predict(trained.ranker, source, examples(test)))


def _row(way: str, seed: int, name: str, found: dict[str, Any]) -> dict[str, Any]:
    row = {"users": way, "seed": seed, "model": name}
    for part in ("known_users", "unseen_users"):
        row |= {f"{part}_{name}": found[part][name] for name in ("rows", "distinct", "auc")}
    return row


def claims(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """Returns the claims of each way, each by the seed that speaks most against it.

    New users: the default ranker beats the running rates by `_GAIN`. Known users: hiding users costs at most `_LOSS`.
    """
    found = []
    for way in dict.fromkeys(row["users"] for row in rows):
        aucs = {(row["model"], row["seed"]): row for row in rows if row["users"] == way}
        seeds = sorted({seed for model, seed in aucs if model == DEFAULT})
        for part, theirs, target in (("unseen_users", RUNNING, _GAIN), ("known_users", UNHIDDEN, _LOSS)):
            margins = [
                aucs[DEFAULT, seed][f"{part}_auc"] - aucs[theirs, seed][f"{part}_auc"]
                for seed in seeds
                if (theirs, seed) in aucs and aucs[DEFAULT, seed][f"{part}_auc"] is not None
            ]
            if margins:
                claim = f"{way}, {part.replace('_', ' ')}: AUC of {DEFAULT} less that of {theirs} (smallest margin)"
                found.append(at_least(claim, min(margins), target))
    return found
