"""Commands `tessera encoder`: encoders of a run fitted, judged, advised and upgraded."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from tessera.terminal import JsonOption, out_console, print_json

encoder = typer.Typer(no_args_is_help=True, help="Encoders: sizes advised, and new encoders under old indexes.")
RunArgument = Annotated[Path, typer.Argument(help="Directory that `tessera run --out` wrote.")]


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
    sizes = Table("items", *list(advice.bytes[0])[1:], title="bytes", title_justify="left")
    for row in advice.bytes:
        sizes.add_row(*("–" if value is None else f"{value:,}" for value in row.values()))
    out_console.print(sizes)
