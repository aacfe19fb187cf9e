"""Stage `train`: trains the ranker, and as a baseline a ranker that reads the ids alone.

Before it the stage `choose` chooses what the ranker reads of an item, by items that small trainings do not see.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path

import msgspec
from rich.text import Text

from features.device import resolve
from features.durable import write_directory
from models.ranker.reads import LEAST_EVENTS, ItemReads, choose_reads
from models.ranker.stored import save_ranker
from models.ranker.train import Checkpointing
from models.ranker.train import train as train_ranker
from models.table.default_schema import default_schema, hashed_id_schema
from models.table.item_parts import reading
from tessera.pipeline.artifact import read_frame, write_json
from tessera.pipeline.job import Finished, Job
from tessera.pipeline.stage import Advance

RANKER, HASHED_ID = "ranker", "hashed-id"
READS = ("seed", "reads", "table", "history_length", "training", "ranker")
_CHOSEN, _TRIALS = "reads.json", "trials.json"


def choose(job: Job, framed: Finished) -> Finished | None:
    """Runs the stage after `frame`; None if the parts are given or those of a warm start, or items have an id alone."""
    if job.options.reads is not None or job.previous or job.dataset.items is None:
        return None

    def work(directory: Path, advance: Advance) -> None:
        frame, options = read_frame(framed.directory), job.options
        schema = default_schema(job.dataset, frame, options.table, history_length=options.history_length)
        chosen = choose_reads(schema, frame, options.train_config(), kept=directory / _TRIALS, progress=advance)
        write_json(directory / _CHOSEN, asdict(chosen))
        _say(job, chosen)

    return job.do("choose", work, reads=READS, after={"frame": framed}, unit="trainings")


def read_choice(chosen: Finished) -> ItemReads:
    """Returns the result of the stage."""
    return msgspec.json.decode((chosen.directory / _CHOSEN).read_bytes(), type=ItemReads)


def _say(job: Job, chosen: ItemReads) -> None:
    named = f"choose: the ranker reads of an item: {', '.join(chosen.parts) or 'nothing'}"
    if chosen.trials:
        job.console.print(Text(named))
        for line in chosen.lines():
            job.console.print(Text(f"  AUC {line}", "dim"))
    elif len(chosen.parts) > 1:
        why = f"{chosen.events:,} events of held-out items decide nothing, {LEAST_EVENTS:,} are needed"
        job.console.print(Text(f"{named}, all there is: {why}"))


def train(job: Job, framed: Finished, chosen: Finished | None) -> Finished:
    """Runs the stage after `choose`. A warm start begins with the earlier ranker."""
    config = job.options.train_config()

    def work(directory: Path, advance: Advance) -> None:
        frame = read_frame(framed.directory)
        options = job.options
        schema = default_schema(job.dataset, frame, options.table, history_length=options.history_length)
        baseline = hashed_id_schema(schema)
        start = None
        if job.previous:
            schema, start = job.previous.ranker(schema, frame, config)
        else:
            parts = read_choice(chosen).parts if chosen else options.reads
            schema = schema if parts is None else reading(schema, parts)
        job.console.print(Text(f"train: on {resolve(config.device).label}", "dim"))
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
    after: dict[str, Finished | str] = {"frame": framed, **before, **({"choose": chosen} if chosen else {})}
    return job.do("train", work, reads=READS, after=after, unit="samples")
