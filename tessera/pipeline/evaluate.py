"""Stage `evaluate`: measures the ranker and its baselines on the test part, for known and unseen items and users."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.dataset.label import TASK
from models.ranker.evaluate import at_places, by_novelty, novelty, rate_baselines
from models.ranker.stored import load_ranker
from models.ranker.train import predict_part_tasks
from models.table.admission import Admission
from models.table.default_schema import places_of
from tessera.pipeline.artifact import read_frame, write_json
from tessera.pipeline.job import Finished, Job
from tessera.pipeline.retrieve import towers_quality
from tessera.pipeline.stage import Advance
from tessera.pipeline.train import HASHED_ID, RANKER, read_choice, read_path, read_report

READS = ("seed",)
_METRICS = "metrics.json"


@dataclass(frozen=True)
class Reported:
    """Finished stages whose results stand in the metrics; None where a stage did not run."""

    assigned: Finished | None = None
    chosen: Finished | None = None
    placed: Finished | None = None
    correction: Finished | None = None
    retrieved: Finished | None = None


def evaluate(job: Job, framed: Finished, trained: Finished, reported: Reported) -> Finished:
    """Runs the stage after `train`.

    Rankers predict as a server does, without places. If the events have a placement, all predictions are then told the
    places alike (`at_places`), and `served` holds the quality of the ranker without them. Of several tasks, `quality`
    is the judged task's, and `tasks` has the ranker's quality at each task.
    """

    def work(directory: Path, advance: Advance) -> None:
        frame = read_frame(framed.directory)
        test = frame.blocks("test")
        labels = test.whole("label")["label"].to_numpy().astype(np.float32)
        items, users = novelty(frame, "item"), novelty(frame, "user")
        predicted: dict[str, NDArray[np.floating]] = {**rate_baselines(frame)}
        retrieval: dict[str, Any] = {}
        advance(1, 3)
        for number, name in enumerate((HASHED_ID, RANKER)):
            schema, model = load_ranker(trained.directory / name, job.options.train_config(), trains=False)
            admission = Admission(model.sketch, schema.admission)
            outputs = predict_part_tasks(model.ranker, schema.served, frame, test, admission)
            predicted[name] = model.ranker.network.judged(outputs)
            if name == RANKER and reported.retrieved is not None:
                retrieval["retrieval"] = towers_quality(job, reported.retrieved, frame, schema, model.ranker)
            advance(number + 2, 3)

        def measured(probabilities: NDArray[np.floating], labels: NDArray[np.float32] = labels) -> dict[str, Any]:
            return {part: asdict(one) for part, one in by_novelty(labels, probabilities, items, users).items()}

        metrics: dict[str, Any] = {
            "split": job.split.by,
            "seed": job.options.seed,
            "rows": {name: frame.height(name) for name in ("train", "validation", "test")},
        }
        places = places_of(job.dataset, frame, "test")
        if places is not None:
            metrics["served"] = measured(predicted[RANKER])
            predicted = {name: at_places(found, labels, places) for name, found in predicted.items()}
        if job.dataset.events.tasks is not None:
            names = tuple(job.dataset.events.labels)
            known = test.whole(*(f"{TASK}{name}" for name in names)).cast(pl.Float32).fill_null(np.nan).to_numpy()
            metrics["tasks"] = {name: measured(outputs[:, place], known[:, place]) for place, name in enumerate(names)}
        metrics["quality"] = {name: measured(found) for name, found in predicted.items()}
        write_json(directory / _METRICS, metrics | retrieval | _results(reported))

    placed = {"place": reported.placed} if reported.placed is not None else {}
    corrected = {"correct": reported.correction} if reported.correction is not None else {}
    return job.do("evaluate", work, reads=READS, after={"train": trained, **placed, **corrected})


def _results(reported: Reported) -> dict[str, Any]:
    """Returns the results of the reported stages, by name in the metrics."""
    found: dict[str, Any] = {}
    if reported.assigned is not None:
        found["semantic_ids"] = msgspec.json.decode((reported.assigned.directory / "report.json").read_bytes())
    if reported.chosen is not None:
        found["reads"] = asdict(read_choice(reported.chosen))
    if reported.placed is not None:
        found["placement"] = asdict(read_path(reported.placed))
    if reported.correction is not None:
        found["correction"] = read_report(reported.correction)
    return found


def read_metrics(evaluated: Finished) -> dict[str, Any]:
    """Returns the metrics of the stage, as in metrics.json."""
    metrics: dict[str, Any] = msgspec.json.decode((evaluated.directory / _METRICS).read_bytes())
    return metrics
