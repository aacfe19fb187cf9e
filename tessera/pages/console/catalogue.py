"""Items and their Semantic IDs for the console: the tree to unfold, and the search for an item."""

from dataclasses import dataclass

import numpy as np
import polars as pl

from models.bundle.bundle import Bundle
from models.semantic_id.report.tree import Node, Tree

_TITLE = 90
_CHILDREN, _SAMPLES, _FOUND = 60, 8, 30


@dataclass(frozen=True)
class CodedItem:
    """Item as shown: id, title and code."""

    id: str
    title: str
    code: str


@dataclass(frozen=True)
class Branch:
    """Node of the tree on the page.

    Attributes:
        code: Path of the node, joined by dots.
        share: Share of its parent's items.
        children: Children of an unfolded node; `more` counts the rest.
        items: A few items of an unfolded node with no children, or with few items.
    """

    code: str
    size: int
    share: float
    words: str
    open: bool
    children: tuple["Branch", ...] = ()
    more: int = 0
    items: tuple[CodedItem, ...] = ()


class CodedItems:
    """Items of a bundle that have a Semantic ID.

    Args:
        bundle: Bundle with a codebook.
    """

    def __init__(self, bundle: Bundle) -> None:
        items = bundle.items.filter(pl.col("semantic_codes").is_not_null())
        self.bundle = bundle.id
        self._ids = items["item_id"].to_list()
        texts = items["text"].fill_null("") if "text" in items.columns else pl.Series([""] * items.height)
        self._texts = texts.to_list()
        self._folded = (items["item_id"] + " " + texts).str.to_lowercase()
        self._rows = {name: row for row, name in enumerate(self._ids)}
        self.codes = items["semantic_codes"].to_numpy().astype(np.int64).reshape(items.height, -1)
        self._tree = Tree(self.codes, self._texts)
        # The words of the first level read all texts: they are counted once, before the first request.
        self._first = {
            child.path: self._words(child, self._tree.root) for child in self._tree.children(self._tree.root)
        }

    def __len__(self) -> int:
        return len(self._ids)

    def item(self, name: str) -> CodedItem | None:
        """Returns an item by its id."""
        row = self._rows.get(name)
        return None if row is None else self._item(row)

    def name(self, item: str) -> CodedItem:
        """Returns an item by its id; an item without a Semantic ID gets its id alone."""
        return self.item(item) or CodedItem(item, "", "")

    def search(self, text: str) -> list[CodedItem]:
        """Finds items whose id or text contains a text, in any case; up to thirty, the exact id first."""
        found = (self._folded.str.contains(text.lower(), literal=True)).arg_true().head(_FOUND).to_list()
        exact = self._rows.get(text)
        rows = ([] if exact is None else [exact]) + [row for row in found if row != exact]
        return [self._item(row) for row in rows[:_FOUND]]

    def same_code(self, name: str) -> list[CodedItem]:
        """Returns a few other items with exactly an item's Semantic ID."""
        row = self._rows[name]
        rows = np.flatnonzero((self.codes == self.codes[row]).all(axis=1))
        return [self._item(int(other)) for other in rows[: _SAMPLES + 1] if other != row][:_SAMPLES]

    def branches(self, path: tuple[int, ...]) -> tuple[Branch, ...]:
        """Returns the first level, unfolded along a path as far as items have it."""
        return self._children(self._tree.root, path)[0]

    def _children(self, parent: Node, path: tuple[int, ...]) -> tuple[tuple[Branch, ...], int]:
        every = self._tree.children(parent)
        depth = len(parent.path)
        shown = every[:_CHILDREN]
        # The child on the path is shown even if others are larger.
        shown += [child for child in every[_CHILDREN:] if child.path == path[: depth + 1]]
        return tuple(self._branch(child, parent, path) for child in shown), len(every) - len(shown)

    def _branch(self, node: Node, parent: Node, path: tuple[int, ...]) -> Branch:
        unfolded = node.path == path[: len(node.path)]
        children, more = self._children(node, path) if unfolded else ((), 0)
        few = unfolded and (not children or node.size <= _SAMPLES)
        rows = self._tree.items(node)[:_SAMPLES] if few else ()
        words = self._first.get(node.path)
        return Branch(
            code=".".join(map(str, node.path)),
            size=node.size,
            share=node.size / max(parent.size, 1),
            words=self._words(node, parent) if words is None else words,
            open=unfolded,
            children=() if few else children,
            more=0 if few else more,
            items=tuple(self._item(int(row)) for row in rows),
        )

    def _words(self, node: Node, parent: Node) -> str:
        return ", ".join(self._tree.words(node, parent)) if node.size > 1 else self._title(self._tree.items(node)[0])

    def _item(self, row: int) -> CodedItem:
        return CodedItem(self._ids[row], self._title(row), ".".join(map(str, self.codes[row].tolist())))

    def _title(self, row: int) -> str:
        text = " ".join(self._texts[row].split())
        return text if len(text) <= _TITLE else text[: _TITLE - 1] + "…"
