"""The command line: parses, wires, prints. Everything else is in the packages."""

import contextlib
import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from features.error import TesseraError
from tessera.bench.command import bench
from tessera.console import (
    DatasetArgument,
    JsonOption,
    OutOption,
    err_console,
    out_console,
    print_json,
)
from tessera.ids import ids
from tessera.offline import run_command

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_show_locals=False, help="Feature embeddings for recommenders."
)


def main() -> None:
    """Entry point: errors the user can mend are one line, exit status 2."""
    try:
        app(standalone_mode=True)
    except TesseraError as error:
        err_console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, markup=True, soft_wrap=True)
        sys.exit(2)


@app.callback()
def quiet(verbose: Annotated[bool, typer.Option("--verbose", help="Show the libraries' own log.")] = False) -> None:
    """Feature embeddings for recommenders."""
    if not verbose:
        warnings.simplefilter("ignore")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        os.environ.setdefault("TORCH_LOGS", "-torch.fx")
        for name in ("root", "apache_beam", "distributed", "torch", "kafka", "alembic", "mlflow"):
            logging.getLogger(None if name == "root" else name).setLevel(logging.ERROR)


@app.command()
def check(dataset: DatasetArgument, json: JsonOption = False) -> None:
    """Profile a dataset and refuse one that cannot work."""
    from features.dataset import load_dataset
    from features.profile import profile, render

    found = profile(load_dataset(dataset))
    if json:
        print_json(found.to_json())
    else:
        render(found, out_console)


app.command("run")(run_command("publish", "Do the offline job: features, Semantic IDs, training, evaluation, bundle."))
app.command("features")(run_command("frame", "Do the first three stages: encode, assign, frame."))
app.command("train")(run_command("evaluate", "Do the stages up to training and evaluation."))
app.command("publish")(run_command("publish", "Do what is missing, write the bundle and register it."))


ModelNameOption = Annotated[str | None, typer.Option("--model", help="Registered model; by default the only one.")]
BundleOption = Annotated[Path | None, typer.Option("--bundle", help="A bundle's directory instead of the champion.")]


@app.command()
def serve(
    model: ModelNameOption = None,
    bundle: BundleOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
) -> None:
    """Serve rankings of the champion over HTTP."""
    import uvicorn

    from serving.api import create_app
    from serving.load import load_bundle
    from serving.rank import RankService
    from tessera.online import bundle_at
    from tessera.settings import Settings

    settings = Settings.from_environment()
    found = bundle_at(settings, model, bundle)
    _one_thread()
    with contextlib.closing(settings.open_store()) as store:
        load_bundle(store, found)
        service = RankService(found, store)
        err_console.print(f"bundle {found.id}, {service.items:,} items, http://{host}:{port}/docs")
        # uvicorn raises the signal again when it has shut down; the store must still be closed then.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        uvicorn.run(create_app(service, store), host=host, port=port, log_level="warning")


@app.command()
def stream(
    model: ModelNameOption = None,
    bundle: BundleOption = None,
    once: Annotated[bool, typer.Option("--once", help="Drain the topics and stop.")] = False,
    batch: Annotated[int, typer.Option(min=1, max=4_096, help="Messages a micro-batch takes of each topic.")] = 256,
    wait_ms: Annotated[int, typer.Option(min=1, help="How long a micro-batch waits to fill.")] = 50,
    json: JsonOption = False,
) -> None:
    """Train the champion's table from the topics `items` and `events`, and keep the store fresh."""
    from tessera.online import bundle_at, open_stream, refuse_shared_topics, until_stopped
    from tessera.settings import Settings

    settings = Settings.from_environment()
    found = bundle_at(settings, model, bundle)
    if bundle is None:
        refuse_shared_topics(settings)
    stop = until_stopped()
    _one_thread()
    with open_stream(settings, found, batch=batch, wait_s=wait_ms / 1_000) as running:
        err_console.print(f"stream of bundle {found.id} from {settings.kafka or settings.home / 'log.db'}")
        if once:
            running.drain()
        else:
            with err_console.status("waiting for messages") as status:
                while not stop.is_set():
                    if running.run_once():
                        totals = running.trainer.totals
                        status.update(f"{totals.events:,} events, {totals.items:,} items, {totals.bad:,} dead letters")
        totals = running.trainer.totals
    if json:
        print_json(totals)
    else:
        out_console.print(
            f"{totals.messages:,} messages: {totals.events:,} events, {totals.items:,} items, "
            f"{totals.neutral:,} neutral, {totals.bad:,} dead letters; {totals.batches:,} batches"
        )


@app.command()
def send(
    topic: Annotated[str, typer.Argument(help="items or events.")],
    file: Annotated[Path, typer.Argument(help="JSON lines; one message each.")],
) -> None:
    """Append a file of JSON lines to a topic of the log."""
    from tessera.settings import Settings

    if topic not in ("items", "events"):
        raise TesseraError(f"topic {topic!r}: expected items or events")
    if not file.is_file():
        raise TesseraError(f"{file}: no such file; give JSON lines, one message each")
    lines = [line for line in file.read_bytes().splitlines() if line.strip()]
    settings = Settings.from_environment()
    with contextlib.closing(settings.open_log()) as log:
        log.create_topics(settings.topics.partitions())
        log.append(getattr(settings.topics, topic), [(None, line) for line in lines])
    out_console.print(f"{len(lines):,} messages appended to {topic}")


tables = typer.Typer(no_args_is_help=True, help="The unified table of a bundle.")
app.add_typer(tables, name="table")
app.add_typer(ids, name="ids")


@tables.command("report")
def table_report(
    bundle: Annotated[Path, typer.Argument(help="A bundle's directory.")],
    plot: Annotated[Path | None, typer.Option(help="Also draw it, as a PNG.")] = None,
    json: JsonOption = False,
) -> None:
    """Say what the table holds: collisions, readers, norms, dead and hot rows, bytes, where a lookup would help."""
    from dataclasses import asdict

    import tessera.table as pages
    from models.bundle import load_bundle
    from models.table.insight import insight

    found = insight(load_bundle(bundle))
    if json:
        print_json(asdict(found))
    else:
        pages.render(found, out_console)
    if plot is not None:
        pages.plot(found, plot)
        err_console.print(f"plot     {plot.absolute()}")


app.command()(bench)
letters = typer.Typer(no_args_is_help=True, help="Messages that were set aside.")
app.add_typer(letters, name="deadletters")


@letters.command("list")
def deadletters_list(json: JsonOption = False) -> None:
    """List dead letters: where each message stood, and why it was set aside."""
    from streaming.deadletter import read_dead_letters
    from tessera.settings import Settings

    settings = Settings.from_environment()
    with contextlib.closing(settings.open_log()) as log:
        log.create_topics(settings.topics.partitions())
        found = read_dead_letters(log, settings.topics)
    if json:
        print_json(found)
        return
    table = Table("topic", "partition", "offset", "reason", title=f"{len(found):,} dead letters", title_justify="left")
    for letter in found:
        table.add_row(letter.topic, str(letter.partition), str(letter.offset), escape(letter.reason))
    out_console.print(table)


@app.command()
def demo(
    dataset: Annotated[Path | None, typer.Option(help="Descriptor; by default a synthetic catalogue.")] = None,
    out: OutOption = Path("out/demo"),
    small: Annotated[bool, typer.Option("--small", help="A tenth of the synthetic data.")] = False,
) -> None:
    """Run the whole path on this machine and write a report page."""
    from dataclasses import replace

    from tessera.demo import demo as run_demo
    from tessera.settings import Settings

    settings = Settings.from_environment()
    if "TESSERA_HOME" not in os.environ:
        settings = replace(settings, home=(out / "home").absolute())
    _one_thread()
    report = run_demo(dataset, out, settings, small=small, console=out_console)
    out_console.print(f"report   {report.absolute()}")


def _one_thread() -> None:
    """For a process that computes in small batches: threads would wait for each other longer than they compute."""
    import torch

    torch.set_num_threads(1)
