"""Inputs of one ranking: the values and rows that the server read, for a log that proves what was served."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.bundle.request_features import SentValues
from models.bundle.scorer import Lookups
from streaming.log.protocol import Offsets


@dataclass(frozen=True)
class RankingInputs:
    """Inputs of one ranking, as references to arrays that nothing changes afterwards.

    A ranking makes these arrays anyway, so holding them costs no copy. They are encoded only for a sampled request.

    Attributes:
        user: Id of the user.
        names: (n,) ids of the candidates, in the order of the lookups.
        sent: Values of the request and of the candidates' fields.
        at: Time that the request asked for, microseconds since 1970. None if it asked for none.
        now_us: Time that expressions over the clock read, microseconds since 1970.
        history: (V,) numbers of the visited items, oldest first.
        item_ids: Ids of items by number. The list only grows.
        lookups: Rows of the features, numbers and content vectors of the candidates.
        vectors: (M, D) float32 vectors of `lookups.rows`.
        scores: (n,) float32 probabilities.
        position: First offset in each partition of the deltas' topic that the server may lack. The inputs hold all
            earlier deltas.
        source: `mirror` or `store`.
        storage: Format of the rows in the store.
        ranks: Rank of each retrieved candidate in the list of each source that found it, by source. Empty if the
            request gave the candidates.
        labelled: Ids of the user's labelled items, oldest first, and their labels; empty without a correction.
    """

    user: str
    names: Sequence[str]
    sent: SentValues
    at: int | None
    now_us: int
    history: NDArray[np.int64]
    item_ids: Sequence[str]
    lookups: Lookups
    vectors: NDArray[np.float32]
    scores: NDArray[np.float32]
    position: Offsets
    source: str
    storage: str
    ranks: Sequence[Mapping[str, int]] = ()
    labelled: tuple[Sequence[str], bytes] = ((), b"")
