"""Measures the encoders of two bundles on the same items, for the gates that name measures of the encoder.

Neighbours are searched in the space in which a bundle answers which items are alike: its view `similar`, or its base
space without that view. Texts are searched in the base space.
"""

from collections.abc import Collection

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.content.chain import SIMILAR
from features.content.given.encoder import given_in
from features.frame import Frame
from models.bundle.contents import BundleContents
from models.encoder.judging.items import judged_items
from models.encoder.judging.measures import LEAST_QUERIES, MEASURES
from models.encoder.judging.space_tasks import Scores, SpaceTasks
from models.encoder.judging.text_tasks import TextTasks
from models.ranker.loading import content_vectors
from models.registry.gate import EncoderMeasure
from models.registry.paired_test import mean_drop

_TEXTS = ("search", "passages")
_MOST_ITEMS = 4_096


def compare_encoders(
    champion: tuple[BundleContents, pl.DataFrame],
    challenger: tuple[BundleContents, pl.DataFrame],
    frame: Frame,
    names: Collection[str],
    *,
    seed: int = 0,
) -> dict[str, EncoderMeasure]:
    """Measures two encoders on at most 4,096 items of a frame.

    Args:
        champion, challenger: A bundle, and the frame's items with the content vectors of this bundle.
        frame: Frame of the challenger's run.
        names: Measures to return, of `MEASURES`.
        seed: Seed of the sample and of the queries.

    Returns:
        The measures by name. Without content, or from too few queries, a measure has no test.
    """
    wanted = [name for name in MEASURES if name in names]
    items = frame.items
    if not wanted or "text" not in items.columns:
        return {name: EncoderMeasure(None, None, None, 0) for name in wanted}
    filled = np.flatnonzero((items["text"].fill_null("") != "").to_numpy())
    if not len(filled):
        return {name: EncoderMeasure(None, None, None, 0) for name in wanted}
    rows = np.sort(np.random.default_rng([seed, 36]).permutation(filled)[:_MOST_ITEMS])
    texts = items["text"].gather(rows).fill_null("").to_list()
    spaces = SpaceTasks(judged_items(frame, items["item_id"].gather(rows).to_list(), texts), seed)
    reads = TextTasks(texts, seed) if set(wanted) & set(_TEXTS) else None
    first, second = (_scores(bundle, table[rows], spaces, reads) for bundle, table in (champion, challenger))
    return {name: _paired(first.get(name), second.get(name)) for name in wanted}


def _scores(
    bundle: BundleContents, items: pl.DataFrame, spaces: SpaceTasks, reads: TextTasks | None
) -> dict[str, Scores]:
    if bundle.encoder is None or "content_vector" not in items.columns:
        return {}
    vectors: NDArray[np.float32] = content_vectors(items)
    view = bundle.views.get(SIMILAR)
    found = spaces.scores(vectors if view is None else view.of(vectors))
    return found if reads is None or given_in(bundle.encoder) else found | reads.scores(bundle.encoder)


def _paired(champion: Scores | None, challenger: Scores | None) -> EncoderMeasure:
    means = [float(one.mean()) if one is not None and len(one) else None for one in (champion, challenger)]
    if champion is None or challenger is None or len(champion) < LEAST_QUERIES:
        return EncoderMeasure(means[0], means[1], None, 0 if champion is None else len(champion))
    return EncoderMeasure(means[0], means[1], mean_drop(champion, challenger), len(champion))
