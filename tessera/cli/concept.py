"""Commands `tessera encoder concept`: concepts of a run added from examples, listed, and erased by a view."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from features.errors import TesseraError
from tessera.terminal import JsonOption, out_console, print_json

concept = typer.Typer(no_args_is_help=True, help="Concepts that an item's vector predicts.")
RunArgument = Annotated[Path, typer.Argument(help="Directory that `tessera run --out` wrote.")]
NameArgument = Annotated[str, typer.Argument(help="Name of the concept.")]


@concept.command()
def add(
    run: RunArgument,
    name: NameArgument,
    items: Annotated[str, typer.Option(help="Ids of items that carry the concept, separated by commas.")] = "",
    text: Annotated[
        list[str] | None, typer.Option(help="Text that describes the concept or a carrier; repeatable.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Add a concept from 3 to 10 examples, items and texts together; the next run publishes it."""
    from models.encoder.meaning.concepts import described
    from tessera.encoders.concepts import add_concept

    named = [item.strip() for item in items.split(",") if item.strip()]
    (row,) = described(add_concept(run, name, named, text or []))
    if json:
        print_json(row)
    else:
        out_console.print(f"concept {name}: {row['examples']} examples; run `tessera run` again to publish it")


@concept.command("list")
def list_(run: RunArgument, json: JsonOption = False) -> None:
    """List the concepts of a run: origin, examples, and how well held-out items are told apart."""
    from tessera.encoders.concepts import list_concepts

    rows = list_concepts(run)
    if json:
        print_json(rows)
        return
    table = Table("concept", "from", "examples", "AUC", "threshold", title_justify="left")
    for row in rows:
        origin = f"column {row['column']}" if row["column"] else row["head"]
        auc = f"{row['auc']:.3f}" if row["auc"] is not None else "–"
        table.add_row(row["concept"], origin, f"{row['examples']:,}", auc, f"{row['threshold']:.3f}")
    out_console.print(table)


@concept.command()
def erase(
    run: RunArgument,
    name: NameArgument,
    view: Annotated[str, typer.Option(help="Name of the view to write.")],
    how: Annotated[
        str, typer.Option(help="gated: neighbours tell less and others stay; leace: linear probes fail.")
    ] = "gated",
    json: JsonOption = False,
) -> None:
    """Write a view of the run's vectors that tells less of a concept."""
    from tessera.encoders.concepts import erase_concept

    if how not in ("gated", "leace"):
        raise TesseraError(f"--how {how!r}: expected gated or leace")
    made = erase_concept(run, name, view, "leace" if how == "leace" else "gated")
    if json:
        print_json({"view": view, "id": made.id, "how": how})
    else:
        out_console.print(f"view {view} without {name}: {made.id}; run `tessera run` again to publish it")
