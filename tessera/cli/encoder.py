"""Commands `tessera encoder`: encoders of a run fitted, judged, advised and upgraded."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from features.errors import TesseraError
from tessera.cli.concept import concept
from tessera.terminal import JsonOption, err_console, out_console, print_json

encoder = typer.Typer(
    no_args_is_help=True, help="Encoders: views tuned and cut, sizes advised, and new encoders under old indexes."
)
encoder.add_typer(concept, name="concept")
RunnerOption = Annotated[
    str, typer.Option(help="Engine of the encoding: direct, dask, prism, flink, spark or portable.")
]
EndpointOption = Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Address of that engine's cluster.")]
RunArgument = Annotated[Path, typer.Argument(help="Directory that `tessera run --out` wrote.")]


@encoder.command()
def tune(
    run: RunArgument,
    name: Annotated[str, typer.Option(help="Name of the view, or of the encoder.")] = "similar",
    pairs: Annotated[
        list[str] | None,
        typer.Option(help="co-liked, column:NAME, ict, bfs or a parquet file; repeatable. Default: co-liked."),
    ] = None,
    merge: Annotated[str | None, typer.Option(help="Two tuned views, NAME,NAME, to average instead of a fit.")] = None,
    layers: Annotated[
        int | None, typer.Option(min=0, help="Top layers to tune instead of a head; the result is another encoder.")
    ] = None,
    values: Annotated[
        list[str] | None,
        typer.Option("--set", help="Choice of the fit, such as head=low-rank or rounds=10; repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the batches and the held-out items.")] = 0,
    json: JsonOption = False,
) -> None:
    """Tune a view of a run's vectors by pairs of alike items, or the top layers of its transformer."""
    from models.encoder.tuning.layers import LayerOptions
    from models.encoder.tuning.options import TuneOptions, chosen
    from tessera.encoders.layers import tune_encoder
    from tessera.encoders.run_items import CO_LIKED
    from tessera.encoders.tune import ViewOptions, tune_view

    sources = tuple(pairs or (CO_LIKED,))
    with Progress(
        TextColumn("tune"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=err_console
    ) as bar:
        task = bar.add_task("tune")

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if layers is not None:
            if merge:
                raise TesseraError("--layers and --merge: two heads can be merged, layers cannot; give one of both")
            choices = chosen(LayerOptions, values or (), layers=layers, seed=seed)
            made = tune_encoder(run, name, sources, choices, progress=advance)
        else:
            merged = tuple(one.strip() for one in merge.split(",")) if merge else ()
            fit = chosen(TuneOptions, values or (), seed=seed)
            options = ViewOptions(name=name, pairs=sources, merge=merged, tune=fit)
            tuned = tune_view(run, options, progress=advance)
    if layers is not None:
        if json:
            print_json(made.to_json())
            return
        for source, count in made.pairs.items():
            out_console.print(f"pairs    {count:,} {source}")
        best = max(range(len(made.recalls)), key=made.recalls.__getitem__)
        out_console.print(f"recall   {made.recalls[0]:.3f} to {made.recalls[best]:.3f} of held-out items, round {best}")
        out_console.print(f"encoder  {made.encoder}: {made.directory}")
        return
    if json:
        print_json(tuned.to_json())
        return
    for source, count in tuned.pairs.items():
        out_console.print(f"pairs    {count:,} {source}")
    which = f"round {tuned.rounds}"
    if tuned.weights is not None:
        which = f"{tuned.weights.first:.2g} of the first head and {tuned.weights.second:.2g} of the second"
    if not tuned.view.steps:
        which = "no head is better than the base, so the view is the base"
    out_console.print(f"recall   {tuned.before:.3f} to {tuned.after:.3f} of held-out items, {which}")
    out_console.print(f"view     {tuned.view.id}: {tuned.directory}")


@encoder.command()
def report(
    run: RunArgument,
    against: Annotated[Path | None, typer.Option(help="The `--out` of another run, shown beside.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the samples and of the control.")] = 0,
    json: JsonOption = False,
) -> None:
    """Measure the base and every view of a run beside random vectors; also written as a page into the run."""
    from models.registry.documents import ENCODER_REPORT
    from tessera.encoders.registered import RunDocuments, keep_documents
    from tessera.encoders.report import NAME
    from tessera.encoders.report import report as measure
    from tessera.pages.encoder_page import shown

    document = measure(run, against, seed=seed)
    page = run / f"{NAME}.html"
    kept = RunDocuments({ENCODER_REPORT: document}, {page.name: page.read_text(encoding="utf-8")}, document["measures"])
    release = keep_documents(run, kept)
    if json:
        print_json(document)
        return
    for title, rows in document.items():
        if rows and isinstance(rows, list):
            names = list(dict.fromkeys(name for row in rows for name in row if against is not None or name != "run"))
            table = Table(*(name.replace("_", " ") for name in names), title=title, title_justify="left")
            for row in rows:
                table.add_row(*(Text(shown(row.get(name))) for name in names))
            out_console.print(table)
    out_console.print(f"page     {page}")
    if release is None:
        out_console.print(
            "logged   nowhere: this run is not published; `tessera publish` or `tessera run` publishes it"
        )
    else:
        out_console.print(f"logged   {release.model} version {release.version}, measures encoder.*")


@encoder.command()
def advise(
    run: RunArgument,
    items: Annotated[int | None, typer.Option(min=1, help="Items of the index; by default the run's.")] = None,
    k: Annotated[int, typer.Option(min=1, help="Neighbours of a query.")] = 10,
    recall: Annotated[float, typer.Option(help="Share of the float neighbours to keep.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sample and of the queries.")] = 0,
    json: JsonOption = False,
) -> None:
    """Advise dimensions and bits for a number of items, by a curve measured on the run's vectors."""
    from models.encoder.advise import advise as measure
    from models.encoder.advise import index_bytes
    from models.encoder.bits import index_bits
    from models.semantic_id.vectors import read_vectors
    from tessera.pipeline.stage import finished_key

    finished_key(run / "encode")
    found = read_vectors(run / "encode" / "vectors")
    advice = measure(found.vectors, items=items or found.items, k=k, recall=recall, seed=seed)
    if json:
        print_json(asdict(advice))
        return
    table = Table(
        "", "size", "bytes", f"recall@{k}", f"at {advice.items:,} items", "all pairs up to", title_justify="left"
    )
    for one in advice.sizes:
        worst = f"{one.critical:,} items" if one.critical else "–"
        table.add_row(one.form, str(one.size), str(one.item_bytes), f"{one.recall:.3f}", f"{one.expected:.3f}", worst)
    out_console.print(table)
    for form, size in (("dims", advice.dims), ("bits", advice.bits)):
        out_console.print(f"{form:<6} {size or 'no size'} for recall {recall:g} at {advice.items:,} items")
    # Bytes of indexes follow as a line, since a terminal has no room for more columns.
    names = [name for name in advice.bytes[0] if not name.startswith("index_")]
    sizes = Table(*names, title="bytes", title_justify="left")
    for row in advice.bytes:
        sizes.add_row(*("–" if row[name] is None else f"{row[name]:,}" for name in names))
    out_console.print(sizes)
    width = max(one.size for one in advice.sizes if one.form == "dims")
    rows = {kind: index_bytes(width, kind) for kind in ("float32", "int8")}
    out_console.print(
        f"index  TESSERA_INDEX=int8 serves with int8 rows and {index_bits(width)} bits: {rows['int8']:,} bytes an item "
        f"where float32 takes {rows['float32']:,}"
    )


@encoder.command()
def cut(
    run: RunArgument,
    dims: Annotated[int, typer.Option(min=1, help="Dimensions to keep.")],
    name: Annotated[str, typer.Option(help="Name of the new view.")] = "small",
    of: Annotated[str, typer.Option(help="View to cut, such as similar.")] = "base",
    json: JsonOption = False,
) -> None:
    """Write a view of fewer dimensions: the vectors turned onto the catalogue's principal axes, and cut."""
    from tessera.encoders.cut import cut_view

    found = cut_view(run, name, dims, of=of)
    if json:
        print_json({"view": found.view.id, "width": found.width, "dims": dims, "kept": found.kept})
        return
    out_console.print(f"cut      {found.width} to {dims} dimensions, which hold {found.kept:.3f} of the variance")
    out_console.print(f"view     {found.view.id}: {found.directory}")


@encoder.command()
def upgrade(
    run: RunArgument,
    to: Annotated[Path, typer.Option(help="Directory of the new encoder, or of a run that has the new encoder.")],
    keep: Annotated[
        str, typer.Option(help="Aim: codes (Semantic IDs stay), gain (the new encoder's recall stays), or both.")
    ] = "codes",
    sample: Annotated[int, typer.Option(min=1, help="Items to fit the maps on.")] = 1_000,
    items: Annotated[
        Path | None, typer.Option(help="File of item ids to fit on, one a line, instead of a sample.")
    ] = None,
    least: Annotated[
        list[str] | None,
        typer.Option(help="Least fidelity, such as whole_ids=0.5, task=1; repeatable. Default: by the aim."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the map; by default the encoder's id and the aim.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sample and of the fits.")] = 0,
    runner: RunnerOption = "direct",
    endpoint: EndpointOption = None,
    json: JsonOption = False,
) -> None:
    """Fit the map with which a new encoder serves a run's index and codebook; the run stays as it is."""
    from features.dataset.plain_text import read_text
    from models.registry.documents import UPGRADES
    from tessera.encoders.registered import RunDocuments, keep_documents
    from tessera.encoders.upgrade import UpgradeOptions, aim_of, least_of
    from tessera.encoders.upgrade import upgrade as fit
    from tessera.settings import Settings

    chosen = read_text(items).split("\n") if items else None
    options = UpgradeOptions(
        aim=aim_of(keep),
        sample=sample,
        items=[line.strip() for line in chosen if line.strip()] if chosen else None,
        least=least_of(least) if least else None,
        name=name,
        seed=seed,
    )
    settings = Settings.from_environment()
    result = fit(run, to, options, engine=settings.engine(runner, endpoint))
    keep_documents(run, RunDocuments({f"{UPGRADES}/{result.directory.name}.json": result.to_json()}), settings)
    if json:
        print_json(result.to_json())
        return
    measures = list(dict.fromkeys(measure for row in result.tried for measure in row if measure != "kind"))
    table = Table("map", *(measure.replace("_", " ") for measure in measures))
    for row in result.tried:
        cells = (f"{row[measure]:.3f}" if measure in row else "–" for measure in measures)
        table.add_row(Text(row["kind"], "bold" if row["kind"] == result.map.kind else ""), *cells)
    out_console.print(table)
    needed = "no map is needed" if result.map.kind == "none" else f"{result.map.kind}, {result.map.pairs:,} pairs"
    out_console.print(f"map      {needed}, kept for {keep}: {result.directory}")
    seconds = result.seconds_an_item * result.items
    out_console.print(f"instead  re-embedding {result.items:,} items takes about {seconds:,.0f} s on one core")


@encoder.command()
def reembed(
    run: RunArgument,
    map_name: Annotated[str, typer.Option("--map", help="Name of the map that `tessera encoder upgrade` wrote.")],
    most: Annotated[
        int | None, typer.Option(min=1, help="Most shards of 256 items to encode now; by default all.")
    ] = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="Register the bundle in the new space when all items are done.")
    ] = False,
    runner: RunnerOption = "direct",
    endpoint: EndpointOption = None,
    json: JsonOption = False,
) -> None:
    """Encode the catalogue with an upgrade's encoder, urgent items first; the index changes space when all are done."""
    from models.bundle.bundle import load_bundle
    from models.registry.documents import UPGRADES
    from tessera.encoders.flip import register_reembedded
    from tessera.encoders.reembed import reembed as encode
    from tessera.encoders.registered import RunDocuments, keep_documents
    from tessera.encoders.upgrade import map_directory, read_report
    from tessera.settings import Settings

    settings = Settings.from_environment()
    found = encode(run, map_name, most=most, engine=settings.engine(runner, endpoint))
    progress = asdict(found) | {"finished": found.finished, "bundle": found.bundle and str(found.bundle)}
    report = read_report(map_directory(run, map_name)) | {"reembedding": progress}
    keep_documents(run, RunDocuments({f"{UPGRADES}/{map_name}.json": report}), settings)
    made = load_bundle(found.bundle) if found.bundle is not None else None
    if publish and found.finished and made is None:
        raise TesseraError(f"--publish: {run} holds no published bundle; run it to the stage publish first")
    release = register_reembedded(run, made, settings) if publish and made is not None else None
    if json:
        print_json(progress | {"version": release and release.version})
        return
    out_console.print(f"reembed  {found.done:,} of {found.items:,} items; the index holds {found.space}")
    if made is not None:
        out_console.print(f"bundle   {made.id}: {made.directory}")
    if release is not None:
        out_console.print(f"version  {release.version}; `tessera rollout promote {release.version}` swaps to it")
