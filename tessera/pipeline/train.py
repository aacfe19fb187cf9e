"""Stage `train`: trains the ranker, and as a baseline a ranker that reads the ids alone.

Before it the stage `choose` chooses what the ranker reads of an item, by items that small trainings do not see, and the
stage `place` whether it has a position path. After
it the stage `correct` fits the correction of new items by the user's labelled items, if `correct = "neighbours"`.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from rich.text import Text

from features.content.kinds import load_encoder
from features.device import resolve
from features.durable import write_directory
from features.errors import DatasetError
from features.frame import Frame
from models.networks.kinds import source_of
from models.ranker.checkpoint import check_processes
from models.ranker.correct import CorrectionReport, fit_correction
from models.ranker.reads import LEAST_EVENTS, ItemReads, PathChoice, choose_path, choose_reads
from models.ranker.stored import load_ranker, save_ranker
from models.ranker.train import Checkpointing, new_ranker
from models.ranker.train import train as train_ranker
from models.sharded.launch import Launch, train_in_processes
from models.table.default_schema import default_schema, hashed_id_schema
from models.table.item_parts import parts_of, reading
from models.table.schema import Schema
from tessera.pipeline.artifact import read_frame, write_json
from tessera.pipeline.job import Finished, Job
from tessera.pipeline.retrieve import with_towers
from tessera.pipeline.stage import Advance

RANKER, HASHED_ID = "ranker", "hashed-id"
READS = ("seed", "reads", "placement", "table", "history_length", "training", "ranker")
_CHOSEN, _TRIALS, _PATH = "reads.json", "trials.json", "placement.json"
_CHECKPOINT = ".checkpoint"
CORRECTION, _REPORT = "correction", "report.json"


def choose(job: Job, framed: Finished) -> Finished | None:
    """Runs the stage after `frame`; None if the parts are given or those of a warm start, or items have an id alone."""
    if job.options.reads is not None or job.previous or job.dataset.items is None:
        return None

    def work(directory: Path, advance: Advance) -> None:
        frame, options = read_frame(framed.directory), job.options
        schema = default_schema(job.dataset, frame, options.shape, history_length=options.history_length)
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


def place(job: Job, framed: Finished, chosen: Finished | None) -> Finished | None:
    """Runs the stage after `choose`; None without a placement, for a warm start, and if the path always stays."""
    if job.dataset.events.placement is None or job.previous or job.options.placement == "always":
        return None

    def work(directory: Path, advance: Advance) -> None:
        frame = read_frame(framed.directory)
        found = choose_path(_schema(job, frame, chosen), frame, job.options.train_config(), progress=advance)
        write_json(directory / _PATH, asdict(found))
        fate = "stays" if found.kept else "is left out"
        job.console.print(Text(f"place: the position path {fate}: log loss at equal places {-found.gain:+.5f} with it"))
        job.console.print(Text(f"  standard error {found.error:.5f}, {found.rows:,} rows", "dim"))

    after = {"frame": framed, **({"choose": chosen} if chosen else {})}
    return job.do("place", work, reads=READS, after=after, unit="trainings")


def read_path(placed: Finished) -> PathChoice:
    """Returns the result of the stage `place`."""
    return msgspec.json.decode((placed.directory / _PATH).read_bytes(), type=PathChoice)


def _schema(job: Job, frame: Frame, chosen: Finished | None) -> Schema:
    """Returns the schema of the chosen parts of an item, with the placement."""
    options = job.options
    schema = default_schema(job.dataset, frame, options.shape, history_length=options.history_length)
    parts = read_choice(chosen).parts if chosen else options.reads
    return schema if parts is None else reading(schema, parts)


def train(
    job: Job,
    framed: Finished,
    chosen: Finished | None,
    placed: Finished | None = None,
    retrieved: Finished | None = None,
) -> Finished:
    """Runs the stage after `place` and `retrieve`. A warm start begins with the earlier ranker.

    Raises:
        TrainingError: The stage was stopped in another number of processes.
    """
    config = job.options.train_config()
    for name in (RANKER, HASHED_ID):
        check_processes(job.stages.partial("train") / f"{name}{_CHECKPOINT}", config.processes)

    def work(directory: Path, advance: Advance) -> None:
        frame = read_frame(framed.directory)
        options = job.options
        schema = default_schema(job.dataset, frame, options.shape, history_length=options.history_length)
        baseline, start = hashed_id_schema(schema), None
        if job.previous:
            schema, start = job.previous.ranker(schema, frame, config)
        else:
            schema = _schema(job, frame, chosen)
        if not schema.placement or (placed is not None and not read_path(placed).kept):
            schema, baseline = schema.served, baseline.served
        if retrieved is not None:
            schema, start = with_towers(retrieved, schema, start or new_ranker(schema, config), config)
        several = f", {config.processes} processes" if config.processes > 1 else ""
        device = "cpu" if several else config.device
        job.console.print(Text(f"train: on {resolve(device).label}{several}", "dim"))
        jobs = ((RANKER, schema, start), (HASHED_ID, baseline, None))
        for number, (name, shape, begin) in enumerate(jobs):
            model = directory / name
            if model.exists():
                continue

            def both(done: int, total: int, number: int = number) -> None:
                advance(done + number * total, 2 * total)

            halfway = Checkpointing(directory / f"{name}{_CHECKPOINT}")
            if several:
                launch = Launch(framed.directory, model, halfway)
                train_in_processes(shape, config, launch, progress=both, start=begin)
                continue
            trained = train_ranker(shape, frame, config, progress=both, checkpointing=halfway, start=begin)
            write_directory(model, partial(save_ranker, schema=shape, trained=trained))
            halfway.path.unlink(missing_ok=True)
            if config.precision == "auto":
                job.console.print(f"train: {name} multiplied in {trained.precision}, the faster precision here")

    before = job.previous.after("frame", "train") if job.previous else {}
    stages = (("choose", chosen), ("place", placed), ("retrieve", retrieved))
    choices = {name: one for name, one in stages if one is not None}
    after: dict[str, Finished | str] = {"frame": framed, **before, **choices}
    if source := source_of(config.network.kind):
        after["the ranker's file"] = source
    return job.do("train", work, reads=READS, after=after, unit="samples")


def check_correct(job: Job) -> None:
    """Checks before the first stage that the dataset and the choices leave something to correct by.

    Raises:
        DatasetError: They do not; names the choice and the remedy.
    """
    if job.options.correct == "off":
        return
    problem = ""
    if not job.dataset.has_content:
        problem = "the items have no content, so none is near another; name text in [items]"
    elif job.dataset.events.label.implicit:
        problem = "every event is positive, so labels say nothing; declare negatives in [events]"
    elif job.options.reads is not None and "id" not in job.options.reads:
        problem = 'the ranker reads no item id, so no item is new; add "id" to reads'
    elif not job.options.table.admission:
        problem = "every id reads rows at once, so no item is new; set table.admission to 1 at least"
    if problem:
        raise DatasetError(f'{job.dataset.source}: correct = "{job.options.correct}": {problem}, or set it to "off"')


def correct(job: Job, encoded: Finished | None, framed: Finished, trained: Finished) -> Finished | None:
    """Runs the stage after `train`; None if the run corrects nothing."""
    if job.options.correct == "off" or encoded is None:
        return None

    def work(directory: Path, advance: Advance) -> None:
        config = job.options.train_config()
        schema, _ = load_ranker(trained.directory / RANKER, config, trains=False)
        # A warm start reads what the earlier run chose.
        if "id" not in parts_of(schema) or not schema.admission:
            raise DatasetError(
                "correct: the warm start's ranker knows no new items; train without it, or set it to off"
            )
        correction, report = fit_correction(
            schema,
            read_frame(framed.directory),
            config,
            space=load_encoder(encoded.directory / "encoder").id,
            lag=job.dataset.events.lag,
            progress=advance,
        )
        _say_correction(job, report)
        write_json(directory / _REPORT, asdict(report))
        if report.weight:
            (directory / CORRECTION).mkdir(exist_ok=True)
            correction.save(directory / CORRECTION)

    return job.do("correct", work, reads=("correct", *READS), after={"train": trained}, unit="samples")


def correction_directory(finished: Finished | None) -> Path | None:
    """Returns the directory of the correction, None if there is none or it does not pay."""
    directory = None if finished is None else finished.directory / CORRECTION
    return directory if directory is not None and directory.is_dir() else None


def read_report(finished: Finished) -> dict[str, Any]:
    """Returns what the correction gives on held-out items."""
    report: dict[str, Any] = msgspec.json.decode((finished.directory / _REPORT).read_bytes())
    return report


def _say_correction(job: Job, report: CorrectionReport) -> None:
    kept = "" if report.weight else "; left out, since it does not pay"
    job.console.print(
        Text(
            f"correct: {report.events:,} events of held-out items: AUC {report.auc:+.4f}, log loss "
            f"{report.log_loss:+.4f}; permuted {report.permuted_auc:+.4f}, {report.permuted_log_loss:+.4f}{kept}"
        )
    )
