"""`tessera ids`: Semantic IDs of a run shown, compared and reported."""

import difflib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np
import polars as pl
import typer
from numpy.typing import NDArray
from rich.table import Table
from rich.tree import Tree as RichTree

from features.error import TesseraError
from tessera.console import JsonOption, err_console, out_console, print_json

if TYPE_CHECKING:
    from models.semantic_id.hits import HitRate

ids = typer.Typer(
    no_args_is_help=True, help="Semantic IDs: show an item's, compare two runs', report on a catalogue's."
)
RunArgument = Annotated[Path, typer.Argument(help="What `tessera run --out` wrote.")]
_TITLE = 70
_NEIGHBOURS = 3


@dataclass(frozen=True)
class Coded:
    """The items of a run: ids, texts, vectors (N, D) and codes (N, Q)."""

    ids: list[str]
    texts: list[str]
    vectors: NDArray[np.float32]
    codes: NDArray[np.uint16]

    def title(self, row: int) -> str:
        """The start of an item's text."""
        text = " ".join(self.texts[row].split())
        return text if len(text) <= _TITLE else text[: _TITLE - 1] + "…"


def counted(items: int) -> str:
    """`1 item`, `2 items`."""
    return f"{items:,} item{'' if items == 1 else 's'}"


def load_coded(run: Path) -> Coded:
    """Reads what the stages `encode` and `assign` left.

    Raises:
        TesseraError: the directory holds no such run.
    """
    from features.jobs.shard import read_shards

    for stage in ("encode", "assign"):
        if not (run / stage / "stage.json").is_file():
            raise TesseraError(f"{run / stage} is missing: give the --out of a `tessera run` on items with text")
    coded = read_shards(run / "assign" / "codes")
    texts = read_shards(run / "encode" / "texts").select("item_id", "text")
    joined = coded.join(texts, on="item_id", how="left", maintain_order="left")
    return Coded(
        ids=joined["item_id"].to_list(),
        texts=joined["text"].fill_null("").to_list(),
        vectors=joined["vector"].to_numpy().astype(np.float32),
        codes=joined["codes"].to_numpy().astype(np.uint16),
    )


@ids.command()
def show(
    run: RunArgument, item: Annotated[str, typer.Argument(help="An item's id.")], json: JsonOption = False
) -> None:
    """Show an item's path through the tree: words of each node, who shares it, how near they are."""
    from models.semantic_id.tree import Tree

    coded = load_coded(run)
    if item not in coded.ids:
        near = difflib.get_close_matches(item, coded.ids, n=3, cutoff=0.5)
        hint = f"near ones: {', '.join(near)}" if near else f"one of them: {coded.ids[0]}"
        raise TesseraError(f"item {item!r} is none of the {len(coded.ids):,} coded items; {hint}")
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
    found = {"item": item, "text": coded.title(row), "semantic_id": coded.codes[row].tolist(), "path": steps}
    if json:
        print_json(found)
        return
    drawn = RichTree(f"[bold]{item}[/bold]  {coded.title(row)}")
    branch = drawn
    for step in steps:
        words = ", ".join(step["words"]) or "no word tells it from its siblings"
        branch = branch.add(f"[bold]{'.'.join(map(str, step['prefix']))}[/bold]  {counted(step['items'])}: {words}")
        for one in step["neighbours"]:
            branch.add(f"[dim]{one['distance']:.3f}[/dim]  {one['item']}  {one['text']}")
    out_console.print(drawn, highlight=False)


@ids.command()
def compare(
    before: RunArgument,
    after: Annotated[Path, typer.Argument(help="The `--out` of another run on the same catalogue.")],
    json: JsonOption = False,
) -> None:
    """Compare two runs' Semantic IDs of the items both know, as they are and with the names matched."""
    from models.semantic_id.codebook import load
    from models.semantic_id.compare import compare as compared
    from models.semantic_id.match import match

    old, new = load_coded(before), load_coded(after)
    place = {name: row for row, name in enumerate(new.ids)}
    rows = [(row, place[name]) for row, name in enumerate(old.ids) if name in place]
    if not rows:
        raise TesseraError(f"{before} and {after} have no item in common; compare runs on one catalogue")
    first, second = np.array(rows).T
    mine, theirs = old.codes[first], new.codes[second]
    found = {"as they are": compared(mine, theirs)}
    matched = match(load(after / "assign" / "codebook"), theirs, mine)
    found["matched"] = compared(mine, matched.rename(theirs))
    if json:
        print_json({name: asdict(one) for name, one in found.items()})
        return
    table = Table(
        "", "codes", "unchanged", "adj. Rand", "NMI", title=f"{len(rows):,} items in both", title_justify="left"
    )
    for name, one in found.items():
        for depth, measured in enumerate(zip(one.unchanged, one.rand, one.mutual_information, strict=True), 1):
            table.add_row(name if depth == 1 else "", f"1–{depth}", *(f"{value:.3f}" for value in measured))
    out_console.print(table)
    out_console.print(f"pairs of one first code that still share one: {found['matched'].pairs_kept:.3f}")


@ids.command()
def report(
    run: RunArgument,
    new: Annotated[
        Path | None,
        typer.Option(help="A descriptor: how the items of it that the run has not coded fit its codebook."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page with a tree to unfold.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="Published IDs to measure beside: JSON, by item id or in catalogue order.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Say how the codes are used, who shares them, how pure the nodes are, and what to change."""
    from models.semantic_id.quality import id_quality
    from models.semantic_id.quantizer import recommended_shape
    from tessera.ids_page import write_page

    coded = load_coded(run)
    health = msgspec.json.decode((run / "assign" / "report.json").read_bytes())
    found = {"ours": asdict(id_quality(coded.codes, coded.vectors))}
    if against is not None:
        found[against.stem] = asdict(id_quality(*_published(against, coded)))
    if new is not None:
        health["drift"] = new_items_drift(run, new, coded, health.get("seed", 0))
    shape = recommended_shape(len(coded.ids))
    advice = advise(health, found["ours"], shape)
    hits = [asdict(one) for one in hits_of(run)]
    document = {
        "codebook": health,
        "recommended": {"levels": shape[0], "codes": shape[1]},
        "quality": found,
        "hits": hits,
        "advice": advice,
    }
    if html is not None:
        write_page(html, coded, document)
        err_console.print(f"page: {html}")
    if json:
        print_json(document)
        return
    for name, one in found.items():
        out_console.print(depth_table(name, one))
    if hits:
        out_console.print(hits_table(hits))
    for line in advice:
        out_console.print(f"• {line}")


def hits_of(run: Path) -> "list[HitRate]":
    """How histories lead to the next item by their codes; nothing where the run has no frame."""
    from models.semantic_id.hits import hit_rates

    if not (run / "frame" / "stage.json").is_file():
        return []
    items = pl.read_parquet(run / "frame" / "items.parquet", columns=["semantic_codes"])["semantic_codes"]
    known = items.is_not_null().to_numpy()
    codes = np.zeros((len(items), len(items.drop_nulls()[0])), dtype=np.uint16)
    codes[known] = items.drop_nulls().to_numpy()
    columns = ["item", "history", "label", "split"]
    return hit_rates(codes, known, pl.read_parquet(run / "frame" / "examples.parquet", columns=columns))


def new_items_drift(run: Path, descriptor: Path, coded: Coded, seed: int) -> dict[str, Any]:
    """Codes the items of a descriptor that the run does not know, and compares them with those it held out.

    A run that held out too few is compared as a whole.

    Raises:
        TesseraError: there are too few of them.
    """
    from features.content.registry import load_encoder
    from features.dataset import load_dataset
    from features.table import read_items
    from models.semantic_id.codebook import load
    from models.semantic_id.drift import drift
    from models.semantic_id.health import held_out_items

    dataset = load_dataset(descriptor)
    items = read_items(dataset) if dataset.has_content else None
    if items is None:
        raise TesseraError(f"{descriptor}: --new needs [items] with text")
    texts = items.filter(~pl.col("item_id").is_in(coded.ids))["text"].fill_null("").to_list()
    vectors = load_encoder(run / "encode" / "encoder").encode(texts) if texts else coded.vectors[:0]
    book = load(run / "assign" / "codebook")
    unseen = coded.vectors[held_out_items(len(coded.ids), seed)]
    found = drift(book, unseen, vectors) or drift(book, coded.vectors, vectors)
    if found is None:
        raise TesseraError(f"{descriptor}: {counted(len(texts))} are new to {run}; drift shows in 20 and more")
    return asdict(found)


def hits_table(hits: list[dict[str, Any]]) -> Table:
    """A row for each group of items, a column for each depth."""
    table = Table(title="What users like next shares codes with their history", title_justify="left")
    table.add_column("items")
    table.add_column("events", justify="right")
    for depth in range(1, len(hits[0]["rate"]) + 1):
        table.add_column(f"1–{depth} (by chance)", justify="right")
    for one in hits:
        cells = [f"{own:.1%} ({chance:.1%})" for own, chance in zip(one["rate"], one["by_chance"], strict=True)]
        table.add_row(one["group"], f"{one['events']:,}", *cells)
    table.caption = "frequent: the fifth of the items with most training events; chance: other users' histories"
    return table


@ids.command()
def export(
    run: RunArgument,
    out: Annotated[Path, typer.Argument(help="A .parquet file: item_id, codes and, if asked, suffix.")],
    suffix: Annotated[bool, typer.Option("--suffix", help="Number the items that share a Semantic ID.")] = False,
    after: Annotated[
        Path | None, typer.Option(help="An earlier export with --suffix: its items keep their numbers.")
    ] = None,
) -> None:
    """Write the Semantic IDs of a run to a file, made unique by a suffix that an append does not change."""
    from features.jobs.shard import write_parquet
    from models.semantic_id.suffix import with_suffix

    if after is not None and not suffix:
        raise TesseraError("--after goes on numbering: give --suffix too")
    coded = load_coded(run)
    codes = pl.Series("codes", coded.codes, dtype=pl.Array(pl.UInt16, coded.codes.shape[1]))
    items = pl.DataFrame({"item_id": coded.ids}).with_columns(codes.cast(pl.List(pl.UInt16)))
    if suffix:
        items = with_suffix(items, _exported(after) if after else None)
        numbered = items.filter(pl.col("suffix") > 0).height
        err_console.print(f"{counted(numbered)} of {items.height:,} ({numbered / items.height:.1%}) need a suffix")
    write_parquet(items, out)


def _exported(path: Path) -> pl.DataFrame:
    try:
        return pl.read_parquet(path, columns=["item_id", "codes", "suffix"])
    except (OSError, pl.exceptions.PolarsError) as error:
        raise TesseraError(f"{path} is no export with item_id, codes and suffix: {error}") from error


def advise(health: dict[str, Any], quality: dict[str, Any], shape: tuple[int, int]) -> list[str]:
    """What to look at or to change, in sentences.

    Args:
        shape: levels and codes recommended for the catalogue's size.
    """
    levels, codes = shape
    found = []
    if health["codes"] > 2 * codes:
        found.append(
            f"{health['codes']:,} codes a level are many for {quality['items']:,} items: {levels} x {codes} "
            f"(--levels {levels} --codes {codes}) fill their codes more evenly"
        )
    for level, share in enumerate(health["perplexity"], 1):
        if share < 0.5:
            found.append(
                f"level {level} spreads as if over {share:.0%} of its {health['codes']:,} codes: choose fewer codes "
                f"(--codes {codes}), or balanced-kmeans"
            )
    found += [
        f"level {level} collapsed: it uses under half of the codes it could; refit with fewer codes"
        for level in health.get("collapsed") or ()
    ]
    if quality["sharing"] > 0.2 * quality["items"]:
        share = quality["sharing"] / quality["items"]
        found.append(f"{share:.0%} of the items share their Semantic ID: more levels or codes would tell them apart")
    found += (health.get("drift") or {}).get("flags", ())
    errors = health["error"]
    if not health.get("drift") and errors.get("held_out", 0) > 1.15 * errors.get("fitted", 1):
        found.append(
            f"items that were held out are coded worse ({errors['held_out']:.3f} of their spread is lost, "
            f"{errors['fitted']:.3f} of the others'): new items fit the codebook less well, refit when many came"
        )
    return found or ["nothing stands out"]


def depth_table(name: str, quality: dict[str, Any]) -> Table:
    """A row for each depth of a coding."""
    distinct, crowd = f"{quality['unique']:.1%} distinct IDs", f"largest group {quality['largest_group']:,}"
    title = f"{name}: {quality['items']:,} items, {distinct}, {crowd}"
    table = Table(title=title, title_justify="left")
    for column in ("depth", "used", "perplexity", "branching", "nodes", "node size", "shared", "purity"):
        table.add_column(column, justify="right")
    for one in quality["depths"]:
        low, middle, high = one["sizes"]
        purity = "–" if one["purity"] is None else f"{one['purity']:.3f}"
        table.add_row(
            f"1–{one['depth']}",
            f"{one['used']:,}",
            f"{one['perplexity']:.1f}",
            f"{one['branching']:.1f}",
            f"{one['nodes']:,}",
            f"{low:.0f}·{middle:.0f}·{high:.0f}",
            f"{one['shared']:.1%}",
            purity,
        )
    table.caption = f"purity: mean cosine of items that share the codes; of all pairs {quality['cosine']:.3f}"
    return table


def _published(path: Path, coded: Coded) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Codes of published IDs, each distinct token a number, and our vectors of the same items."""
    try:
        given = msgspec.json.decode(path.read_bytes())
        if isinstance(given, dict) and given.keys() == {str(row) for row in range(len(coded.ids))} != set(coded.ids):
            # Numbered from 0 where the items are not: their places in the catalogue.
            given = [given[str(row)] for row in range(len(coded.ids))]
        rows = list(given.items()) if isinstance(given, dict) else list(zip(coded.ids, given, strict=False))
        tokens = pl.DataFrame([list(map(str, tokens)) for _, tokens in rows], orient="row")
    except (msgspec.DecodeError, OSError, TypeError, ValueError, pl.exceptions.PolarsError) as error:
        raise TesseraError(f"{path}: expected JSON of item id → list of as many tokens each ({error})") from error
    place = {name: row for row, name in enumerate(coded.ids)}
    known = [(number, place[str(name)]) for number, (name, _) in enumerate(rows) if str(name) in place]
    if not known:
        raise TesseraError(f"{path}: none of its {len(rows):,} ids is an item of the run, such as {coded.ids[0]!r}")
    theirs, ours = np.array(known).T
    codes = np.stack([tokens[name].cast(pl.Categorical).to_physical().to_numpy() for name in tokens.columns], axis=1)
    return codes[theirs].astype(np.int64), coded.vectors[ours]
