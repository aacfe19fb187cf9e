"""Readers of the table's lookups, and the angles between those readers.

Shape letters: D dim, K readers, h units of the first layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.ranker.network import DensePart
from models.table.schema import Schema

Readers = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Angles:
    """Angles between readers, in degrees; 0 reads the same direction, 90 shares no direction.

    A reader is the (h, D) block A of a layer's weight that reads one lookup. With G = AᵀA

        angle = arccos √(tr(G_s G_t) / (‖G_s‖ ‖G_t‖)),   leakage = ‖A_s A_tᵀ‖ / (‖A_s‖ ‖A_t‖)   (Frobenius norms).

    tr(G_s G_t) = ‖A_s A_tᵀ‖²: both measure how much of a gradient that s writes to a row t reads back (part 3 of the
    paper's decomposition), and for vectors both are |cos|. Leakage of a matrix with itself is below 1, √(1/D) if it
    reads all directions alike; the angle is 0 there, and 90 where the directions read are disjoint.

    Attributes:
        degrees, leakage: (K, K); mean, smallest: over pairs of different readers, `pair` being the closest.
        start_mean: mean angle of a fresh network of this shape, seed 0.
    """

    readers: tuple[str, ...]
    degrees: list[list[float]]
    leakage: list[list[float]]
    mean: float | None
    smallest: float | None
    pair: tuple[str, str] | None
    start_mean: float | None


def readers(schema: Schema, network: DensePart, *, head: bool = False) -> dict[str, NDArray[np.float64]]:
    """Maps `feature#chunk` to its reader: (h, D) of the MLP's first layer, or (1, D) of the linear head's first order.

    Empty for a network of another kind without such a layer. Under attention, one reader reads all slots of the
    history, behind their weighted sum.
    """
    name = "network.head.weight" if head else "network.mlp._mlp.0._linear.weight"
    layer = network.state_dict().get(name)
    if layer is None:
        return {}
    weight = layer.numpy().astype(np.float64)
    plain = [feature for feature in schema.features if feature.pooling != "attention"]
    attended = [feature for feature in schema.features if feature.pooling == "attention"]
    found: dict[str, NDArray[np.float64]] = {}
    for feature in plain + attended:
        for chunk in range(feature.chunks):
            start = len(found) * schema.dim
            found[f"{feature.name}#{chunk}"] = weight[:, start : start + schema.dim]
    return found


def angles(read: Readers, start: Readers | None = None) -> Angles:
    """Returns the angles between readers (h, D), and their mean at the start."""
    degrees, leakage = _angles(list(read.values()))
    one, two = np.triu_indices(len(read), 1)
    pairs = degrees[one, two]
    names, closest = tuple(read), int(np.argmin(pairs)) if len(pairs) else None
    before = None if start is None or not len(pairs) else float(_angles(list(start.values()))[0][one, two].mean())
    return Angles(
        readers=names,
        degrees=degrees.tolist(),
        leakage=leakage.tolist(),
        mean=float(pairs.mean()) if len(pairs) else None,
        smallest=None if closest is None else float(pairs[closest]),
        pair=None if closest is None else (names[one[closest]], names[two[closest]]),
        start_mean=before,
    )


def _angles(read: Sequence[NDArray[np.float64]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns (K, K) degrees and leakage; a reader of zeros is at 90 degrees to every other."""
    count = len(read)
    grams = np.stack([one.T @ one for one in read]).reshape(count, -1) if read else np.zeros((0, 1))
    energy = np.array([float((one**2).sum()) for one in read])
    overlap = np.maximum(grams @ grams.T, 0)  # ‖A_s A_tᵀ‖²
    size = np.maximum(np.linalg.norm(grams, axis=1), 1e-300)
    cosine = np.sqrt(np.clip(overlap / size[:, None] / size[None, :], 0, 1))
    degrees = np.degrees(np.arccos(cosine))
    np.fill_diagonal(degrees, 0.0)
    energy = np.maximum(energy, 1e-300)
    return degrees, np.sqrt(overlap / energy[:, None] / energy[None, :])
