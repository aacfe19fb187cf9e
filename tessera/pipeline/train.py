"""Stage `train`: trains the ranker, and as a baseline a ranker that reads the ids alone."""

from functools import partial
from pathlib import Path

from features.durable import write_directory
from models.ranker.stored import save_ranker
from models.ranker.train import Checkpointing
from models.ranker.train import train as train_ranker
from models.table.default_schema import default_schema, hashed_id_schema
from tessera.pipeline.artifact import read_frame
from tessera.pipeline.job import Finished, Job
from tessera.pipeline.stage import Advance

RANKER, HASHED_ID = "ranker", "hashed-id"
READS = ("seed", "table", "history_length", "training", "ranker")


def train(job: Job, framed: Finished) -> Finished:
    """Runs the stage after `frame`. A warm start begins with the earlier ranker."""
    config = job.options.train_config()

    def work(directory: Path, advance: Advance) -> None:
        frame = read_frame(framed.directory)
        options = job.options
        schema = default_schema(job.dataset, frame, options.table, history_length=options.history_length)
        baseline = hashed_id_schema(schema)
        start = None
        if job.previous:
            schema, start = job.previous.ranker(schema, frame, config)
        jobs = ((RANKER, schema, start), (HASHED_ID, baseline, None))
        for number, (name, shape, begin) in enumerate(jobs):
            model = directory / name
            if model.exists():
                continue

            def both(done: int, total: int, number: int = number) -> None:
                advance(done + number * total, 2 * total)

            halfway = Checkpointing(directory / f"{name}.checkpoint")
            trained = train_ranker(shape, frame, config, progress=both, checkpointing=halfway, start=begin)
            write_directory(model, partial(save_ranker, schema=shape, trained=trained))
            halfway.path.unlink(missing_ok=True)
            if config.precision == "auto":
                job.console.print(f"train: {name} multiplied in {trained.precision}, the faster precision here")

    before = job.previous.after("frame", "train") if job.previous else {}
    return job.do("train", work, reads=READS, after={"frame": framed, **before}, unit="samples")
