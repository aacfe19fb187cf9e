"""Users' positive events in order, and the windows of them that training reads.

A window is up to L + 1 events of one user, one after the other: each but the last is a visit that the user tower reads,
each but the first is what the state before it predicts. Windows of a user overlap by one event, so that each event
after a user's first is predicted once.

Shape letters: U users, n events, B windows, L visits.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.dataset.split import PARTS
from features.frame import Frame
from models.table.column_rows import gather

TRAIN, VALIDATION, TEST = range(len(PARTS))


class VisitWindow(NamedTuple):
    """B windows, padded to L, the visits of the longest.

    Attributes:
        items: (B, L + 1) item numbers, 0 in slots behind the last event.
        times: (B, L + 1) their times.
        lengths: (B,) number of visits, one less than the window's events.
        users: (B,) user numbers.
        parts: (B, L + 1) part of each event, -1 behind the last.
    """

    items: NDArray[np.int64]
    times: NDArray[np.int64]
    lengths: NDArray[np.int64]
    users: NDArray[np.int64]
    parts: NDArray[np.int64]


@dataclass(frozen=True)
class Sequences:
    """Positive events of all users: those of user u are `[offsets[u]:offsets[u + 1]]`, oldest first.

    Attributes:
        items, times: (n,) of each event.
        parts: (n,) `TRAIN`, `VALIDATION` or `TEST`.
        offsets: (U + 1,).
    """

    items: NDArray[np.int64]
    times: NDArray[np.int64]
    parts: NDArray[np.int64]
    offsets: NDArray[np.int64]

    @property
    def users(self) -> NDArray[np.int64]:
        """User (n,) of each event."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def windows(self, length: int) -> NDArray[np.int64]:
        """Returns first event and end (M, 2) of the windows that have something to predict in training."""
        starts, ends = self.offsets[:-1], self._train_ends()
        counts = np.maximum(0, -(-(ends - starts - 1) // length))
        users = np.repeat(np.arange(len(counts)), counts)
        # The newest window is full, the oldest has the rest.
        number = np.arange(len(users)) - np.repeat(np.cumsum(counts) - counts, counts)
        last = ends[users] - number * length
        return np.stack([np.maximum(starts[users], last - length - 1), last], axis=1)

    def read(self, windows: NDArray[np.int64], length: int) -> VisitWindow:
        """Reads windows (B, 2) of at most `length` visits."""
        first, last = windows[:, :1], windows[:, 1:]
        lengths = windows[:, 1] - windows[:, 0] - 1
        place = first + np.arange(min(length, int(lengths.max())) + 1)
        held = place < last
        place = np.where(held, place, 0)
        users = np.searchsorted(self.offsets, windows[:, 0], side="right") - 1
        return VisitWindow(
            np.where(held, self.items[place], 0),
            np.where(held, self.times[place], 0),
            lengths,
            users,
            np.where(held, self.parts[place], -1),
        )

    def first_of(self, part: int, *, lag: int = 0) -> NDArray[np.int64]:
        """Returns one row (M, 3) for each user who had a visible visit before the user's first event of a part.

        The columns are the event, the user's first event, and the end of the visits that are known at its time. They
        are those that arrived before it, and with a lag those whose time is before its time less the lag.
        """
        events = np.flatnonzero(self.parts == part)
        users = np.searchsorted(self.offsets, events, side="right") - 1
        users, first = np.unique(users, return_index=True)
        events, starts = events[first], self.offsets[users]
        ends = events
        if lag:
            held = gather(starts, events - starts)
            known = self.times[held] < np.repeat(self.times[events], events - starts) - lag
            before = np.concatenate([[0], np.cumsum(known)])
            stops = np.cumsum(events - starts)
            ends = starts + before[stops] - before[stops - (events - starts)]
        kept = ends > starts
        return np.stack([events, starts, ends], axis=1)[kept]

    def _train_ends(self) -> NDArray[np.int64]:
        """Returns (U,) the place behind each user's last event of the training part."""
        ends = self.offsets[:-1].copy()
        train = np.flatnonzero(self.parts == TRAIN)
        np.maximum.at(ends, self.users[train], train + 1)
        return ends


def sequences_of(frame: Frame) -> Sequences:
    """Reads the positive events of a frame, of all parts."""
    columns = ["event", "user", "item", "time", "label", "split"]
    positive = (pl.col("label") == 1).fill_null(value=False)
    blocks = [block.filter(positive) for block in frame.all_blocks().frames(*columns)]
    order = pl.concat([block.cast({"split": pl.String}) for block in blocks]).sort("user", "time", "event")
    counts = np.bincount(order["user"].to_numpy(), minlength=frame.users.height)
    return Sequences(
        order["item"].to_numpy().astype(np.int64),
        order["time"].to_numpy().astype(np.int64),
        order["split"].replace_strict({part: n for n, part in enumerate(PARTS)}, return_dtype=pl.Int64).to_numpy(),
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
    )
