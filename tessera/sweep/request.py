"""Time to score one request with an untrained ranker, as a server does. Weights do not decide the time."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from features.frame import Frame
from features.threads import one_thread
from models.bundle.record import entity_frame
from models.bundle.scorer import Lookups, Scorer
from models.ranker.loading import content_vectors, sighted
from models.ranker.train import TRAIN, VALIDATION, TrainConfig, new_ranker
from models.table.admission import Admission
from models.table.batch import Entities
from models.table.schema import Schema

CANDIDATES = 500
"""Candidates of a timed request, as many as the gates score."""
_WARM, _ROUNDS = 3, 150


@dataclass(frozen=True)
class FrameEntities:
    """Users and items of a frame, as a scorer looks them up."""

    frame: Frame
    users: Entities
    items: Entities
    user_numbers: Mapping[str, int]
    admission: Admission
    ranker_vectors: NDArray[np.float32]

    def user_frame(self, ids: Sequence[str]) -> pl.DataFrame:
        """Returns a frame of users for whom only the id is known."""
        return entity_frame([{"user_id": name} for name in ids], self.frame.users.drop("listed").clear())


class Request:
    """One request to rank `CANDIDATES` items for the user of the first validation example.

    Args:
        schema: Schema of the ranker, as a server reads it.
        frame: Frame with a training and a validation part.
        config: Configuration of the training, which decides the network.
    """

    def __init__(self, schema: Schema, frame: Frame, config: TrainConfig) -> None:
        ranker = new_ranker(schema, config)
        self._rows = ranker.table.weight.detach().cpu().numpy()
        source = sighted(schema, frame, frame.blocks(TRAIN))
        admission = source.admission
        first = frame.blocks(VALIDATION).read(0).head(1)
        self._user = ""
        numbers = {}
        if frame.users.height:
            number = int(first["user"][0])
            self._user = str(frame.users["user_id"][number])
            numbers = {self._user: number}
        entities = FrameEntities(
            frame,
            source.users,
            source.items,
            numbers,
            admission,
            content_vectors(frame.items),
        )
        self._scorer = Scorer(schema, ranker.network.eval(), entities)
        self._events = Entities(schema, "event", first, admission)
        self._items = np.random.default_rng(0).integers(0, frame.items.height, CANDIDATES)
        self._history = first["history"][0].to_numpy().astype(np.int64)
        columns = len(schema.aggregates.columns)
        self._aggregates = np.zeros((CANDIDATES, columns), dtype=np.float32) if columns else None

    def score(self) -> None:
        """Looks up, gathers and scores once."""
        lookups: Lookups = self._scorer.lookups(self._user, self._items, self._history, self._events, self._aggregates)
        self._scorer.score(lookups, self._rows[lookups.rows])


@one_thread()
@torch.no_grad()
def time_ratio(request: Request, default: Request) -> float:
    """Returns the time of a request over the default's.

    They take turns, and each is first as often as the other. The shortest time counts: on a busy machine
    a median measures the interruptions.
    """
    pairs: list[tuple[Request, list[float]]] = [(request, []), (default, [])]
    for number in range(_WARM + _ROUNDS):
        for one, taken in pairs if number % 2 else reversed(pairs):
            began = time.perf_counter()
            one.score()
            taken.append(time.perf_counter() - began)
    own, other = (min(taken[_WARM:]) for _, taken in pairs)
    return own / other
