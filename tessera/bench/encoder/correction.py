"""`correction`: shows that a user's labelled items correct the scores of new items, and what that costs a request.

The ranker is `tessera run`'s own, on the id and the content vector. New items are those that `cold-start` holds out,
and the weight is fitted on other items that are held out inside the training part. The control deals the residuals of
a user's labelled items out among them, and its weight is fitted the same way. The cost is measured on a server of a
synthetic shop: requests of known and of new candidates, with and without the correction, in turns.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console

from features.dataset.descriptor import Dataset, load_dataset
from features.errors import DatasetError
from models.bundle import record
from models.bundle.bundle import Bundle
from models.encoder.meaning.neighbours import corrected, fit_weight
from models.ranker.correct import held_out_votes, plain_correction, votes_of
from models.ranker.evaluate import quality
from models.ranker.train import TrainConfig, predict_part, train
from models.table.admission import Admission
from serving.ranking.service import RankService
from serving.store.fill import fill_store
from serving.store.memory import MemoryStore
from tessera.bench.harness.data import progress_bar, remembered
from tessera.bench.harness.result import BenchResult, Claim, at_least, at_most
from tessera.bench.offline.cold_start import VARIANTS, ColdWorld
from tessera.demo.synthetic import write_synthetic
from tessera.pipeline.run import RunOptions, run

RANKER, NEAR, PERMUTED = "ranker", "with neighbours", "with permuted neighbours"
_VARIANT = "id + dense"
_CANDIDATES, _ROUNDS = 200, 400
Row = dict[str, Any]


def correction(
    dataset: Dataset, out: Path, *, seeds: int, console: Console, config: TrainConfig | None = None
) -> BenchResult:
    """Measures each seed and the cost; finished parts are kept in `out`.

    Args:
        dataset: Dataset with items that have text, and with events of both labels.
        seeds: Number of seeds, from 0; each decides the held-out items and the training.

    Raises:
        DatasetError: Every event of the dataset is positive.
    """
    if dataset.events.label.implicit:
        raise DatasetError(f"{dataset.source}: correction needs events of both labels; declare negatives in [events]")
    rows: list[Row] = []
    with progress_bar(console) as progress:
        task = progress.add_task("correction", total=seeds + 1)
        for seed in range(seeds):
            world = ColdWorld(dataset, seed)
            used = replace(config or TrainConfig(patience=1), seed=seed)
            path = out / f"{seed}.json"
            rows += remembered(path, __name__, (world.key, repr(used)), partial(_measured, world, used, dataset))[
                "rows"
            ]
            progress.advance(task)
        rows += remembered(out / "cost.json", __name__, (_CANDIDATES, _ROUNDS), partial(_cost, out / "shop"))["rows"]
        progress.advance(task)
    return BenchResult("correction", dataset.name, seeds, rows, list(claims(rows)))


def _measured(world: ColdWorld, config: TrainConfig, dataset: Dataset) -> Row:
    frame, schema = world.ready(VARIANTS[_VARIANT])
    lag = dataset.events.lag
    held = held_out_votes(schema, frame, config, lag=lag)
    trained = train(schema, frame, config)
    new = frame.part("new")
    admission = Admission(trained.sketch, schema.admission)
    scores = predict_part(trained.ranker, schema, frame, frame.blocks("new"), admission).astype(np.float64)
    known = pl.concat([frame.part(name).select("user", "item", "time", "label") for name in _KNOWN])
    near, permuted = votes_of(plain_correction(frame, ""), frame, new, known, lag=lag, seed=config.seed)
    labels = new["label"].to_numpy().astype(np.float32)
    rows = [_row(config.seed, RANKER, 0.0, labels, scores)]
    for way, fitted_on, votes in ((NEAR, held.votes, near), (PERMUTED, held.permuted, permuted)):
        weight = fit_weight(held.labels, held.scores, fitted_on)
        rows.append(_row(config.seed, way, weight, labels, corrected(scores, weight * votes)))
    return {"rows": rows}


_KNOWN = ("train", "validation", "test")


def _row(seed: int, way: str, weight: float, labels: Any, scores: Any) -> Row:
    measured = quality(labels, scores)
    found = {"auc": measured.auc, "log_loss": measured.log_loss, "calibration_error": measured.calibration_error}
    return {"part": "new items", "way": way, "seed": seed, "weight": weight, **found, "events": measured.rows}


def claims(rows: list[Row]) -> Iterator[Claim]:
    """Yields the claims, judged from the means over the seeds."""

    def gain(way: str, name: str) -> float:
        means = [np.mean([row[name] for row in rows if row.get("way") == one]) for one in (way, RANKER)]
        return float(means[0] - means[1])

    yield at_least(f"new items, {NEAR}: AUC gained", gain(NEAR, "auc"), 0.002)
    yield at_most(f"new items, {NEAR}: log loss gained", gain(NEAR, "log_loss"), -0.003)
    yield at_most(f"control: new items, {PERMUTED}: AUC gained", gain(PERMUTED, "auc"), 0.001)
    ratios = {row["way"]: row["ratio"] for row in rows if row["part"] == "cost"}
    if "known candidates" in ratios:
        yield at_most(
            "a request of known candidates: time with the correction over without", ratios["known candidates"], 1.1
        )


def _cost(directory: Path) -> Row:
    """Returns the time of a request with the correction over that without: the median ratio of a turn."""
    descriptor = write_synthetic(directory / "data", users=300, items=400, events=12_000)
    options = RunOptions(correct="neighbours", reads=("id", "content"), training=TrainConfig(patience=1))
    bundle = run(
        load_dataset(descriptor),
        directory / "run",
        options,
        console=Console(quiet=True),
        registry=None,
        until="publish",
    ).bundle
    assert bundle is not None
    if bundle.correction is None:
        return {"rows": [{"part": "cost", "way": "not measured: the synthetic shop's correction does not pay"}]}
    store = MemoryStore()
    fill_store(store, bundle)
    known, new = bundle.items["item_id"].head(_CANDIDATES).to_list(), [f"new-{one}" for one in range(_CANDIDATES)]
    store.write_records(bundle.id, record.ITEM, new, [1] * len(new), _records_of(bundle, len(new)))
    with_it, without = RankService(bundle, store), RankService(bundle, store)
    without._corrector = None
    users = bundle.labelled["user_id"].unique(maintain_order=True).to_list()
    requests = {"known candidates": known, "one new": [*known[1:], new[0]], "all new": new}
    rows = []
    for way, candidates in requests.items():
        turns = ((with_it, without, users[turn % len(users)]) for turn in range(_ROUNDS))
        times = np.array([_in_turn(*turn, candidates, first=number % 2) for number, turn in enumerate(turns)])
        ms, ms_without = (float(one) for one in np.median(times, axis=0))
        # Other work slows both requests of a turn, so their ratio is steadier than the ratio of two medians.
        ratio = float(np.median(times[:, 0] / times[:, 1]))
        rows.append({"part": "cost", "way": way, "ms": ms, "ms_without": ms_without, "ratio": ratio})
    return {"rows": rows}


def _records_of(bundle: Bundle, count: int) -> list[bytes]:
    """Returns records of new items, with the vectors and codes of the bundle's first items."""
    space, codebook = bundle.manifest.encoder or "", bundle.manifest.codebook or ""
    return [
        record.encode(
            record.ItemRecord(
                space, np.array(row["content_vector"], dtype="<f4").tobytes(), list(row["semantic_codes"]), {}, codebook
            )
        )
        for row in bundle.items.head(count).iter_rows(named=True)
    ]


def _in_turn(
    with_it: RankService, without: RankService, user: str, candidates: list[str], *, first: int
) -> tuple[float, float]:
    """Returns the milliseconds of a request with and without the correction; `first` 1 asks without it first."""
    if first:
        later = _timed(without, user, candidates)
        return _timed(with_it, user, candidates), later
    return _timed(with_it, user, candidates), _timed(without, user, candidates)


def _timed(service: RankService, user: str, candidates: list[str]) -> float:
    begin = time.perf_counter()
    service.rank(user, candidates, 10)
    return (time.perf_counter() - begin) * 1e3
