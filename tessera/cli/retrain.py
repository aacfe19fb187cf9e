"""`tessera retrain`: the offline job on the newest data, for a timer to call."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tessera.cli.run import PositionsOption, SetOption, earlier_run, print_result, read_positions, status_of
from tessera.terminal import DatasetArgument, JsonOption, err_console, load_with_split, out_console, print_json

if TYPE_CHECKING:
    from tessera.retraining import Retrained


def retrain(
    dataset: DatasetArgument,
    runs: Annotated[Path, typer.Option("--out", help="Directory of runs, one for each state of the data.")] = Path(
        "runs"
    ),
    set_: SetOption = None,
    warm_start: Annotated[
        str | None,
        typer.Option("--warm-start", help="The --out of a run from which the first retraining begins."),
    ] = None,
    positions: PositionsOption = None,
    keep: Annotated[int, typer.Option(min=1, help="Runs that stay, beside those whose bundle has an alias.")] = 3,
    json: JsonOption = False,
) -> None:
    """Train on the newest data from the champion's run, and publish through the gates; do nothing if nothing is new."""
    from tessera.pipeline.options import load_options
    from tessera.retraining import retrain as train_again
    from tessera.settings import Settings

    loaded = load_with_split(dataset, None)
    settings = Settings.from_environment()
    earlier = earlier_run(settings, warm_start, str(runs))
    options = replace(load_options(loaded, set_ or ()), warm_start=earlier, positions=read_positions(positions))
    done = train_again(
        loaded,
        runs,
        options,
        console=err_console,
        registry=settings.open_registry(),
        keep=keep,
        engines=settings.engine,
    )
    if json:
        print_json(
            {name: value for name, value in _plain(done).items() if name != "result"} | {"new": bool(done.result)}
        )
    else:
        if done.result is not None:
            print_result(done.result)
        for line in _lines(done):
            out_console.print(line, markup=False)
    if done.result is not None:
        status_of(done.result)


def _plain(done: "Retrained") -> dict[str, object]:
    found = asdict(replace(done, result=None))
    del found["result"]
    return found | {
        "new": done.result is not None,
        "directory": str(done.directory),
        "warm_start": str(done.warm_start) if done.warm_start else None,
        "removed": [str(path) for path in done.removed],
    }


def _lines(done: "Retrained") -> list[str]:
    """Returns what was done, and what the next step is."""
    version = f"version {done.version} ({done.bundle})"
    if done.result is None:
        return [f"nothing  new: {version} is of these files and choices; change them, and call retrain again"]
    began = (
        f"from {done.warm_start}"
        if done.warm_start
        else "from new values: there is no earlier run; --warm-start names one"
    )
    next_step = {
        "": f"`tessera rollout list` shows whether {version} serves",
        "passed": "`tessera rollout start` tries the challenger beside the champion",
        "worse": "see the table above for what is worse; the champion goes on",
        "cannot tell": f"`tessera rollout start --challenger {done.version}` tries it, or wait for more data",
    }[done.answer]
    lines = [f"trained  on {done.events:,} events, {done.new_events:,} of them new, {began}", f"next     {next_step}"]
    return [*lines, *(f"removed  {path}" for path in done.removed)]
