"""The command line: parses, wires, prints. Everything else is in the packages."""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from tessera.cli.advise import advise
from tessera.cli.bench import bench
from tessera.cli.edge import print_anything, tell
from tessera.cli.encoder import encoder
from tessera.cli.export import export
from tessera.cli.forget import forget, forgotten, topics_rewrite
from tessera.cli.ids import ids
from tessera.cli.migrate import migrate
from tessera.cli.operation import doctor, status
from tessera.cli.propensities import propensities
from tessera.cli.retrain import retrain
from tessera.cli.rollout import rollout
from tessera.cli.run import RunCommand, run, run_until
from tessera.cli.serve import keys, serve
from tessera.cli.skew import skew
from tessera.cli.stream import backfill, letters, replay, send, stream, topics, verify
from tessera.cli.sweep import sweep
from tessera.terminal import (
    DatasetArgument,
    JsonOption,
    OutOption,
    err_console,
    one_thread,
    out_console,
    print_json,
)

# Plain help: panels would load a Markdown renderer, which takes as long as everything else.
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Feature embeddings for recommenders.",
)


def main() -> None:
    """Runs the command line. An error is one line, with exit status 2 if the user can fix it."""
    print_anything()
    try:
        app(standalone_mode=True)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:
        sys.exit(tell(error, verbose="--verbose" in sys.argv[1:2]))


@app.callback()
def quiet(verbose: Annotated[bool, typer.Option("--verbose", help="Show the libraries' own log.")] = False) -> None:
    """Feature embeddings for recommenders."""
    if not verbose:
        warnings.simplefilter("ignore")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        os.environ.setdefault("TORCH_LOGS", "-torch.fx")
        for name in ("root", "distributed", "torch", "alembic", "mlflow"):
            logging.getLogger(None if name == "root" else name).setLevel(logging.ERROR)
        # What the platform itself warns of is shown: an engine is missing, a store fails, a bundle is tried again.
        for name in ("features", "models", "streaming", "serving", "tessera"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # Errors of clients are mostly outages that the client outlasts, or are raised here with their remedy.
        for name in ("apache_beam", "kafka", "librdkafka"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


@app.command()
def check(dataset: DatasetArgument, json: JsonOption = False) -> None:
    """Profile a dataset and refuse one that cannot work."""
    from features.dataset.descriptor import load_dataset
    from features.dataset.profile import profile, render

    counts = profile(load_dataset(dataset))
    if json:
        print_json(counts.to_json())
    else:
        render(counts, out_console)


app.command(cls=RunCommand)(run)
for _name, _last, _help in (
    ("features", "frame", "Do the first three stages: encode, assign, frame."),
    ("train", "evaluate", "Do the stages up to training and evaluation."),
    ("publish", "publish", "Do what is missing, write the bundle and register it."),
):
    app.command(_name, cls=RunCommand)(run_until(_last, _help))


tables = typer.Typer(no_args_is_help=True, help="The unified table of a bundle.")
app.command()(retrain)
app.command(cls=RunCommand)(sweep)
app.add_typer(tables, name="table")
app.add_typer(ids, name="ids")
app.add_typer(encoder, name="encoder")
app.add_typer(advise, name="advise")


@tables.command("report")
def table_report(
    bundle: Annotated[Path, typer.Argument(help="A bundle's directory.")],
    plot: Annotated[Path | None, typer.Option(help="Also draw it, as a PNG.")] = None,
    json: JsonOption = False,
) -> None:
    """Report on the table: collisions, readers, norms, dead and hot rows, bytes, features to widen."""
    from dataclasses import asdict

    import tessera.pages.table_drawing as pages
    from models.bundle.bundle import load_bundle
    from models.insight.table_report import insight

    report = insight(load_bundle(bundle))
    if json:
        print_json(asdict(report))
    else:
        pages.render(report, out_console)
    if plot is not None:
        pages.plot(report, plot)
        err_console.print(f"plot     {plot.absolute()}")


app.command()(export)
app.command()(serve)
app.add_typer(keys, name="keys")
app.add_typer(rollout, name="rollout")
app.command()(doctor)
app.command()(status)
app.command()(migrate)
app.command()(bench)
app.command()(stream)
app.command()(send)
app.command()(replay)
app.command()(verify)
app.command()(skew)
app.command()(backfill)
app.command()(propensities)
app.add_typer(letters, name="deadletters")
app.command()(forget)
app.command()(forgotten)
topics.command("rewrite")(topics_rewrite)
app.add_typer(topics, name="topics")


@app.command()
def demo(
    dataset: Annotated[Path | None, typer.Option(help="Descriptor; by default a synthetic catalogue.")] = None,
    out: OutOption = Path("out/demo"),
    small: Annotated[bool, typer.Option("--small", help="A smaller synthetic dataset.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the synthetic data, the training and the draws.")] = 0,
) -> None:
    """Run the whole path on this machine and write a report page."""
    from tessera.demo.demo import demo as run_demo
    from tessera.demo.home import own_home
    from tessera.settings import Settings

    settings = own_home(Settings.from_environment(), out, out_console)
    one_thread()
    report = run_demo(dataset, out, settings, small=small, console=out_console, seed=seed)
    out_console.print(f"report   {report.absolute()}")
