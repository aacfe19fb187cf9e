"""Commands `tessera advise`: estimates before anything runs."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from tessera.terminal import JsonOption, out_console, print_json

advise = typer.Typer(no_args_is_help=True, help="Estimates: bytes, network and processors for a shop.")


@advise.callback()
def _group() -> None:
    """Estimates: bytes, network and processors for a shop."""


@advise.command()
def capacity(
    items: Annotated[int, typer.Option(min=1, help="Items of the catalogue.")],
    users: Annotated[int, typer.Option(min=1, help="Users.")],
    events: Annotated[float, typer.Option(min=0, help="Events a second of the stream.")] = 1_000,
    requests: Annotated[float, typer.Option(min=0, help="Rankings a second, of 500 candidates each.")] = 100,
    dim: Annotated[int, typer.Option(min=1, help="Dimensions of a row of the table.")] = 16,
    vector_dim: Annotated[int, typer.Option(min=1, help="Dimensions of an item's vector.")] = 128,
    rows: Annotated[float, typer.Option(min=1e-6, help="Rows of the table for each id; a budget of .1 is 0.1.")] = 1.0,
    storage: Annotated[str, typer.Option(help="Rows in the store: float32, float16 or int8.")] = "float16",
    index: Annotated[str, typer.Option(help="Rows of the search index: float32 or int8.")] = "float32",
    step: Annotated[int, typer.Option(help="Events of a step of the stream: 256, 1024 or 8192.")] = 1_024,
    days: Annotated[float, typer.Option(min=0, help="Days that the log keeps.")] = 7,
    json: JsonOption = False,
) -> None:
    """Estimate bytes, network and processors for a shop, each with its formula and source."""
    from tessera.capacity import ShopSize, shown
    from tessera.capacity import capacity as estimate

    shop = ShopSize(
        items=items, users=users, events_per_s=events, requests_per_s=requests, dim=dim, vector_dim=vector_dim,
        rows=rows, storage=storage, index=index, step=step, days=days,
    )  # fmt: skip
    needs = estimate(shop)
    if json:
        print_json([asdict(need) for need in needs])
        return
    table = Table("part", "need", "formula", "source", title_justify="left")
    for need in needs:
        table.add_row(need.part, shown(need), need.formula, need.source)
    out_console.print(table)
