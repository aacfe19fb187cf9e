"""Chooses the map with which a new encoder serves an old index and an old codebook.

Every kind of map is fitted on sampled items and judged on items that no fit saw, by two measures that may disagree:
the Semantic IDs that stay, and the task, recall of co-liked items in the old index. A map that restores the old space
keeps the Semantic IDs, and restores the old space's faults too. The aim decides.

Shape letters: N items, D dim of the old space, E dim of the new space, h held-out items, Q levels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from features.content.space_map import Aim, SpaceMap
from features.errors import DatasetError, TesseraError
from models.encoder.align import KINDS, Pairs, fit_map
from models.encoder.likes import Neighbours
from models.encoder.measure import recall
from models.semantic_id.codebook.quantizer import Quantizer

FIRST, WHOLE, TASK = "first_codes", "whole_ids", "task"
"""Names of measures: share of first codes kept, share of whole Semantic IDs kept, task as a share of the old task."""
LEAST: Mapping[Aim, Mapping[str, float]] = {
    "codes": {WHOLE: 0.5},
    "gain": {TASK: 1.0},
    "both": {WHOLE: 0.5, TASK: 0.95},
}
"""Least fidelity for each aim."""


@dataclass(frozen=True)
class OldSpace:
    """The index and the codebook that an upgrade must keep.

    Attributes:
        id: Id of the old encoder.
        vectors: (N, D) float32 unit vectors of the catalogue.
        known: (N,) True if the index holds the item.
        codebook: Codebook of the vectors, or None.
        wanted: Items to find for items that ask, or None if the catalogue has no events.
    """

    id: str
    vectors: NDArray[np.float32]
    known: NDArray[np.bool_]
    codebook: Quantizer | None
    wanted: Neighbours | None

    def kept(self, rows: NDArray[np.int64], mapped: NDArray[np.float32]) -> dict[str, float]:
        """Returns the shares of first codes and of whole Semantic IDs that mapped vectors (h, D) of items keep."""
        if self.codebook is None:
            return {}
        same = self.codebook.encode(mapped) == self.codebook.encode(self.vectors[rows])
        return {FIRST: float(same[:, 0].mean()), WHOLE: float(same.all(axis=1).mean())}

    def recall(self, rows: NDArray[np.int64], mapped: NDArray[np.float32]) -> float:
        """Returns the recall of wanted items for mapped vectors (h, D) of the items that ask."""
        if self.wanted is None:
            return 0.0
        asking = np.zeros_like(self.vectors)
        asking[rows] = mapped
        among = np.isin(self.wanted.of, rows)
        wanted = Neighbours(self.wanted.of[among], self.wanted.item[among], self.wanted.cosine[among])
        return recall(asking, wanted, self.known, index=self.vectors)


@dataclass(frozen=True)
class Candidate:
    """A map and its fidelity on items that the fit did not see.

    Attributes:
        map: The map; of kind `none` if the new vectors are used as they are.
        fidelity: Measures by name; see `FIRST`, `WHOLE`, `TASK`. `recall` is the task as it was measured.
    """

    map: SpaceMap
    fidelity: Mapping[str, float]


@dataclass(frozen=True)
class UpgradeSample:
    """Items of an upgrade, as rows of the catalogue, with their vectors in the new space.

    Attributes:
        space: Id of the new encoder.
        fitted: (P,) rows that the maps are fitted on.
        coded: (h,) rows whose Semantic IDs are compared.
        asking: (a,) rows that ask for co-liked items.
        vectors: (N, E) float32; the rows of other items are not read.
    """

    space: str
    fitted: NDArray[np.int64]
    coded: NDArray[np.int64]
    asking: NDArray[np.int64]
    vectors: NDArray[np.float32]


def candidates(
    old: OldSpace, sample: UpgradeSample, *, kinds: Sequence[str] = ("none", *KINDS), seed: int = 0
) -> list[Candidate]:
    """Fits and judges each kind of map that the two widths allow.

    Args:
        old: The space to map into.
        sample: Items, and the space to map from.
        kinds: Kinds to try. `none` uses the new vectors as they are, if both spaces have the same width.
        seed: Seed of the fits.

    Raises:
        DatasetError: The sample has fewer items than the dimensions of the wider space.
    """
    pairs = Pairs(sample.space, old.id, sample.vectors[sample.fitted], old.vectors[sample.fitted])
    width, target = pairs.before.shape[1], pairs.after.shape[1]
    before = old.recall(sample.asking, old.vectors[sample.asking])
    found = []
    for kind in kinds:
        if width != target and kind in ("none", "shift"):
            continue
        fitted = (
            SpaceMap(sample.space, old.id, "none", 0) if kind == "none" else fit_map(kind, pairs, seed=seed)  # type: ignore[arg-type]
        )
        fidelity = dict(fitted.fidelity) | old.kept(
            sample.coded, fitted.of(sample.vectors[sample.coded], space=sample.space)
        )
        if before:
            after = old.recall(sample.asking, fitted.of(sample.vectors[sample.asking], space=sample.space))
            fidelity |= {"recall": after, TASK: after / before}
        found.append(Candidate(fitted, fidelity))
    return found


def best(judged: Sequence[Candidate], aim: Aim) -> Candidate:
    """Returns the candidate that serves the aim best; its map carries the aim and the fidelity.

    Raises:
        DatasetError: The run has not measured what the aim needs.
    """
    needed = tuple(LEAST[aim])
    for name in needed:
        if not all(name in candidate.fidelity for candidate in judged):
            lacks = "a codebook" if name == WHOLE else "co-liked items among the held-out items"
            raise DatasetError(f"--keep {aim} needs {lacks}, and the run has none; choose another aim")
    # The first of equal candidates has the fewest numbers.
    chosen = max(judged, key=lambda candidate: sum(candidate.fidelity[name] for name in needed))
    return replace(chosen, map=replace(chosen.map, aim=aim, fidelity=dict(chosen.fidelity)))


def refuse_below(chosen: Candidate, least: Mapping[str, float]) -> None:
    """Refuses a map that keeps too little.

    Raises:
        TesseraError: A measure is below its least value; names the measure, both values and the remedy.
    """
    for name, value in least.items():
        reached = chosen.fidelity.get(name, 0.0)
        if reached < value:
            raise TesseraError(
                f"the best map ({chosen.map.kind}) reaches {name.replace('_', ' ')} {reached:.3f}, expected {value:g} "
                "or more; sample more items, choose another aim, or re-embed the catalogue"
            )
