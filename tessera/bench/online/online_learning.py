"""`online-learning`: measures the gain of learning from the stream: the test part, in time order, through its step.

Every event is predicted before it is learnt (progressive validation; Gama, Sebastião & Rodrigues, "On evaluating
stream learning algorithms", Machine Learning 2013), by tables with several learning rates and by the frozen one, whose
histories and items go on all the same. The first fifth of the stream chooses the rate; the rest judges it.
The same rows are predicted by the rates that only count, static and running.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from sklearn.metrics import log_loss, roc_auc_score

from features.dataset.descriptor import Dataset
from features.errors import TesseraError
from models.ranker.evaluate import RATE_BASELINES, rate_baselines
from streaming.log.protocol import Message
from streaming.log.topics import Topics
from streaming.step import Step
from tessera.bench.harness.live_data import NEVER_LATE_S, LiveData, live_data
from tessera.bench.harness.result import BenchResult, Claim, at_least
from tessera.bench.harness.rows import measured_rows
from tessera.pipeline.artifact import read_frame
from tessera.terminal import one_thread

_FACTORS = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
_BATCH = 256
_CHOOSING = 0.2
_MARGIN = 0.01
# The frozen table's aggregates and histories go on, so the rows alone make the difference.
_LEARNT = 0.005


def online_learning(dataset: Dataset, out: Path, *, seeds: int, console: Console) -> BenchResult:
    """Runs once, whatever the seeds: nothing is drawn."""
    one_thread()
    data = live_data(dataset, out, console)
    own = data.bundle.manifest.training.table_rate
    rows = measured_rows()
    labels = np.zeros(0, dtype=np.float32)
    for factor in track(_FACTORS, "learning rates", console=console):
        labels, logits = _progressive(data, own * factor)
        rows.append(_row("learning" if factor else "frozen", labels, logits) | {"learning_rate": own * factor})
    frozen, *learning = rows
    rates = _rates(out / dataset.name / "frame", labels)
    chosen = max(learning, key=lambda row: row["choosing_auc"])
    return BenchResult("online-learning", dataset.name, 1, [*rows, *rates], _claims(chosen, frozen, rates))


def _claims(chosen: dict[str, Any], frozen: dict[str, Any], rates: list[dict[str, Any]]) -> list[Claim]:
    return [
        at_least(
            "progressive AUC less the frozen table's, whose aggregates and histories go on",
            _gain(chosen, frozen),
            0.005,
        ),
        *(
            at_least(f"progressive AUC less that of {baseline['model']}", _gain(chosen, baseline), _MARGIN)
            for baseline in rates
        ),
    ]


def _row(model: str, labels: NDArray[np.float32], logits: NDArray[np.floating]) -> dict[str, Any]:
    cut = int(_CHOOSING * len(labels))
    chance = 1 / (1 + np.exp(-logits.astype(np.float64)))
    return {
        "model": model,
        "choosing_rows": cut,
        "choosing_auc": float(roc_auc_score(labels[:cut], logits[:cut])),
        "rows": len(labels) - cut,
        "auc": float(roc_auc_score(labels[cut:], logits[cut:])),
        "log_loss": float(log_loss(labels[cut:], chance[cut:])),
    }


def _rates(frame_dir: Path, labels: NDArray[np.float32]) -> list[dict[str, Any]]:
    """Returns the rows of the baselines that only count, on the streamed test part, whose labels (N,) must agree."""
    frame = read_frame(frame_dir)
    test = frame.part("test").with_row_index("row").sort("time", "event", maintain_order=True)
    order = test["row"].to_numpy()
    if not np.array_equal(test["label"].to_numpy(), labels):
        raise TesseraError(
            "bench online-learning: the stream's labels are not those of the test part; use a dataset "
            "with labels of its own and no [events] label implicit"
        )
    probabilities = rate_baselines(frame)
    return [
        _row(name, labels, np.log(probabilities[name] / (1 - probabilities[name]))[order]) for name in RATE_BASELINES
    ]


def _gain(row: dict[str, Any], frozen: dict[str, Any]) -> float:
    return float(row["auc"] - frozen["auc"])


def _progressive(data: LiveData, learning_rate: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    step = Step(data.bundle, Topics(), lateness_s=NEVER_LATE_S, learning_rate=learning_rate)
    labels, logits = [], []
    for start in range(0, len(data.messages), _BATCH):
        part = data.messages[start : start + _BATCH]
        messages = [Message("events", 0, start + n, None, value, 1 << 41) for n, value in enumerate(part)]
        outcome = step.apply(messages)
        labels.append(outcome.labels)
        logits.append(outcome.logits)
    return np.concatenate(labels), np.concatenate(logits)
