"""The page of `tessera ids report`: a coding's figures, and the tree of Semantic IDs to unfold, without a script."""

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.semantic_id.report.tree import Node, Tree
from tessera.pages import markup
from tessera.pages import svg as plot

if TYPE_CHECKING:
    from tessera.pages.coded_items import Coded

# Most nodes of a page: a page of a million items would open in no browser.
_NODES = 4_000
_CHILDREN = 64
_SAMPLES = 3


def write_page(path: Path, coded: "Coded", document: dict[str, Any]) -> None:
    """Writes the page.

    Args:
        coded: Items with their codes.
        document: Output of `tessera ids report --json`.
    """
    ours = document["quality"]["ours"]
    about = (
        f"{ours['items']:,} items, {len(ours['depths'])} levels of {document['codebook']['codes']:,} codes, "
        f"{ours['unique']:.1%} distinct Semantic IDs; the most crowded ID has {ours['largest_group']:,} items."
    )
    body = [
        f"<h1>Semantic IDs</h1>\n{markup.caption(about)}",
        markup.section("Advice", f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in document['advice'])}</ul>"),
        *(_coding(name, quality) for name, quality in document["quality"].items()),
        *([_hits(document["hits"])] if document.get("hits") else []),
        _explorer(coded),
    ]
    markup.write_page(path, "Semantic IDs", "\n".join(body))


def _coding(name: str, quality: dict[str, Any]) -> str:
    depths = quality["depths"]
    groups = [
        (
            f"codes 1–{one['depth']}",
            [
                plot.Row(
                    "purity",
                    one["purity"],
                    "–" if one["purity"] is None else f"{one['purity']:.3f}",
                    strong=True,
                ),
                plot.Row("shared", one["shared"], f"{one['shared']:.1%}"),
            ],
        )
        for one in depths
    ]
    ticks = [(0.0, "0"), (0.5, "0.5"), (1.0, "1")]
    drawing = plot.rows(groups, describe=f"Purity and sharing by depth of {name}", low=0, high=1, ticks=ticks)
    caption = (
        f"Purity: mean cosine of the items that share the codes; of all pairs it is {quality['cosine']:.3f}. "
        "Shared: items whose codes so far another item has. In a good coding purity rises while sharing is still high."
    )
    rows = [
        [
            f"1–{one['depth']}",
            f"{one['perplexity']:.1f}",
            f"{one['branching']:.1f}",
            f"{one['nodes']:,}",
            " · ".join(f"{size:.0f}" for size in one["sizes"]),
        ]
        for one in depths
    ]
    columns = ["depth", ">perplexity", ">branching", ">nodes", ">node size"]
    heading = "This codebook" if name == "ours" else f"Published IDs: {name}"
    return markup.section(
        heading,
        markup.cards(
            markup.figure("Purity and sharing", drawing, caption), markup.card("By depth", markup.table(columns, rows))
        ),
    )


def _hits(hits: list[dict[str, Any]]) -> str:
    depths = range(1, len(hits[0]["rate"]) + 1)
    rows = [
        [
            one["group"],
            f"{one['events']:,}",
            *(f"{own:.1%} · {chance:.1%}" for own, chance in zip(one["rate"], one["by_chance"], strict=True)),
        ]
        for one in hits
    ]
    remark = (
        "Positive test events whose item shares its first codes with an item of the user's history, and, behind the "
        "dot, with another user's history. Frequent: the fifth of the items with most training events."
    )
    table = markup.table(["items", ">events", *(f">codes 1–{depth}" for depth in depths)], rows)
    return markup.section("From history to the next item", markup.caption(remark), markup.card("Hits by depth", table))


def _explorer(coded: "Coded") -> str:
    tree = Tree(coded.codes, coded.texts)
    room = [_NODES]
    inner = _children(tree, tree.root, coded, room)
    left = "" if room[0] > 0 else f" The page holds {_NODES:,} nodes, the largest first; `tessera ids show` has all."
    remark = f"Unfold code by code. The words distinguish a node from its siblings.{left}"
    return markup.section("The tree", markup.caption(remark), f'<div class="tree">{inner}</div>')


def _children(tree: Tree, parent: Node, coded: "Coded", room: list[int]) -> str:
    """Returns the nodes under one, while the page has room; the rest is counted."""
    children = tree.children(parent)
    parts = []
    for number, child in enumerate(children):
        if room[0] <= 0 or number == _CHILDREN:
            rest = sum(one.size for one in children[number:])
            parts.append(f'<p class="about">… and {len(children) - number:,} more nodes of {rest:,} items</p>')
            break
        room[0] -= 1
        parts.append(_node(tree, child, parent, coded, room))
    return "".join(parts)


def _node(tree: Tree, node: Node, parent: Node, coded: "Coded", room: list[int]) -> str:
    name = ".".join(map(str, node.path))
    words = ", ".join(tree.words(node, parent)) if node.size > 1 else ""
    samples = "".join(
        f"<li>{escape(coded.title(row))} <small>{escape(coded.ids[row])}</small></li>"
        for row in tree.items(node)[:_SAMPLES]
    )
    more = f"<li><small>… and {node.size - _SAMPLES:,} more</small></li>" if node.size > _SAMPLES else ""
    inner = _children(tree, node, coded, room) if node.size > 1 else ""
    label = f"<b>{name}</b> <small>{node.size:,}</small> {escape(words)}"
    return f"<details><summary>{label}</summary><ul>{samples}{more}</ul>{inner}</details>"
