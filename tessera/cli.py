"""The command line: parses, wires, prints. Everything else is in the packages."""

import contextlib
import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.markup import escape
from rich.table import Table

from features.error import TesseraError
from tessera.bench.command import bench
from tessera.console import (
    JsonOption,
    OutOption,
    err_console,
    load_with_split,
    out_console,
    parse_bytes,
    parse_chunks,
    print_json,
)

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_show_locals=False, help="Feature embeddings for recommenders."
)

DatasetArgument = Annotated[Path, typer.Argument(help="The dataset descriptor, a TOML file.")]
SeedOption = Annotated[int, typer.Option(min=0, max=2**31, help="Decides everything random.")]
SplitOption = Annotated[
    str | None, typer.Option("--split", help="Instead of the descriptor's: time, random, leave-one-out or order.")
]
EncoderOption = Annotated[str, typer.Option(help="lsa or sentence-transformers.")]
ModelOption = Annotated[str | None, typer.Option("--encoder-model", help="Local directory or hub id.")]
RunnerOption = Annotated[str, typer.Option(help="Beam runner: DirectRunner, DaskRunner, PrismRunner, FlinkRunner, …")]
RunnerOptionsOption = Annotated[
    list[str] | None, typer.Option("--runner-option", help="Passed to Beam, e.g. --direct_num_workers=2; repeatable.")
]
DimOption = Annotated[int, typer.Option(help="Width of a table row; a multiple of 4.")]
BudgetOption = Annotated[
    str | None, typer.Option(help="Bytes of the table's weights, e.g. 2MB; by default a row for each value.")
]
ChunksOption = Annotated[
    list[str] | None, typer.Option(help="Lookups of a feature, e.g. item_id=4; repeatable. Default: 2 for many values.")
]
ExactOption = Annotated[
    list[str] | None,
    typer.Option(help="Feature with rows of its own; repeatable, 'none' for none. Default: those of at most 8 values."),
]
AdmissionOption = Annotated[
    int, typer.Option(min=0, max=255, help="Sightings after which a hashed value reads rows; 0 admits all.")
]
HistoryOption = Annotated[str, typer.Option("--history", help="How a history is pooled: mean or attention.")]
ContentOption = Annotated[bool, typer.Option("--content/--no-content", help="Let the network read content vectors.")]
CodesOption = Annotated[int | None, typer.Option(help="Codes per level; by default what suits the catalogue's size.")]


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
        dim: DimOption = 16,
        budget: BudgetOption = None,
        chunks: ChunksOption = None,
        exact: ExactOption = None,
        admission: AdmissionOption = 2,
        history: HistoryOption = "mean",
        content: ContentOption = False,
        json: JsonOption = False,
    ) -> None:
        from models.feature import TableOptions
        from tessera.run import RunOptions, run
        from tessera.settings import Settings

        if history not in ("mean", "attention"):
            raise TesseraError(f"--history {history}: expected mean or attention")
        table = TableOptions(
            dim=dim,
            budget=None if budget is None else parse_bytes(budget),
            chunks=parse_chunks(chunks),
            exact=None if exact is None else tuple(name for name in exact if name != "none"),
            admission=admission,
            history="attention" if history == "attention" else "mean",
            content=content,
        )
        options = RunOptions(
            table=table,
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
            print_json({"bundle": bundle, "release": release, "executed": result.executed, "metrics": result.metrics})
        else:
            _print_result(result)

    command.__doc__ = help_text
    return command


app.command("run")(_run_command("publish", "Do the offline job: features, Semantic IDs, training, evaluation, bundle."))
app.command("features")(_run_command("frame", "Do the first three stages: encode, assign, frame."))
app.command("train")(_run_command("evaluate", "Do the stages up to training and evaluation."))
app.command("publish")(_run_command("publish", "Do what is missing, write the bundle and register it."))


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
    for name in ("items", "model", "rows", "AUC", "log loss", "NE"):
        table.add_column(name, justify="left" if name in ("items", "model") else "right")
    for part in ("all", "known", "unseen"):
        for model, parts in metrics["quality"].items():
            values = [parts[part][name] for name in ("auc", "log_loss", "normalized_entropy")]
            cells = ["–" if value is None else f"{value:.4f}" for value in values]
            rows = f"{parts[part]['rows']:,}"
            table.add_row(part, model, rows, *cells, style="bold" if model == "ranker" else None)
    return table


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
