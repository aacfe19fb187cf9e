"""Shared state of the stages of one run: the dataset and its tables, the choices, and the finished stages."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from features.dataset.descriptor import CHOICES, Dataset
from features.dataset.input_files import InputFiles
from features.dataset.tables import DatasetTables
from features.errors import DatasetError
from features.jobs.engine import Engine
from features.storage.location import Remote, refuse_address
from tessera.pipeline.made_of import MadeOf, differences, key_of
from tessera.pipeline.options import RunOptions, for_dataset
from tessera.pipeline.stage import Advance, Stages
from tessera.pipeline.warm_start import Previous

Engines = Callable[[str, str | None, tuple[str, ...]], Engine]
"""Makes an engine of a runner, an endpoint and further options."""


@dataclass(frozen=True)
class Finished:
    """Directory and key of a finished stage."""

    directory: Path
    key: str


class Job:
    """State of one run that its stages share.

    Args:
        dataset: Dataset to learn from.
        out: Holds one directory per stage.
        options: Choices of the run.
        console: Prints progress bars and warnings.
        code: Version of the code, a part of every stage's key.
        engines: Makes the engine of the batch jobs.
        copies: Folder at an object store for copies of the stages, or None.
        by_key: True keeps one directory for each key of a stage.

    Attributes:
        tables: The dataset's tables, read once.
        split: The dataset's split with the run's seed.
        previous: Run of the warm start, or None.
        read: Choices that the stages so far read, by dotted name.
    """

    def __init__(
        self,
        dataset: Dataset,
        out: Path,
        options: RunOptions,
        console: Console,
        code: str,
        engines: Engines = Engine,
        copies: Remote | None = None,
        *,
        by_key: bool = False,
    ) -> None:
        for directory in filter(None, (out, options.warm_start)):
            refuse_address(
                directory,
                "the library's runs and its warm starts are on this disk. `tessera run` takes addresses, and for "
                "workers that share no disk TESSERA_EXCHANGE is one",
            )
        self._engines = engines
        options = for_dataset(options, dataset)
        self.dataset, self.out, self.options, self.console, self.code = dataset, out, options, console, code
        if options.warm_start and options.warm_start.resolve() == out.resolve():
            raise DatasetError(f"--warm-start {out} is this run's own --out; give the new run another directory")
        self.previous = Previous(options.warm_start) if options.warm_start else None
        self.stages = Stages(out, console, copies, by_key=by_key)
        self.split = dataset.split.model_copy(update={"seed": dataset.split.seed + options.seed})
        self.tables = DatasetTables(dataset)
        self.read: dict[str, Any] = {}
        self._inputs = InputFiles(dataset)
        self._choices = options.choices()

    @property
    def engine(self) -> Engine:
        """Engine of the batch jobs."""
        return self._engines(self.options.runner, self.options.endpoint, self.options.runner_options)

    @property
    def data_key(self) -> str:
        """Hash of the descriptor, its split, aggregates, policies and choices excluded, and of every file's bytes."""
        excluded = {"source", "split", "aggregates", "policies", *CHOICES}
        described = self.dataset.model_dump(mode="json", exclude=excluded)
        return key_of(described, self._inputs.hashes)

    def do(
        self,
        stage: str,
        work: Callable[[Path, Advance], None],
        *,
        reads: Sequence[str] = (),
        descriptor: Mapping[str, Any] | None = None,
        tables: Sequence[str] = (),
        after: Mapping[str, Finished | str] | None = None,
        unit: str = "",
    ) -> Finished:
        """Runs one stage unless it is finished.

        Args:
            stage: Name of the stage.
            work: Fills its directory, see `Stages.run`.
            reads: Choices that decide the output: a name, or a table of names as `table`.
            descriptor: Parts of the descriptor that decide the output.
            tables: Tables whose files the work reads.
            after: Earlier stages that the work reads, or their keys, by name.
            unit: Unit of the work's progress, such as `samples`.
        """
        own = {name: value for name, value in self._choices.items() if _is_of(name, reads)}
        self.read |= own
        made_of = MadeOf(
            code=self.code,
            options=own,
            descriptor=dict(descriptor or {}),
            files={name: sha256 for table in tables for name, sha256 in self._inputs.by_table.get(table, {}).items()},
            after={name: one if isinstance(one, str) else one.key for name, one in (after or {}).items()},
        )
        key = made_of.key(stage)
        inputs = self._inputs if tables else None
        return Finished(self.stages.run(stage, key, work, unit=unit, inputs=inputs, made_of=made_of), key)

    def warn(self, line: str) -> None:
        """Prints a warning."""
        self.console.print(Text(line, "yellow"))

    def say_differences(self) -> None:
        """Prints the choices that differ from those of the warm start."""
        if self.previous is None:
            return
        before = self.previous.choices
        phrases = differences(before, {name: self._choices[name] for name in before if name in self._choices})
        if phrases:
            self.console.print(Text(f"warm start: other choices than {self.options.warm_start}: {'; '.join(phrases)}"))


def _is_of(name: str, reads: Sequence[str]) -> bool:
    return any(name == choice or name.startswith(f"{choice}.") for choice in reads)
