"""Stage `retrieve`: trains the two towers of retrieval, whose rows then end the table that `train` goes on from."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.text import Text

from features.frame import Frame
from models.bundle.contents import TOWERS
from models.ranker.network import Ranker
from models.ranker.train import TrainConfig
from models.table.row_files import FileTable
from models.table.schema import Schema
from models.towers.evaluate import retrieval_quality
from models.towers.rows import with_reserved
from models.towers.shape import check_events, tower_schema
from models.towers.stored import load_rows_of, load_towers, save_trained
from models.towers.train import train_towers
from tessera.pipeline.artifact import read_frame
from tessera.pipeline.job import Finished, Job
from tessera.pipeline.stage import Advance

READS = ("seed", "retrieval", "towers", "history_length", "table.dim", "training.threads")
_CHECKPOINT = ".checkpoint"


def retrieve(job: Job, framed: Finished) -> Finished | None:
    """Runs the stage after `frame`; None if the run trains no towers."""
    if job.options.retrieval == "off":
        return None

    def work(directory: Path, advance: Advance) -> None:
        if (directory / TOWERS).exists():
            return
        frame, options = read_frame(framed.directory), job.options
        schema = tower_schema(job.dataset, frame, options.towers, dim=options.table.dim, length=options.history_length)
        halfway = directory / _CHECKPOINT
        trained = train_towers(
            schema,
            frame,
            options.towers,
            seed=options.seed,
            threads=options.training.threads,
            lag=job.dataset.events.lag,
            progress=advance,
            halfway=halfway,
        )
        (directory / TOWERS).mkdir()
        save_trained(directory / TOWERS, trained)
        halfway.unlink(missing_ok=True)
        best = int(np.argmax(trained.gains)) if trained.gains else 0
        job.console.print(
            Text(
                f"retrieve: epoch {best + 1} of {len(trained.gains)}, {schema.rows:,} rows of their own, "
                f"content weighs {trained.towers.content_weight:g} beside the towers",
                "dim",
            )
        )

    return job.do("retrieve", work, reads=READS, after={"frame": framed}, unit="windows")


def check_retrieval(job: Job) -> None:
    """Checks before the first stage that the events name users and items.

    Raises:
        DatasetError: They do not; names the descriptor and the remedy.
    """
    if job.options.retrieval != "off":
        check_events(job.dataset)


def tower_directory(finished: Finished | None) -> Path | None:
    """Returns the directory of the trained towers; None without the stage."""
    return None if finished is None else finished.directory / TOWERS


def with_towers(
    retrieved: Finished | None, schema: Schema, ranker: Ranker, config: TrainConfig
) -> tuple[Schema, Ranker]:
    """Returns a ranker whose table ends with the towers' rows; without towers, with none reserved."""
    directory = tower_directory(retrieved)
    rows = np.zeros((0, schema.dim), dtype=np.float32) if directory is None else load_rows_of(directory)
    return with_reserved(schema, ranker, rows, table_rate=config.table_rate)


def towers_quality(job: Job, retrieved: Finished, frame: Frame, schema: Schema, ranker: Ranker) -> dict[str, Any]:
    """Measures the towers on the test part, with the rows of the table that the ranker was trained on."""
    start = schema.rows - schema.reserved
    towers = load_towers(retrieved.directory / TOWERS).at(start)
    table = ranker.table

    def read_rows(numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        found = table.rows(numbers) if isinstance(table, FileTable) else table.weight[torch.from_numpy(numbers)]
        return np.asarray(found.numpy())

    return retrieval_quality(frame, towers, read_rows, lag=job.dataset.events.lag, seed=job.options.seed)
