"""Generated events that are hard for aggregates: popular keys, ties, late events, events at edges of windows.

Shape letters: E examples, U users, I items.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.aggregate.plan import AggregatePlan, Aggregation, with_base_rate
from features.frame import Frame

Ints = NDArray[np.int64]
HOUR_US = 3_600_000_000
BATCH = 256
"""Events of a micro-batch."""
FOUR = (
    Aggregation("item_clicks", ("item",), "positive", windows=("1h", "1d", "7d", "all")),
    Aggregation("item_rate", ("item",), "rate", windows=("1d", "all")),
    Aggregation("user_genre", ("user", "item.genres"), "rate", windows=("all",)),
    Aggregation("user_mood", ("user",), "rate", half_lives=("1h", "7d"), prior=5.0),
)
_BASE_RATE = 0.3
PLAN = with_base_rate(AggregatePlan((*FOUR, Aggregation("user_last", ("user",), "recency"))), _BASE_RATE)
_ZIPF, _DAYS, _GENRES = 1.2, 30, 18
_BEFORE_TEST = 0.9
_TIED, _LATE, _EDGE, _NEGATIVE = 0.2, 0.05, 0.1, 0.1


@dataclass(frozen=True)
class Generated:
    """Examples in order of arrival.

    Attributes:
        user, item, time, label: (E,) int64; times in microseconds.
        event: (E,) number of the event; a drawn negative has the number of the event before it.
        genres: Numbers of the genres of each item (I), 0 to 3 of them.
    """

    user: Ints
    item: Ints
    time: Ints
    label: Ints
    event: Ints
    genres: list[list[int]]

    @property
    def enters(self) -> NDArray[np.bool_]:
        """(E,) False for a drawn negative, which never counts."""
        return np.concatenate([[True], self.event[1:] != self.event[:-1]])

    def take(self, index: Ints) -> "Generated":
        """Returns the examples at `index`, in that order."""
        return Generated(
            self.user[index], self.item[index], self.time[index], self.label[index], self.event[index], self.genres
        )

    def frame(self) -> Frame:
        """Returns the examples as the frame of a dataset that is split by time."""
        examples = pl.DataFrame(
            {
                "event": self.event,
                "user": self.user.astype(np.uint32),
                "item": self.item.astype(np.uint32),
                "time": self.time,
                "label": self.label.astype(np.int8),
            }
        )
        is_test = pl.col("time") > np.quantile(self.time, _BEFORE_TEST)
        examples = examples.with_columns(split=pl.when(is_test).then(pl.lit("test")).otherwise(pl.lit("train")))
        users = pl.DataFrame({"user_id": [f"u{number}" for number in range(int(self.user.max()) + 1)]})
        genres = [[f"g{number}" for number in of] for of in self.genres]
        items = pl.DataFrame(
            {"item_id": [f"i{number}" for number in range(len(genres))], "genres": genres},
            schema_overrides={"genres": pl.List(pl.String)},
        )
        return Frame(users, items, examples)


def generate(events: int, *, seed: int = 0) -> Generated:
    """Generates examples of a month in order of arrival; a twentieth of them is up to six hours late.

    A fifth has the time of the example before it, and a tenth lies a whole number of hours after an earlier example of
    its item, so at the edge of a tile or a window. A tenth are drawn negatives.
    """
    rng = np.random.default_rng(seed)
    users, items = max(events // 20, 10), max(events // 200, 10)
    user, item = (rng.zipf(_ZIPF, events) % size for size in (users, items))
    span = _DAYS * 24 * HOUR_US
    time = np.sort(rng.integers(0, span // 1_000_000, events)) * 1_000_000
    at_edge = np.flatnonzero(rng.random(events) < _EDGE)
    earlier = (rng.random(len(at_edge)) * at_edge).astype(np.int64)
    item[at_edge] = item[earlier]
    hours = rng.choice([1, 24, 25, 168, 175], len(at_edge))
    time[at_edge] = np.minimum(time[earlier] + hours * HOUR_US, span)
    order = np.argsort(time, kind="stable")
    user, item, time = user[order], item[order], time[order]
    place = np.arange(events)
    time = time[np.maximum.accumulate(np.where(rng.random(events) < _TIED, 0, place))]
    event = np.maximum.accumulate(np.where(rng.random(events) < _NEGATIVE, 0, place))
    late = np.where(rng.random(events) < _LATE, rng.integers(0, 6 * HOUR_US, events), 0)
    genres = [rng.choice(_GENRES, rng.integers(0, 4), replace=False).tolist() for _ in range(items)]
    label = np.where(event == place, rng.random(events) < _BASE_RATE, 0).astype(np.int64)
    return Generated(user[event], item, (time - late)[event], label, event, genres)


def in_batches(generated: Generated) -> Generated:
    """Returns the examples in the order in which the step counts them: by time within each micro-batch."""
    batch = np.arange(len(generated.time)) // BATCH
    return generated.take(np.lexsort((generated.time, batch)))


def in_order(generated: Generated) -> Generated:
    """Returns the examples in order of time, as a frame counts them."""
    return generated.take(np.argsort(generated.time, kind="stable"))
