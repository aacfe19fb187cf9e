"""`tessera sweep`: searches the choices of a run, judged on the validation part."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from features.errors import TesseraError
from tessera.cli.run import SetOption, SplitOption
from tessera.terminal import DatasetArgument, JsonOption, err_console, load_with_split, out_console, print_json

if TYPE_CHECKING:
    from tessera.sweep.study import TrialReport
    from tessera.sweep.sweep import SweepResult

_INTERRUPTED = 130


def sweep(
    dataset: DatasetArgument,
    trials: Annotated[
        int, typer.Option(min=1, help="Trials in all, the default and those of earlier calls included.")
    ] = 20,
    out: Annotated[Path, typer.Option("--out", help="Directory of the sweep; a later call continues there.")] = Path(
        "out/sweep"
    ),
    over: Annotated[
        list[str] | None,
        typer.Option(
            "--over",
            metavar="NAME=VALUES|LOW..HIGH",
            help="Values to try for a choice, e.g. table.dim=8,16 or training.table_rate=0.03..0.3; repeatable.",
        ),
    ] = None,
    set_: SetOption = None,
    bytes_: Annotated[
        str | None, typer.Option("--bytes", metavar="SIZE", help="Largest size of a trial's table, 2MB for example.")
    ] = None,
    latency: Annotated[
        float | None,
        typer.Option(metavar="RATIO", help="Largest time to score one request, as a ratio to the default's."),
    ] = None,
    split: SplitOption = None,
    json: JsonOption = False,
) -> None:
    """Search the choices of a run by validation log loss; a later call goes on, and never sees the test part."""
    from tessera.settings import Settings
    from tessera.sweep.space import Base
    from tessera.sweep.sweep import SweepPlan, require_trials
    from tessera.sweep.sweep import sweep as search

    plan = SweepPlan(trials, _bounds(bytes_, latency), tuple(over or ()))
    base = Base(load_with_split(dataset, split), tuple(set_ or ()))
    settings = Settings.from_environment()
    result = search(
        base,
        out,
        plan,
        console=err_console,
        registry=settings.registry_on_use(),
        engines=settings.engine,
        told=_tell,
    )
    if json:
        print_json(result.to_json())
    else:
        _print(result)
    if result.stopped:
        err_console.print(Text("stopped  the same command goes on with the trial that was running", "yellow"))
        raise typer.Exit(_INTERRUPTED)
    require_trials(result)


def _bounds(size: str | None, latency: float | None) -> Any:
    from tessera.pipeline.options import parse_bytes
    from tessera.sweep.trial import Bounds

    if latency is not None and not latency > 0:
        raise TesseraError(f"--latency {latency}: expected a ratio above 0, 1.5 for example")
    try:
        return Bounds(None if size is None else parse_bytes(size), latency)
    except ValueError as error:
        raise TesseraError(f"--bytes {size}: {error}") from error


def _tell(report: "TrialReport", wanted: int) -> None:
    """Prints a trial that has ended, on standard error."""
    style = {"finished": "", "pruned": "dim"}.get(report.state, "yellow")
    loss = "" if report.log_loss is None else f"  log loss {report.log_loss:.5f}"
    values = " ".join(f"{name}={text}" for name, text in report.choices.items()) or "the default"
    why = f": {report.why}" if report.why else ""
    err_console.print(
        Text(f"trial {report.number} ({report.number + 1}/{wanted})  {report.state}{why}{loss}  {values}", style),
        soft_wrap=True,
    )


def _print(result: "SweepResult") -> None:
    table = Table(title="Trials, the best first", title_justify="left")
    for name in ("trial", "state", "log loss", "bytes", "latency", "seconds"):
        table.add_column(name, justify="left" if name == "state" else "right")
    for one in sorted(result.trials, key=lambda one: (one.state != "finished", one.log_loss or 0.0, one.number)):
        loss = "–" if one.log_loss is None else f"{one.log_loss:.5f}"
        size = "–" if one.bytes is None else f"{one.bytes:,}"
        ratio = "–" if one.latency is None else f"{one.latency:.2f}x"
        number = f"{one.number}" + (" (default)" if one.number == 0 else "")
        best = result.best is not None and one.number == result.best.number
        table.add_row(number, one.state, loss, size, ratio, f"{one.seconds:.1f}", style="bold" if best else None)
    err_console.print(table)
    if result.table:
        err_console.print(f"best     {result.directory / 'best.toml'}", soft_wrap=True, highlight=False)
        # The table alone is on standard output: it is there to be pasted.
        out_console.print(Text(result.table.rstrip()), soft_wrap=True)
