"""`tessera run`, `features`, `train` and `publish`: one job, up to another stage.

Choices about the model stand in the descriptor's `[run]` table; `--set` overrides one of them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from features.errors import DatasetError, TesseraError
from tessera.terminal import (
    DatasetArgument,
    JsonOption,
    err_console,
    load_with_split,
    out_console,
    print_json,
)

if TYPE_CHECKING:
    from tessera.settings import Settings

# Stages that a warm start reads.
_EARLIER = ("encode", "assign", "frame", "train", "publish")

StagesOption = Annotated[
    str, typer.Option("--out", help="One directory per stage; a later run continues there. A path or an address.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Override a choice of the descriptor's run table, e.g. table.budget=2MB or quantizer=residual-kmeans; "
        "repeatable.",
    ),
]
SplitOption = Annotated[
    str | None, typer.Option("--split", help="Instead of the descriptor's: time, random, leave-one-out or order.")
]
WarmStartOption = Annotated[
    str | None,
    typer.Option(
        "--warm-start",
        help="The --out of an earlier run, a path or an address: keep its encoder, its codes' names and its rows. "
        "A map in it, OUT/maps/NAME: keep the names and rows under the map's encoder.",
    ),
]
PositionsOption = Annotated[
    Path | None,
    typer.Option(
        "--positions", help="Positions of the topics when the files were made, from `tessera topics positions`."
    ),
]
UntilOption = Annotated[
    str, typer.Option("--until", help="Last stage to do: encode, assign, frame, train, evaluate or publish.")
]
RunnerOption = Annotated[
    str | None,
    typer.Option("--runner", help="Engine of the batch jobs: direct, dask, prism, flink, spark or portable."),
]
EndpointOption = Annotated[
    str | None, typer.Option("--endpoint", metavar="HOST:PORT", help="Address of that engine's cluster.")
]
ProcessesOption = Annotated[
    int | None,
    typer.Option(
        "--processes", metavar="N", min=1, help="Train in N processes that divide the table: training.processes."
    ),
]

# How `publish` ends: 0 a challenger, 1 refused, 3 registered without an alias, since the test set cannot tell.
_STATUS = {"passed": 0, "worse": 1, "cannot tell": 3}
REPLACED = {
    "--seed": "seed=NUMBER",
    "--encoder": "encoder=KIND",
    "--encoder-model": "encoder_model=DIRECTORY_OR_HUB_ID",
    "--runner-option": "runner_options=OPTION,OPTION",
    "--quantizer": "quantizer=KIND",
    "--quantizer-option": "quantizer_options.NAME=VALUE",
    "--codes": "codes=NUMBER",
    "--levels": "levels=NUMBER",
    "--tokens": "tokens=SCHEME",
    "--pieces": "pieces=NUMBER",
    "--dim": "table.dim=NUMBER",
    "--budget": "table.budget=BYTES",
    "--chunks": "table.chunks.FEATURE=NUMBER",
    "--exact": "table.exact=FEATURE,FEATURE",
    "--admission": "table.admission=NUMBER",
    "--history": "table.history=POOLING",
    "--content": "table.content=true",
    "--no-content": "table.content=false",
    "--precision": "training.precision=PRECISION",
    "--gate": "gates.NAME=NUMBER",
}
"""Options that the commands had before there was a `[run]` table, and what is given to `--set` instead."""


class RunCommand(TyperCommand):
    """Command that names the replacement of an option that it once had."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses the arguments.

        Raises:
            typer.BadParameter: An option was replaced.
        """
        for name in (word.partition("=")[0] for word in args):
            if name in REPLACED:
                message = f"{name} is now --set {REPLACED[name]}, or the same in the descriptor's [run] table"
                raise typer.BadParameter(message, ctx=ctx)
        return super().parse_args(ctx, args)


def read_positions(path: Path | None) -> tuple[Any, ...]:
    """Reads what `tessera topics positions` printed; nothing without a path."""
    import msgspec

    from models.bundle.bundle import LogPosition

    if path is None:
        return ()
    try:
        return tuple(msgspec.json.decode(path.read_bytes(), type=list[LogPosition]))
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TesseraError(f"{path}: expected what `tessera topics positions` prints ({error})") from error


def earlier_run(settings: "Settings", warm_start: str | None, out: str) -> Path | None:
    """Returns the directory of the run of a warm start, whose stages are fetched if they are at an address.

    Args:
        settings: Names the directory of the copies.
        warm_start: Path or address of the earlier run, or None.
        out: Path or address of the new run.

    Raises:
        DatasetError: The address has no run, or is that of the new run.
        StorageError: The store does not answer.
    """
    if warm_start is None:
        return None
    directory, address = settings.stages_of(warm_start)
    if address is None:
        return directory
    from tessera.pipeline.stage import fetch_stages

    if address == settings.stages_of(out)[1]:
        raise DatasetError(f"--warm-start {address} is this run's own --out; give the new run another address")
    # A run of this machine at the same address has stages of its own, which a fetch must not replace.
    return fetch_stages(address, directory.with_name(f"{directory.name}-earlier"), _EARLIER)


def run(
    dataset: DatasetArgument,
    out: StagesOption = "out",
    set_: SetOption = None,
    runner: RunnerOption = None,
    endpoint: EndpointOption = None,
    processes: ProcessesOption = None,
    split: SplitOption = None,
    warm_start: WarmStartOption = None,
    positions: PositionsOption = None,
    until: UntilOption = "publish",
    json: JsonOption = False,
) -> None:
    """Do the offline job: features, Semantic IDs, training, evaluation, bundle."""
    from dataclasses import replace

    from tessera.pipeline.options import load_options
    from tessera.pipeline.run import STAGES
    from tessera.pipeline.run import run as run_stages
    from tessera.settings import Settings

    if until not in STAGES:
        raise TesseraError(f"--until {until}: expected one of {', '.join(STAGES)}")
    loaded = load_with_split(dataset, split)
    given = {"runner": runner, "endpoint": endpoint, "training.processes": processes}
    chosen = load_options(loaded, [*(set_ or ()), *(f"{name}={value}" for name, value in given.items() if value)])
    settings = Settings.from_environment()
    options = replace(chosen, warm_start=earlier_run(settings, warm_start, out), positions=read_positions(positions))
    registry = settings.registry_on_use() if until == "publish" else None
    directory, copies = settings.stages_of(out)
    result = run_stages(
        loaded,
        directory,
        options,
        console=err_console,
        registry=registry,
        until=until,
        engines=settings.engine,
        copies=copies,
    )
    if json:
        import msgspec

        release = msgspec.to_builtins(result.release) if result.release else None
        bundle = result.bundle.id if result.bundle else None
        gates = result.verdict.to_json() if result.verdict else None
        document = {"bundle": bundle, "release": release, "executed": result.executed, "again": result.again}
        print_json(document | {"metrics": result.metrics, "gates": gates, "engine": result.engine})
    else:
        print_result(result)
        if copies is not None:
            out_console.print(f"stages   {copies}", soft_wrap=True, highlight=False)
    status_of(result)


def status_of(result: Any) -> None:
    """Ends the command with the status of the gates, unless they passed.

    Raises:
        typer.Exit: The gates refused the bundle, or cannot tell.
    """
    if result.verdict and not result.verdict.passed:
        raise typer.Exit(_STATUS[result.verdict.answer])


def run_until(last: str, help_text: str) -> Callable[..., None]:
    """Returns the command that does the stages up to and including `last`."""

    def command(
        dataset: DatasetArgument,
        out: StagesOption = "out",
        set_: SetOption = None,
        runner: RunnerOption = None,
        endpoint: EndpointOption = None,
        processes: ProcessesOption = None,
        split: SplitOption = None,
        warm_start: WarmStartOption = None,
        positions: PositionsOption = None,
        json: JsonOption = False,
    ) -> None:
        run(dataset, out, set_, runner, endpoint, processes, split, warm_start, positions, last, json)

    command.__doc__ = help_text
    return command


def print_result(result: Any) -> None:
    """Prints quality, bundle, release and verdict of a run."""
    from tessera.pipeline.compare import render

    if result.metrics:
        out_console.print(quality_table(result.metrics))
    if result.engine == "plain":
        out_console.print(Text("engine   plain: TorchRec is not installed; training is many times slower", "yellow"))
    if result.bundle:
        out_console.print(f"bundle   {result.bundle.id}  ({result.bundle.directory})")
    if result.release:
        aliases = ", ".join(result.release.aliases) or "no alias"
        out_console.print(f"release  {result.release.model} version {result.release.version} ({aliases})")
    if result.verdict:
        out_console.print(render(result.verdict))
        if result.verdict.answer == "cannot tell":
            message = (
                ": too few test rows that neither bundle was trained on to exclude a drop of AUC beyond gates.sure; "
                "give more rows, widen that gate, or try it with `tessera rollout start --challenger "
                f"{result.release.version}`"
            )
            out_console.print(Text.assemble(("cannot tell", "yellow"), message))
        if result.verdict.answer == "worse":
            worse = ", ".join(check.name for check in result.verdict.checks if not check.passed)
            message = f" as a challenger: worse beyond the thresholds in {worse}; see [run.gates]"
            out_console.print(Text.assemble(("refused", "red"), message))


def quality_table(metrics: dict[str, Any]) -> Table:
    """Returns the test quality of the ranker beside its baselines, on all examples and by item and user.

    Of several tasks, these rows are the judged task's, and a row for each task follows.
    """
    from models.ranker.evaluate import PARTS

    table = Table(title=f"Test quality, split by {metrics['split']}, seed {metrics['seed']}", title_justify="left")
    for name in ("part", "model", "rows", "AUC", "log loss", "NE"):
        table.add_column(name, justify="left" if name in ("part", "model") else "right")
    for part, label in PARTS.items():
        for model, parts in metrics["quality"].items():
            values = [parts[part][name] for name in ("auc", "log_loss", "normalized_entropy")]
            cells = ["–" if value is None else f"{value:.4f}" for value in values]
            rows = f"{parts[part]['rows']:,}"
            table.add_row(label, model, rows, *cells, style="bold" if model == "ranker" else None)
    for task, parts in metrics.get("tasks", {}).items():
        values = [parts["all"][name] for name in ("auc", "log_loss", "normalized_entropy")]
        cells = ["–" if value is None else f"{value:.4f}" for value in values]
        table.add_row(f"task {task}", "ranker", f"{parts['all']['rows']:,}", *cells)
    return table
