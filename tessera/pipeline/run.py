"""The offline job: encode → assign → frame → train → evaluate → publish, stage by stage."""

import resource
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from features.dataset.descriptor import Dataset
from features.jobs.engine import Engine
from features.storage.location import Remote
from models.bundle.bundle import Bundle
from models.registry.gate import Verdict
from models.registry.registry import Registry
from models.registry.release import Release
from models.table.engine import engine
from tessera.code_version import code_version
from tessera.pipeline.assign import assign
from tessera.pipeline.encode import encode, meaning
from tessera.pipeline.evaluate import Reported, evaluate, read_metrics
from tessera.pipeline.frame import frame
from tessera.pipeline.job import Engines, Job
from tessera.pipeline.options import RunOptions, load_options
from tessera.pipeline.publish import Ready, bundle, register
from tessera.pipeline.retrieve import check_retrieval, retrieve
from tessera.pipeline.train import check_correct, choose, correct, place, train

__all__ = ["STAGES", "RunOptions", "RunResult", "run"]
STAGES = ("encode", "assign", "frame", "train", "evaluate", "publish")


@dataclass(frozen=True)
class RunResult:
    """Result of a run.

    Attributes:
        directory: Directory of the stages.
        bundle: Bundle of the run; None before `publish`.
        release: Release of the bundle; None if it was not registered.
        metrics: Metrics of the stage `evaluate`; empty before it.
        executed: Seconds of each stage that ran.
        verdict: Verdict of the gates; None if there was no champion to compare with.
        engine: Engine of the tables that this process trains; empty if no stage trains.
        again: Reasons why a finished stage ran again, by stage.
    """

    directory: Path
    bundle: Bundle | None
    release: Release | None
    metrics: dict[str, Any]
    executed: dict[str, float]
    verdict: Verdict | None = None
    engine: str = ""
    again: dict[str, list[str]] = field(default_factory=dict)


def run(
    dataset: Dataset,
    out: Path,
    options: RunOptions | None = None,
    *,
    console: Console,
    registry: Registry | None,
    until: str,
    engines: Engines = Engine,
    copies: Remote | None = None,
) -> RunResult:
    """Runs the stages up to and including `until`; finished stages are kept.

    Args:
        dataset: Dataset to learn from.
        out: Directory that gets one directory per stage.
        options: Choices; None for those of the descriptor's `[run]` table.
        console: Prints progress bars, choices that differ from a warm start, and the reasons for a repeated stage.
        registry: Receives the bundle; None leaves the bundle in `out` alone.
        until: One of `STAGES`.
        engines: Makes the engine of the batch jobs; `Settings.engine` knows the addresses of the environment.
        copies: Folder at an object store that gets a copy of each finished stage. A stage that `out` lacks and that has
            a copy with the same key is fetched instead of done.

    Raises:
        TesseraError: Another run uses `out`, or a stage cannot run.
    """
    chosen = load_options(dataset) if options is None else options
    job = Job(dataset, out, chosen, console, code_version(__name__), engines, copies)
    with job.stages.held():
        return _stages(job, registry, STAGES[: STAGES.index(until) + 1])


def _stages(job: Job, registry: Registry | None, wanted: tuple[str, ...]) -> RunResult:
    check_correct(job)
    check_retrieval(job)
    job.say_differences()
    metrics: dict[str, Any] = {}
    made = release = judged = None
    encoded = encode(job)
    assigned = assign(job, encoded) if encoded and "assign" in wanted else None
    if "frame" in wanted:
        framed = frame(job, assigned)
    if "train" in wanted:
        chosen = choose(job, framed)
        placed = place(job, framed, chosen)
        retrieved = retrieve(job, framed)
        trained = train(job, framed, chosen, placed, retrieved)
        correction = correct(job, encoded, framed, trained)
    if "evaluate" in wanted:
        evaluated = evaluate(job, framed, trained, Reported(assigned, chosen, placed, correction, retrieved))
        metrics = read_metrics(evaluated)
    if "publish" in wanted:
        meant = meaning(job, encoded, framed)
        made = bundle(job, Ready(encoded, assigned, framed, trained, evaluated, meant, correction, retrieved))
        if registry is not None:
            release, judged = register(job, made, framed, registry)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    job.console.print(Text(f"peak memory of this process and its largest child: {peak / 1e6:.2f} GB", "dim"))
    used = engine() if "train" in wanted else ""
    return RunResult(job.out, made, release, metrics, job.stages.executed, judged, used, job.stages.again)
