"""Fits a map between two spaces from pairs: vectors of the same items by two encoders.

Four kinds, from the fewest numbers to the most:

- shift: adds the difference of the means. "Query drift compensation" (2025).
- procrustes: rotates around the means. The narrower side is padded with zeros.
  Schönemann, "A generalized solution of the orthogonal Procrustes problem" (1966).
- ridge: any linear function around the means; held-out pairs choose the penalty.
- mlp: one hidden layer that starts as the ridge map; held-out pairs choose the epoch.

Shape letters: P pairs, D source dim, E target dim, H hidden units.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from features.content.encoder import unit
from features.content.space_map import SpaceMap, identity_map
from features.content.step import Affine, Floats, Mlp, Shift, VectorStep
from features.errors import DatasetError
from features.threads import one_thread

FittedKind = Literal["shift", "procrustes", "ridge", "mlp"]
KINDS: tuple[FittedKind, ...] = get_args(FittedKind)
"""Kinds of maps that are fitted, from the fewest numbers to the most."""

_HELD_OUT = 0.1
_PENALTIES = 10.0 ** np.arange(-8, 2)
"""Ridge penalties, as shares of the mean variance of a source dimension."""
_EPOCHS, _BATCH, _RATE = 60, 128, 1e-3


@dataclass(frozen=True)
class Pairs:
    """Vectors of the same items in two spaces.

    Attributes:
        source: Id of the space to map from.
        target: Id of the space to map to.
        before: (P, D) float32 unit vectors in the source.
        after: (P, E) float32 unit vectors in the target, row for row.
    """

    source: str
    target: str
    before: NDArray[np.float32]
    after: NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.before.ndim != 2 or self.after.ndim != 2 or len(self.before) != len(self.after):
            raise DatasetError(
                f"pairs: expected (P, D) and (P, E) vectors of the same items, got {self.before.shape} and "
                f"{self.after.shape}"
            )
        for space, vectors in ((self.source, self.before), (self.target, self.after)):
            if not np.isfinite(vectors).all():
                raise DatasetError(f"pairs: the vectors of {space} hold a value that is not finite; encode them again")

    def __len__(self) -> int:
        return len(self.before)

    def rows(self, rows: NDArray[np.int64]) -> "Pairs":
        """Returns some pairs, by their row numbers."""
        return Pairs(self.source, self.target, self.before[rows], self.after[rows])

    def without_empty(self) -> "Pairs":
        """Returns the pairs without a zero row on either side: such a text says nothing about the map."""
        return self.rows(np.flatnonzero(self.before.any(axis=1) & self.after.any(axis=1)))


def pairs_of_items(items: Sequence[str], source: tuple[str, pl.DataFrame], target: tuple[str, pl.DataFrame]) -> Pairs:
    """Returns the pairs of items.

    Args:
        items: Item ids.
        source: Id of the space to map from, and a frame with `item_id` and `vector`.
        target: Id and frame of the space to map to.

    Raises:
        DatasetError: An item has no vector in one of the spaces; names the item.
    """
    sides = []
    for space, frame in (source, target):
        found = pl.DataFrame({"item_id": items}, schema={"item_id": pl.String}).join(
            frame.select("item_id", "vector"), on="item_id", how="left", maintain_order="left"
        )
        missing = found.filter(pl.col("vector").is_null())
        if missing.height:
            raise DatasetError(
                f"pairs: {missing.height} of {len(items)} items have no vector of {space}, "
                f"e.g. {missing['item_id'][0]!r}; name items of the catalogue"
            )
        sides.append(found["vector"].to_numpy().astype(np.float32))
    return Pairs(source[0], target[0], *sides)


def fit_map(kind: FittedKind, pairs: Pairs, *, seed: int = 0) -> SpaceMap:
    """Fits one map. Its `fidelity["cosine"]` is the mean cosine to the target on pairs that the fit did not see.

    Args:
        kind: One of `KINDS`.
        pairs: Pairs; a pair with a zero row is not used. If both spaces have the same id, the map is the identity.
        seed: Decides the held-out pairs and the order of the batches.

    Raises:
        DatasetError: The kind is unknown, the pairs are fewer than the dimensions, or a shift is asked for between
            spaces of different width.
    """
    if kind not in KINDS:
        raise DatasetError(f"map {kind!r} is unknown; choose one of: {', '.join(KINDS)}")
    if pairs.source == pairs.target:
        return identity_map(pairs.source)
    used = pairs.without_empty()
    refuse_few(kind, len(used), used.before.shape[1], used.after.shape[1])
    order = np.random.default_rng([seed, 11]).permutation(len(used))
    held = max(1, round(_HELD_OUT * len(used)))
    judged, fitted = used.rows(np.sort(order[:held])), used.rows(np.sort(order[held:]))
    with one_thread():
        step = _FITS[kind](fitted, judged, seed)
        cosine = np.einsum("pe,pe->p", unit(step(judged.before)), judged.after).mean()
    return SpaceMap(pairs.source, pairs.target, kind, len(used), (step,), {"cosine": float(cosine)})


def refuse_few(kind: str, pairs: int, width: int, target: int) -> None:
    """Refuses pairs that cannot decide a map.

    Raises:
        DatasetError: The pairs are fewer than the dimensions, or a shift is asked for between different widths.
    """
    if kind == "shift":
        if width != target:
            raise DatasetError(
                f"map shift: needs spaces of the same width, got {width} and {target}; choose another map"
            )
        needed = 2
    else:
        needed = max(width, target)
    if pairs < needed:
        raise DatasetError(
            f"map {kind}: {pairs} pairs are fewer than {needed}, the dimensions of the wider space; "
            f"sample {needed} items at least, and better {4 * needed}"
        )


def _shift(fitted: Pairs, judged: Pairs, seed: int) -> VectorStep:
    return Shift(offset=_mean(fitted.after) - _mean(fitted.before))


def _procrustes(fitted: Pairs, judged: Pairs, seed: int) -> VectorStep:
    means, (before, after) = _centred(fitted)
    width = max(before.shape[1], after.shape[1])
    left, _, right = np.linalg.svd(_padded(before, width).T @ _padded(after, width))
    matrix = (left @ right)[: before.shape[1], : after.shape[1]]
    return Affine(matrix=matrix, source=means[0], target=means[1])


def _ridge(fitted: Pairs, judged: Pairs, seed: int) -> VectorStep:
    means, (before, after) = _centred(fitted)
    values, axes = np.linalg.eigh(before.T @ before)
    turned = axes.T @ (before.T @ after)
    scale = float(values.mean())
    source, target = judged.before - means[0], judged.after - means[1]
    best, found = np.inf, np.zeros((before.shape[1], after.shape[1]))
    for penalty in _PENALTIES:
        matrix = axes @ (turned / (np.maximum(values, 0.0) + penalty * scale)[:, None])
        error = float(np.square(source @ matrix - target).mean())
        if error < best:
            best, found = error, matrix
    return Affine(matrix=found, source=means[0], target=means[1])


def _mlp(fitted: Pairs, judged: Pairs, seed: int) -> VectorStep:
    start = _ridge(fitted, judged, seed).tensors
    # relu(x) - relu(-x) = x, so the first epoch starts from the ridge map: H = 2 E.
    first = np.concatenate([start["matrix"], -start["matrix"]], axis=1)
    bias = -start["source"] @ first
    eye = np.eye(start["matrix"].shape[1], dtype=np.float32)
    second = np.concatenate([eye, -eye])
    weights = [torch.tensor(one).requires_grad_() for one in (first, bias, second, start["target"])]

    def mapped(rows: torch.Tensor) -> torch.Tensor:
        return torch.relu(rows @ weights[0] + weights[1]) @ weights[2] + weights[3]

    optimizer = torch.optim.Adam(weights, lr=_RATE)
    before, after = torch.from_numpy(fitted.before), torch.from_numpy(fitted.after)
    held, wanted = torch.from_numpy(judged.before), torch.from_numpy(judged.after)
    order = torch.Generator().manual_seed(seed)
    best, kept = float("inf"), [one.detach().clone() for one in weights]
    for _ in range(_EPOCHS):
        with torch.no_grad():
            error = float(torch.nn.functional.mse_loss(mapped(held), wanted))
        if error < best:
            best, kept = error, [one.detach().clone() for one in weights]
        for batch in torch.randperm(len(before), generator=order).split(_BATCH):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(mapped(before[batch]), after[batch]).backward()
            optimizer.step()
    return Mlp(**dict(zip(Mlp.names, (one.numpy() for one in kept), strict=True)))


_FITS: dict[FittedKind, Callable[[Pairs, Pairs, int], VectorStep]] = {
    "shift": _shift,
    "procrustes": _procrustes,
    "ridge": _ridge,
    "mlp": _mlp,
}


def _mean(vectors: NDArray[np.float32]) -> Floats:
    mean: Floats = vectors.mean(axis=0, dtype=np.float64)
    return mean


def _centred(pairs: Pairs) -> tuple[tuple[Floats, Floats], tuple[Floats, Floats]]:
    """Returns the means of both sides, and both sides less their means."""
    means = _mean(pairs.before), _mean(pairs.after)
    return means, (pairs.before - means[0], pairs.after - means[1])


def _padded(vectors: Floats, width: int) -> Floats:
    return np.pad(vectors, ((0, 0), (0, width - vectors.shape[1])))
