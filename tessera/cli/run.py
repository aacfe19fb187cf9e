"""`tessera run`, `features`, `train` and `publish`: one command, up to another stage."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.table import Table
from rich.text import Text

from features.errors import TesseraError
from tessera.terminal import (
    DatasetArgument,
    JsonOption,
    OutOption,
    err_console,
    load_with_split,
    one_of,
    out_console,
    parse_bytes,
    parse_chunks,
    parse_options,
    print_json,
)

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
ContentOption = Annotated[
    bool | None, typer.Option("--content/--no-content", help="Let the network read content vectors; by default if any.")
]
PrecisionOption = Annotated[
    str, typer.Option(help="Products of the network in training: float32, bfloat16, or auto, which times both.")
]
TokensOption = Annotated[
    str, typer.Option(help="What of a Semantic ID reads rows: prefix, unigram, bigram, all-bigrams or pieces.")
]
PiecesOption = Annotated[
    int | None,
    typer.Option(min=1, help="Rows that --tokens pieces may claim; by default two for each code of a level."),
]
QuantizerOption = Annotated[str, typer.Option(help="rqvae, residual-kmeans or balanced-kmeans.")]
QuantizerOptionsOption = Annotated[
    list[str] | None,
    typer.Option("--quantizer-option", help="Of its kind, e.g. gradient=rotation or sinkhorn=0.003; repeatable."),
]
WarmStartOption = Annotated[
    Path | None,
    typer.Option("--warm-start", help="The --out of an earlier run: keep its encoder, its codes' names and its rows."),
]
LevelsOption = Annotated[
    int | None, typer.Option(min=1, max=16, help="Levels of a Semantic ID; by default what suits the catalogue's size.")
]
CodesOption = Annotated[int | None, typer.Option(help="Codes per level; by default what suits the catalogue's size.")]


GateOption = Annotated[
    list[str] | None,
    typer.Option("--gate", help="How much worse than the champion, e.g. auc=0.005 or latency=2; repeatable."),
]
PositionsOption = Annotated[
    Path | None,
    typer.Option(
        "--positions", help="Positions of the topics when the files were made, from `tessera topics positions`."
    ),
]


def read_positions(path: Path | None) -> tuple[Any, ...]:
    """Reads what `tessera topics positions` printed; nothing without a path."""
    from models.bundle.bundle import LogPosition

    if path is None:
        return ()
    try:
        return tuple(msgspec.json.decode(path.read_bytes(), type=list[LogPosition]))
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TesseraError(f"{path}: expected what `tessera topics positions` prints ({error})") from error


# How `publish` ends: 0 a challenger, 1 refused, 3 registered without an alias, since the test set cannot tell.
_STATUS = {"passed": 0, "worse": 1, "cannot tell": 3}


def run_command(until: str, help_text: str) -> Callable[..., None]:
    """The command that does the stages up to and including `until`."""

    def command(
        dataset: DatasetArgument,
        out: OutOption = Path("out"),
        seed: SeedOption = 0,
        split: SplitOption = None,
        encoder: EncoderOption = "lsa",
        encoder_model: ModelOption = None,
        runner: RunnerOption = "DirectRunner",
        runner_option: RunnerOptionsOption = None,
        quantizer: QuantizerOption = "rqvae",
        codes: CodesOption = None,
        levels: LevelsOption = None,
        quantizer_option: QuantizerOptionsOption = None,
        warm_start: WarmStartOption = None,
        tokens: TokensOption = "prefix",
        pieces: PiecesOption = None,
        dim: DimOption = 16,
        budget: BudgetOption = None,
        chunks: ChunksOption = None,
        exact: ExactOption = None,
        admission: AdmissionOption = 2,
        history: HistoryOption = "mean",
        content: ContentOption = None,
        precision: PrecisionOption = "float32",
        gate: GateOption = None,
        positions: PositionsOption = None,
        json: JsonOption = False,
    ) -> None:
        from models.ranker.train import PrecisionChoice, TrainConfig
        from models.registry.gate import Gates
        from models.semantic_id.codebook.kinds import Kind
        from models.semantic_id.tokens import Scheme
        from models.table.default_schema import Pooling, TableOptions
        from tessera.pipeline.run import RunOptions, run
        from tessera.settings import Settings

        table = TableOptions(
            dim=dim,
            budget=None if budget is None else parse_bytes(budget),
            chunks=parse_chunks(chunks),
            exact=None if exact is None else tuple(name for name in exact if name != "none"),
            admission=admission,
            history=one_of(Pooling, history, "--history"),
            content=content,
        )
        options = RunOptions(
            table=table,
            seed=seed,
            encoder=encoder,
            encoder_model=encoder_model,
            runner=runner,
            runner_options=tuple(runner_option or ()),
            quantizer=one_of(Kind, quantizer, "--quantizer"),
            quantizer_options=parse_options(quantizer_option, "--quantizer-option"),
            warm_start=warm_start,
            codes=codes,
            levels=levels,
            tokens=one_of(Scheme, tokens, "--tokens"),
            pieces=pieces,
            train=TrainConfig(precision=one_of(PrecisionChoice, precision, "--precision")),
            gates=Gates.parse(gate),
            positions=read_positions(positions),
        )
        registry = Settings.from_environment().registry_on_use() if until == "publish" else None
        loaded = load_with_split(dataset, split)
        result = run(loaded, out, options, console=err_console, registry=registry, until=until)
        if json:
            release = msgspec.to_builtins(result.release) if result.release else None
            bundle = result.bundle.id if result.bundle else None
            gates = result.verdict.to_json() if result.verdict else None
            found = {"bundle": bundle, "release": release, "executed": result.executed, "metrics": result.metrics}
            print_json(found | {"gates": gates, "engine": result.engine})
        else:
            _print_result(result)
        if result.verdict and not result.verdict.passed:
            raise typer.Exit(_STATUS[result.verdict.answer])

    command.__doc__ = help_text
    return command


def _print_result(result: Any) -> None:
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
            said = (
                ": too few test rows that neither bundle was trained on to exclude a drop of AUC beyond --gate sure; "
                "give more rows, widen that gate, or try it with `tessera rollout start --challenger "
                f"{result.release.version}`"
            )
            out_console.print(Text.assemble(("cannot tell", "yellow"), said))
        if result.verdict.answer == "worse":
            worse = ", ".join(check.name for check in result.verdict.checks if not check.passed)
            said = f" as a challenger: worse beyond the thresholds in {worse}; see --gate"
            out_console.print(Text.assemble(("refused", "red"), said))


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
