"""Makes one trial: the frame without its test part, the bounds, and a training that may be pruned after each epoch."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from msgspec import structs
from rich.console import Console

from features.errors import TesseraError, TrainingError
from features.frame import Frame
from models.ranker.reads import choose_path, choose_reads
from models.ranker.train import TRAIN, VALIDATION, Checkpointing, Watch, train
from models.table.default_schema import default_schema
from models.table.item_parts import reading
from models.table.schema import Schema
from tessera.pipeline.artifact import read_frame
from tessera.pipeline.assign import assign
from tessera.pipeline.encode import encode
from tessera.pipeline.frame import frame as framed
from tessera.pipeline.job import Engines, Finished, Job
from tessera.pipeline.options import RunOptions
from tessera.pipeline.stage import stage_bar
from tessera.sweep.request import Request, time_ratio
from tessera.sweep.space import Base, with_reads
from tessera.sweep.study import Drawn, TrialReport

STAGES, CHECKPOINTS, _READS = "stages", "trials", "reads.json"
# Tables of choices that no stage up to `frame` reads.
_AFTER_FRAME = ("table", "training", "ranker", "reads")


@dataclass(frozen=True)
class Bounds:
    """Bounds of a trial; None bounds nothing.

    Attributes:
        bytes: Largest bytes of the table's weights.
        latency: Largest ratio of the time to score one request to the default's.
    """

    bytes: int | None = None
    latency: float | None = None


class PrunedError(Exception):
    """Ends the training of a trial that is pruned. Carries the validation losses of its epochs."""

    def __init__(self, epochs: tuple[float, ...]) -> None:
        super().__init__(f"pruned after epoch {len(epochs)}")
        self.epochs = epochs


@dataclass(frozen=True)
class Prepared:
    """Inputs of one training: choices, schema, and a frame without the test part."""

    options: RunOptions
    schema: Schema
    frame: Frame

    @property
    def bytes(self) -> int:
        """Bytes of the table's weights."""
        return self.schema.rows * self.schema.dim * 4


def without_test(frame: Frame) -> Frame:
    """Returns a frame that has no test part: a read of it is a KeyError."""
    return frame.replace(examples={name: frame.blocks(name) for name in (TRAIN, VALIDATION)})


class TrialMaker:
    """Makes the trials of a sweep.

    Stages up to `frame` run once for each set of choices that they read, and are kept by their keys. The parts of an
    item and the position path are chosen once, by the default.

    Args:
        base: Starting point of the sweep.
        out: Directory of the sweep.
        bounds: Bounds of the trials.
        console: Prints bars.
        code: Version of the code, a part of every stage's key.
        engines: Makes the engine of the batch jobs.
    """

    def __init__(self, base: Base, out: Path, bounds: Bounds, *, console: Console, code: str, engines: Engines) -> None:
        self._base, self._out, self._bounds = base, out, bounds
        self._console, self._code, self._engines = console, code, engines
        self._framed: dict[tuple[tuple[str, str], ...], Finished] = {}

    @property
    def data_key(self) -> str:
        """Key of the default's frame: hash of the data, the choices before training, and the code."""
        return self._finished({}).key

    @cached_property
    def default(self) -> Prepared:
        """Inputs of the default's training."""
        return self._prepared({})

    @cached_property
    def parts(self) -> tuple[str, ...] | None:
        """Parts of an item that trials read, chosen by the default; None if `reads` names them, or without items."""
        options = self._base.options
        if options.reads is not None or self._base.dataset.items is None:
            return None
        frame = without_test(read_frame(self._finished({}).directory))
        schema = default_schema(self._base.dataset, frame, options.shape, history_length=options.history_length)
        with stage_bar(self._console, "choose", "trainings") as advance:
            chosen = choose_reads(schema, frame, options.train_config(), kept=self._out / _READS, progress=advance)
        return chosen.parts

    @cached_property
    def _keeps_path(self) -> bool:
        """True if the trials have the position path, which the default decides."""
        options = self._base.options
        if self._base.dataset.events.placement is None or options.placement == "always":
            return True
        frame = without_test(read_frame(self._finished({}).directory))
        with stage_bar(self._console, "place", "trainings") as advance:
            return choose_path(self._shaped(options, frame), frame, options.train_config(), progress=advance).kept

    @cached_property
    def _request(self) -> Request:
        one = self.default
        return Request(one.schema.served, one.frame, one.options.train_config())

    def _finished(self, choices: Mapping[str, str]) -> Finished:
        """Returns the stage `frame` of the choices that it and the stages before it read."""
        own = {name: text for name, text in choices.items() if name.partition(".")[0] not in _AFTER_FRAME}
        key = tuple(sorted(own.items()))
        if key not in self._framed:
            options = self._base.options_with(own)
            job = Job(
                self._base.dataset,
                self._out / STAGES,
                options,
                self._console,
                self._code,
                self._engines,
                by_key=True,
            )
            encoded = encode(job)
            self._framed[key] = framed(job, assign(job, encoded) if encoded else None)
        return self._framed[key]

    def _prepared(self, choices: Mapping[str, str]) -> Prepared:
        options = with_reads(self._base.options_with(choices), self.parts)
        frame = without_test(read_frame(self._finished(choices).directory))
        schema = self._shaped(options, frame)
        return Prepared(options, schema if self._keeps_path else schema.served, frame)

    def _shaped(self, options: RunOptions, frame: Frame) -> Schema:
        options = with_reads(options, self.parts)
        schema = default_schema(self._base.dataset, frame, options.shape, history_length=options.history_length)
        return schema if options.reads is None else reading(schema, options.reads)

    def make(self, drawn: Drawn, title: str) -> TrialReport:
        """Returns the result of a trial. A trial that a killed process began goes on from its checkpoint."""
        report = TrialReport(drawn.number, "infeasible", drawn.choices)
        try:
            one = self.default if not drawn.choices else self._prepared(drawn.choices)
        except TesseraError as error:
            # Each value is valid by itself: a budget may be too small for the features of the others.
            return structs.replace(report, why=str(error))
        report = structs.replace(report, bytes=one.bytes)
        most = self._bounds.bytes
        if most is not None and one.bytes > most:
            return structs.replace(report, why=f"the table has {one.bytes:,} bytes, --bytes allows {most:,}")
        if one.frame.items.height:
            ratio = self._latency(one)
            report = structs.replace(report, latency=ratio)
            limit = self._bounds.latency
            if limit is not None and ratio > limit:
                return structs.replace(
                    report, why=f"a request takes {ratio:.2f}x the default's time, --latency allows {limit:g}x"
                )
        return self._trained(one, drawn, report, title)

    def _latency(self, one: Prepared) -> float:
        if one is self.default:
            return 1.0
        return time_ratio(Request(one.schema.served, one.frame, one.options.train_config()), self._request)

    def _trained(self, one: Prepared, drawn: Drawn, report: TrialReport, title: str) -> TrialReport:
        def follow(epochs: tuple[float, ...]) -> None:
            if drawn.is_pruned(epochs):
                raise PrunedError(epochs)

        began = time.monotonic()
        try:
            with stage_bar(self._console, title, "samples") as advance:
                trained = train(
                    one.schema,
                    one.frame,
                    one.options.train_config(),
                    progress=advance,
                    checkpointing=Checkpointing(self.checkpoint(drawn)),
                    watch=Watch(epoch=follow),
                )
        except PrunedError as pruned:
            why = f"after epoch {len(pruned.epochs)} worse than the median of the trials"
            report = structs.replace(report, state="pruned", why=why, epochs=pruned.epochs)
        except TrainingError as error:
            report = structs.replace(report, state="failed", why=str(error))
        else:
            report = structs.replace(report, state="finished", epochs=trained.epochs)
        best = min(report.epochs, default=None)
        return structs.replace(report, log_loss=best, seconds=time.monotonic() - began)

    def checkpoint(self, drawn: Drawn) -> Path:
        """Returns the file from which a killed trial goes on."""
        directory = self._out / CHECKPOINTS
        directory.mkdir(parents=True, exist_ok=True)
        return directory / f"{drawn.number:05d}"
