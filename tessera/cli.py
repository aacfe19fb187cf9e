"""The command line: parses, wires, prints. Everything else is in the packages."""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from features.error import TesseraError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_show_locals=False, help="Feature embeddings for recommenders.")
out_console, err_console = Console(), Console(stderr=True)

DatasetArgument = Annotated[Path, typer.Argument(help="The dataset descriptor, a TOML file.")]
OutOption = Annotated[Path, typer.Option("--out", help="One directory per stage; a later run goes on from there.")]
SeedOption = Annotated[int, typer.Option(help="Decides everything random.")]
SplitOption = Annotated[
    str | None, typer.Option("--split", help="Instead of the descriptor's: time, random, leave-one-out or order.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the report as JSON on standard output.")]
EncoderOption = Annotated[str, typer.Option(help="lsa or sentence-transformers.")]
ModelOption = Annotated[str | None, typer.Option("--encoder-model", help="Local directory or hub id.")]
RunnerOption = Annotated[str, typer.Option(help="Beam runner: DirectRunner, DaskRunner, PrismRunner, FlinkRunner, …")]
RunnerOptionsOption = Annotated[
    list[str] | None, typer.Option("--runner-option", help="Passed to Beam, e.g. --direct_num_workers=2; repeatable.")
]
CodesOption = Annotated[int | None, typer.Option(help="Codes per level; by default what suits the catalogue's size.")]


def main() -> None:
    """Entry point: errors the user can mend are one line, exit status 2."""
    try:
        app(standalone_mode=True)
    except TesseraError as error:
        err_console.print(f"[red]error:[/red] {error}", highlight=False, markup=True, soft_wrap=True)
        sys.exit(2)


@app.callback()
def quiet(verbose: Annotated[bool, typer.Option("--verbose", help="Show the libraries' own log.")] = False) -> None:
    """Feature embeddings for recommenders."""
    if not verbose:
        warnings.simplefilter("ignore")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        for name in ("root", "apache_beam", "distributed", "torch", "kafka", "alembic", "mlflow"):
            logging.getLogger(None if name == "root" else name).setLevel(logging.ERROR)


@app.command()
def check(dataset: DatasetArgument, json: JsonOption = False) -> None:
    """Profile a dataset and refuse one that cannot work."""
    from features.dataset import load_dataset
    from features.profile import profile, render

    found = profile(load_dataset(dataset))
    if json:
        _print_json(found.to_json())
    else:
        render(found, out_console)


def _run_command(until: str, help_text: str) -> Any:
    def command(
        dataset: DatasetArgument,
        out: OutOption = Path("out"),
        seed: SeedOption = 0,
        split: SplitOption = None,
        encoder: EncoderOption = "lsa",
        encoder_model: ModelOption = None,
        runner: RunnerOption = "DirectRunner",
        runner_option: RunnerOptionsOption = None,
        codes: CodesOption = None,
        json: JsonOption = False,
    ) -> None:
        from tessera.run import RunOptions, run
        from tessera.settings import Settings

        options = RunOptions(
            seed=seed,
            encoder=encoder,
            encoder_model=encoder_model,
            runner=runner,
            runner_options=tuple(runner_option or ()),
            codes=codes,
        )
        registry = Settings.from_environment().open_registry() if until == "publish" else None
        loaded = load_with_split(dataset, split)
        result = run(loaded, out, options, console=err_console, registry=registry, until=until)
        if json:
            release = msgspec.to_builtins(result.release) if result.release else None
            bundle = result.bundle.id if result.bundle else None
            _print_json({"bundle": bundle, "release": release, "executed": result.executed, "metrics": result.metrics})
        else:
            _print_result(result)

    command.__doc__ = help_text
    return command


app.command("run")(_run_command("publish", "Do the offline job: features, Semantic IDs, training, evaluation, bundle."))
app.command("features")(_run_command("frame", "Do the first three stages: encode, assign, frame."))
app.command("train")(_run_command("evaluate", "Do the stages up to training and evaluation."))
app.command("publish")(_run_command("publish", "Do what is missing, write the bundle and register it."))


def load_with_split(path: Path, by: str | None) -> Any:
    """Loads a descriptor, with another way to split where one is given."""
    from features.dataset import Dataset, load_dataset

    dataset = load_dataset(path)
    if by is None:
        return dataset
    data = dataset.model_dump()
    data["split"]["by"] = by
    return Dataset.model_validate(data)


def _print_json(data: Any) -> None:
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(data), indent=2).decode() + "\n")


def _print_result(result: Any) -> None:
    if result.metrics:
        out_console.print(quality_table(result.metrics))
    if result.bundle:
        out_console.print(f"bundle   {result.bundle.id}  ({result.bundle.directory})")
    if result.release:
        aliases = ", ".join(result.release.aliases) or "no alias"
        out_console.print(f"release  {result.release.model} version {result.release.version} ({aliases})")


def quality_table(metrics: dict[str, Any]) -> Table:
    """Test quality of the ranker beside its baselines."""
    table = Table(title=f"Test quality, split by {metrics['split']}, seed {metrics['seed']}", title_justify="left")
    table.add_column("model")
    for part in ("all", "known", "unseen"):
        rows = metrics["quality"]["ranker"][part]["rows"]
        for name in ("AUC", "log loss", "NE"):
            table.add_column(f"{part} {name}\n({rows:,} rows)" if name == "AUC" else f"{part} {name}", justify="right")
    for model, parts in metrics["quality"].items():
        cells = []
        for part in ("all", "known", "unseen"):
            for name in ("auc", "log_loss", "normalized_entropy"):
                value = parts[part][name]
                cells.append("–" if value is None else f"{value:.4f}")
        table.add_row(model, *cells, style="bold" if model == "ranker" else None)
    return table
