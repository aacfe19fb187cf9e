"""The tree of Semantic IDs: a node for each prefix, its items, and the words that distinguish it from its siblings.

Shape letters: N items, Q levels, W words.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import scipy
from numpy.typing import NDArray

_WORDS = 6
_MOST_WORDS = 20_000
_PRIOR = 0.01
_WORD = r"\b[^\W\d_]{2,}\b"


@dataclass(frozen=True)
class Node:
    """Node of the tree: a prefix.

    Attributes:
        path: Codes of the prefix.
        start, stop: Range of the node's items in `Tree.order`.
    """

    path: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class Tree:
    """Tree over codes (N, Q), found by sorting: the items of a node are contiguous.

    Args:
        codes: (N, Q).
        texts: N texts of the same items.
    """

    def __init__(self, codes: NDArray[np.integer], texts: Sequence[str]) -> None:
        self.codes = np.asarray(codes)
        self.order: NDArray[np.int64] = np.lexsort(self.codes.T[::-1]).astype(np.int64)
        self._sorted = self.codes[self.order]
        counted, self._words = _counted(texts)
        self._counts = counted[self.order]
        self._sums: dict[tuple[int, int], NDArray[np.float64]] = {}

    @property
    def root(self) -> Node:
        return Node((), 0, len(self.order))

    def items(self, node: Node) -> NDArray[np.int64]:
        """Returns the numbers of the node's items."""
        return self.order[node.start : node.stop]

    def children(self, node: Node) -> list[Node]:
        """Returns the nodes one code deeper, the largest first."""
        depth = len(node.path)
        if depth == self.codes.shape[1]:
            return []
        column = self._sorted[node.start : node.stop, depth]
        edges = np.concatenate([[0], np.flatnonzero(np.diff(column)) + 1, [len(column)]])
        found = [
            Node((*node.path, int(column[a])), node.start + int(a), node.start + int(b))
            for a, b in itertools.pairwise(edges)
        ]
        return sorted(found, key=lambda child: (-child.size, child.path))

    def find(self, path: Sequence[int]) -> Node:
        """Returns the node of a prefix that some item has."""
        node = self.root
        for code in path:
            node = next(child for child in self.children(node) if child.path[-1] == code)
        return node

    def words(self, node: Node, siblings_of: Node) -> list[str]:
        """Returns the words of a node's texts that the parent's other texts lack, the most distinctive first.

        Log odds with a Dirichlet prior of the parent's words, over their deviation (Monroe et al., 2008, eq. 22), on
        the number of texts that hold a word.
        """
        if not len(self._words) or node.size == siblings_of.size:
            return []
        own = np.asarray(self._counts[node.start : node.stop].sum(axis=0)).ravel().astype(np.float64)
        every = self._sum(siblings_of)
        rest = every - own
        prior = _PRIOR * every + 1e-9
        own_total, rest_total, prior_total = own.sum(), rest.sum(), prior.sum()
        log_odds = np.log((own + prior) / (own_total + prior_total - own - prior)) - np.log(
            (rest + prior) / (rest_total + prior_total - rest - prior)
        )
        score = log_odds / np.sqrt(1 / (own + prior) + 1 / (rest + prior))
        best = np.argsort(-score, kind="stable")[:_WORDS]
        return [str(self._words[word]) for word in best if score[word] > 0 and own[word] > 0]

    def _sum(self, node: Node) -> NDArray[np.float64]:
        """Counts texts by word under a node; the counts are kept for the next of its children."""
        place = (node.start, node.stop)
        if place not in self._sums:
            self._sums = {
                place: np.asarray(self._counts[node.start : node.stop].sum(axis=0)).ravel().astype(np.float64)
            }
        return self._sums[place]


def _counted(texts: Sequence[str]) -> tuple[scipy.sparse.csr_array, list[str]]:
    """Returns which text (N,) holds which of the W most frequent words, (N, W), and the words."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    held = (
        pl.DataFrame({"row": np.arange(len(texts)), "word": pl.Series(list(texts), dtype=pl.String)})
        .with_columns(pl.col("word").str.to_lowercase().str.extract_all(_WORD))
        .explode("word")
        .drop_nulls()
        .filter(~pl.col("word").is_in(list(ENGLISH_STOP_WORDS)))
        .unique()
    )
    words = held.group_by("word").len().sort("len", "word", descending=[True, False])["word"].head(_MOST_WORDS)
    numbered = held.join(pl.DataFrame({"word": words}).with_row_index("number"), on="word")
    places = (numbered["row"].to_numpy(), numbered["number"].to_numpy())
    return scipy.sparse.csr_array((np.ones(numbered.height), places), shape=(len(texts), len(words))), words.to_list()
