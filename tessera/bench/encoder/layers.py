"""Rows of a transformer's layers: the top layers tuned, latent attention, and a ladder of exits and widths.

The ladder is trained once for all exits. Its controls are the frozen layers, a fit for each exit alone, and permuted
pairs. At each exit, fewer dimensions come from a rotation, beside the plain prefix.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.content.chain import apply_steps
from features.content.encoder import unit
from features.content.sentence import open_model
from models.encoder.axes import smaller
from models.encoder.pairs import Task
from models.encoder.tuning.layer_fit import tune_layers
from models.encoder.tuning.layers import LayerOptions, TokenStates, TopLayers, kept_states
from models.encoder.upgrade import TASK, OldSpace, UpgradeSample, candidates
from tessera.bench.encoder.learning import BASE, PERMUTED, TUNED, row_of
from tessera.bench.encoder.shop import TOKENS, TRANSFORMER, Shop, transformer_directory

LATENT, FROZEN, ALONE, LADDER = "latent attention", "frozen", "exit alone", "ladder"
LADDER_PERMUTED = "ladder, permuted pairs"
MAPPED = "tuned, in the frozen index"
ROTATED, PREFIX = "rotation", "prefix"
_TUNED_LAYERS = 2
_PAIRS = 1_000
WIDTHS = (384, 128, 32)
"""Widths of a ladder, the widest first."""


class _Layers:
    """Fits of one shop on the states below the tuned layers."""

    def __init__(self, shop: Shop, layers: int = _TUNED_LAYERS) -> None:
        self.shop, self.layers = shop, layers
        self.model: Any = open_model(str(transformer_directory()))
        directory = shop.out / f"states-{layers}"
        options = LayerOptions(layers=layers, tokens=TOKENS, pool="mean" if layers else "latent")
        self.read: TokenStates = kept_states(self.model, TRANSFORMER, shop.texts, directory, options)

    def options(self, **choices: Any) -> LayerOptions:
        """Returns the options of a fit."""
        return LayerOptions(layers=self.layers, tokens=TOKENS, seed=self.shop.seed, **choices)

    def fit(self, task: Task, name: str, **choices: Any) -> tuple[dict[int, NDArray[np.float32]], int]:
        """Returns the vectors at each exit after a fit, and the rounds of the fit; a stopped fit goes on."""
        state = self.shop.out / f"{name}-{self.shop.seed}.state"
        tuned, recalls = tune_layers(self.model, self.read, [task], self.options(**choices), checkpoint=state)
        state.unlink(missing_ok=True)
        return tuned.encode(self.read), int(np.argmax(recalls))


def top_layers(shop: Shop) -> list[dict[str, Any]]:
    """Returns rows of a frozen transformer, of its top two layers tuned, and of the control.

    The tuned vectors of new items are also searched in the index of frozen vectors, by each kind of map.
    """
    frozen = shop.vectors(TRANSFORMER)
    rows = [row_of(shop, TRANSFORMER, BASE, frozen, pairs=0, rounds=0)]
    task, two = shop.task(frozen), _Layers(shop)
    for variant, own in ((TUNED, task), (PERMUTED, task.permuted(shop.seed))):
        found, rounds = two.fit(own, f"layers-{variant}")
        vectors = found.popitem()[1]
        rows.append(row_of(shop, TRANSFORMER, variant, vectors, pairs=own.pairs, rounds=rounds))
        if variant == TUNED:
            rows += _mapped(shop, frozen, vectors)
    return rows


def _mapped(shop: Shop, old: NDArray[np.float32], tuned: NDArray[np.float32]) -> list[dict[str, Any]]:
    """Returns a row of each map of tuned vectors into the frozen index: recall of new items there."""
    index = OldSpace(TRANSFORMER, old, ~shop.new, None, shop.gold)
    known, new = np.flatnonzero(~shop.new & old.any(axis=1)), np.flatnonzero(shop.new)
    order = np.random.default_rng([shop.seed, 5]).permutation(known)
    count = min(_PAIRS, 2 * len(order) // 3)
    if count < old.shape[1]:
        # A map needs as many pairs as dimensions.
        return []
    sample = UpgradeSample(TUNED, order[:count], order[count:], new, tuned)
    return [
        {
            "seed": shop.seed,
            "base": TRANSFORMER,
            "variant": f"{MAPPED}, {found.map.kind}",
            "recall@50": found.fidelity["recall"],
            "of_old": found.fidelity[TASK],
        }
        for found in candidates(index, sample, seed=shop.seed)
    ]


def ladder(shop: Shop) -> list[dict[str, Any]]:
    """Returns rows of each exit and width of one fit, beside frozen layers, fits of one exit each, and the control.

    Latent attention on the frozen top layer has rows too.
    """
    two, task = _Layers(shop), shop.task(shop.vectors(TRANSFORMER))
    total = TopLayers(two.model, two.options()).total
    exits = (total - 1, total)
    frozen = TopLayers(two.model, two.options(exits=exits)).encode(two.read)
    alone = {one: two.fit(task, f"alone-{one}", exits=(one,))[0][one] for one in exits}
    trained, _ = two.fit(task, "ladder", exits=exits)
    control, _ = two.fit(task.permuted(shop.seed), "ladder-permuted", exits=exits)
    latent, _ = _Layers(shop, 0).fit(task, "latent", pool="latent", rate=1e-3)
    spaces = {FROZEN: frozen, ALONE: alone, LADDER: trained, LADDER_PERMUTED: control, LATENT: latent}
    return [
        {
            "seed": shop.seed,
            "base": TRANSFORMER,
            "variant": name,
            "layer": one,
            "layers_below_top": total - one,
            "dims": width,
            "by": way,
            "recall@50": shop.recall(_narrow(vectors[one], width, way)),
        }
        for name, vectors in spaces.items()
        for one in vectors
        for width in WIDTHS
        for way in (ROTATED, PREFIX)
        if width < vectors[one].shape[1] or way == ROTATED
    ]


def _narrow(vectors: NDArray[np.float32], width: int, way: str) -> NDArray[np.float32]:
    if width >= vectors.shape[1]:
        return vectors
    return unit(vectors[:, :width]) if way == PREFIX else apply_steps(smaller(vectors, width), vectors)
