"""Stage `evaluate`: measures the ranker and its baselines on the test part, for known and unseen items and users."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.ranker.evaluate import by_novelty, novelty, rate_baselines
from models.ranker.stored import load_ranker
from models.ranker.train import predict_part
from models.table.admission import Admission
from tessera.pipeline.artifact import read_frame, write_json
from tessera.pipeline.job import Finished, Job
from tessera.pipeline.stage import Advance
from tessera.pipeline.train import HASHED_ID, RANKER, read_choice, read_report

READS = ("seed",)
_METRICS = "metrics.json"


def evaluate(
    job: Job,
    framed: Finished,
    trained: Finished,
    assigned: Finished | None,
    chosen: Finished | None,
    correction: Finished | None = None,
) -> Finished:
    """Runs the stage after `train`."""

    def work(directory: Path, advance: Advance) -> None:
        frame = read_frame(framed.directory)
        test = frame.blocks("test")
        labels = test.whole("label")["label"].to_numpy().astype(np.float32)
        items, users = novelty(frame, "item"), novelty(frame, "user")
        predicted: dict[str, NDArray[np.floating]] = {**rate_baselines(frame)}
        advance(1, 3)
        for number, name in enumerate((HASHED_ID, RANKER)):
            schema, model = load_ranker(trained.directory / name, job.options.train_config())
            admission = Admission(model.sketch, schema.admission)
            predicted[name] = predict_part(model.ranker, schema, frame, test, admission)
            advance(number + 2, 3)
        metrics: dict[str, Any] = {
            "split": job.split.by,
            "seed": job.options.seed,
            "rows": {name: frame.height(name) for name in ("train", "validation", "test")},
            "quality": {
                name: {part: asdict(measured) for part, measured in by_novelty(labels, p, items, users).items()}
                for name, p in predicted.items()
            },
        }
        if assigned is not None:
            metrics["semantic_ids"] = msgspec.json.decode((assigned.directory / "report.json").read_bytes())
        if chosen is not None:
            metrics["reads"] = asdict(read_choice(chosen))
        if correction is not None:
            metrics["correction"] = read_report(correction)
        write_json(directory / _METRICS, metrics)

    after = {"train": trained} | ({"correct": correction} if correction is not None else {})
    return job.do("evaluate", work, reads=READS, after=after)


def read_metrics(evaluated: Finished) -> dict[str, Any]:
    """Returns the metrics of the stage, as in metrics.json."""
    metrics: dict[str, Any] = msgspec.json.decode((evaluated.directory / _METRICS).read_bytes())
    return metrics
