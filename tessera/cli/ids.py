"""Commands `tessera ids`: Semantic IDs of a run shown, compared and reported."""

import difflib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from features.errors import TesseraError
from tessera.terminal import JsonOption, err_console, out_console, print_json

if TYPE_CHECKING:
    import polars as pl

ids = typer.Typer(
    no_args_is_help=True, help="Semantic IDs: of one item, of two runs compared, of a catalogue reported."
)
RunArgument = Annotated[Path, typer.Argument(help="Directory that `tessera run --out` wrote.")]
_NEIGHBOURS = 3


@ids.command()
def show(
    run: RunArgument, item: Annotated[str, typer.Argument(help="An item's id.")], json: JsonOption = False
) -> None:
    """Show an item's path through the tree: the words, items and nearest neighbours of each node."""
    import numpy as np

    from models.semantic_id.report.tree import Tree
    from tessera.pages.coded_items import counted, load_coded

    coded = load_coded(run)
    if item not in coded.ids:
        near = difflib.get_close_matches(item, coded.ids, n=3, cutoff=0.5)
        hint = f"near ones: {', '.join(near)}" if near else f"one of them: {coded.ids[0]}"
        raise TesseraError(f"item {item!r} is not among the {len(coded.ids):,} coded items; {hint}")
    row = coded.ids.index(item)
    unit = coded.vectors / np.maximum(np.linalg.norm(coded.vectors, axis=1, keepdims=True), 1e-12)
    tree = Tree(coded.codes, coded.texts)
    steps: list[dict[str, Any]] = []
    parent = tree.root
    for depth in range(1, coded.codes.shape[1] + 1):
        node = tree.find(coded.codes[row, :depth].tolist())
        others = tree.items(node)
        others = others[others != row]
        distances = 1 - unit[others] @ unit[row]
        nearest = np.argsort(distances, kind="stable")[:_NEIGHBOURS]
        steps.append(
            {
                "prefix": list(node.path),
                "items": node.size,
                "words": tree.words(node, parent),
                "neighbours": [
                    {"item": coded.ids[others[k]], "text": coded.title(others[k]), "distance": float(distances[k])}
                    for k in nearest
                ],
            }
        )
        parent = node
    document = {"item": item, "text": coded.title(row), "semantic_id": coded.codes[row].tolist(), "path": steps}
    if json:
        print_json(document)
        return
    from rich.tree import Tree as RichTree

    drawn = RichTree(Text.assemble((item, "bold"), f"  {coded.title(row)}"))
    branch = drawn
    for step in steps:
        words = ", ".join(step["words"]) or "no word distinguishes it"
        prefix = (".".join(map(str, step["prefix"])), "bold")
        branch = branch.add(Text.assemble(prefix, f"  {counted(step['items'])}: {words}"))
        for neighbour in step["neighbours"]:
            branch.add(
                Text.assemble((f"{neighbour['distance']:.3f}", "dim"), f"  {neighbour['item']}  {neighbour['text']}")
            )
    out_console.print(drawn, highlight=False)


@ids.command()
def compare(
    before: RunArgument,
    after: Annotated[Path, typer.Argument(help="The `--out` of another run on the same catalogue.")],
    json: JsonOption = False,
) -> None:
    """Compare two runs' Semantic IDs of the items both know, as they are and with the names matched."""
    import numpy as np

    from models.semantic_id.codebook.kinds import load
    from models.semantic_id.codebook.match import match
    from models.semantic_id.report.compare import compare as compared
    from tessera.pages.coded_items import load_coded

    old, new = load_coded(before), load_coded(after)
    row_of = {name: row for row, name in enumerate(new.ids)}
    rows = [(row, row_of[name]) for row, name in enumerate(old.ids) if name in row_of]
    if not rows:
        raise TesseraError(f"{before} and {after} have no item in common; compare runs on one catalogue")
    first, second = np.array(rows).T
    mine, theirs = old.codes[first], new.codes[second]
    comparisons = {"as they are": compared(mine, theirs)}
    matched = match(load(after / "assign" / "codebook"), theirs, mine)
    comparisons["matched"] = compared(mine, matched.rename(theirs))
    if json:
        print_json({name: asdict(comparison) for name, comparison in comparisons.items()})
        return
    table = Table(
        "", "codes", "unchanged", "adj. Rand", "NMI", title=f"{len(rows):,} items in both", title_justify="left"
    )
    for name, comparison in comparisons.items():
        for depth, measured in enumerate(
            zip(comparison.unchanged, comparison.rand, comparison.mutual_information, strict=True), 1
        ):
            table.add_row(name if depth == 1 else "", f"1–{depth}", *(f"{value:.3f}" for value in measured))
    out_console.print(table)
    out_console.print(f"pairs of one first code that still share one: {comparisons['matched'].pairs_kept:.3f}")


@ids.command()
def report(
    run: RunArgument,
    new: Annotated[
        Path | None,
        typer.Option(help="Descriptor with new items: report how well they fit the run's codebook."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page with a tree to unfold.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="Published IDs to compare with: JSON, by item id or in catalogue order.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Report the use of the codes, shared IDs and the purity of the nodes, and advise changes."""
    import msgspec

    from models.semantic_id.codebook.quantizer import recommended_shape
    from models.semantic_id.report.quality import id_quality
    from tessera.cli.ids_report import advise, depth_table, hits_of, hits_table, new_items_drift
    from tessera.pages.coded_items import load_coded, published
    from tessera.pages.ids_page import write_page

    coded = load_coded(run)
    health = msgspec.json.decode((run / "assign" / "report.json").read_bytes())
    qualities = {"ours": asdict(id_quality(coded.codes, coded.vectors))}
    if against is not None:
        qualities[against.stem] = asdict(id_quality(*published(against, coded)))
    if new is not None:
        health["drift"] = new_items_drift(run, new, coded, health.get("seed", 0))
    shape = recommended_shape(len(coded.ids))
    advice = advise(health, qualities["ours"], shape)
    hits = [asdict(group) for group in hits_of(run)]
    document = {
        "codebook": health,
        "recommended": {"levels": shape[0], "codes": shape[1]},
        "quality": qualities,
        "hits": hits,
        "advice": advice,
    }
    if html is not None:
        write_page(html, coded, document)
        err_console.print(f"page: {html}")
    if json:
        print_json(document)
        return
    for name, group in qualities.items():
        out_console.print(depth_table(name, group))
    if hits:
        out_console.print(hits_table(hits))
    for line in advice:
        out_console.print(f"• {line}")


@ids.command()
def export(
    run: RunArgument,
    out: Annotated[Path, typer.Argument(help="A .parquet file: item_id, codes and, if asked, suffix.")],
    suffix: Annotated[bool, typer.Option("--suffix", help="Number the items that share a Semantic ID.")] = False,
    after: Annotated[
        Path | None, typer.Option(help="An earlier export with --suffix: its items keep their numbers.")
    ] = None,
) -> None:
    """Write the Semantic IDs of a run to a file, made unique by a suffix that an append does not change.

    With --after, rows without an item_id at the end hold the numbers of removed items, for the next --after.
    """
    import polars as pl

    from features.jobs.shard import write_parquet
    from models.semantic_id.suffix import with_suffix
    from tessera.pages.coded_items import counted, load_coded

    if after is not None and not suffix:
        raise TesseraError("--after continues the numbering: give --suffix too")
    coded = load_coded(run)
    codes = pl.Series("codes", coded.codes, dtype=pl.Array(pl.UInt16, coded.codes.shape[1]))
    items = pl.DataFrame({"item_id": coded.ids}).with_columns(codes.cast(pl.List(pl.UInt16)))
    if suffix:
        count = items.height
        items = with_suffix(items, _exported(after) if after else None)
        numbered = items[:count].filter(pl.col("suffix") > 0).height
        err_console.print(f"{counted(numbered)} of {count:,} ({numbered / count:.1%}) need a suffix")
    write_parquet(items, out)


def _exported(path: Path) -> "pl.DataFrame":
    import polars as pl

    try:
        return pl.read_parquet(path, columns=["item_id", "codes", "suffix"])
    except (OSError, pl.exceptions.PolarsError) as error:
        raise TesseraError(f"{path} is no export with item_id, codes and suffix: {error}") from error
