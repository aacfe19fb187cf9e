"""Choice of what a ranker reads: the parts of an item by items that training does not see, the place by held-out rows.

A part of an item pays on one catalogue and costs on another: a Semantic ID helps where texts are good and events few,
and adds noise elsewhere. A fifth of the items is held out inside the training part. Small trainings with and without
each part show what the part gives on the held-out items and on the others. A part is left out if it gives the held-out
items nothing and the others less than it costs the held-out items.
The item's id is always read, since the stream teaches its rows.

The position path is left out if the ranker without it explains held-out rows as well once both are told the places.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.aggregate.plan import AggregatePlan
from features.aggregate_frame import with_aggregates
from features.durable import write_file
from features.frame import Frame
from features.frame_blocks import held_blocks, without_visits
from models.ranker.evaluate import at_places, quality
from models.ranker.train import TrainConfig, predict_part, train
from models.table.admission import Admission
from models.table.item_parts import parts_of, reading
from models.table.placement import place_numbers
from models.table.schema import Schema

HELD_OUT = 0.2
"""Share of the items that are held out."""
LEAST_EVENTS = 4_000
"""Fewest events of either label on held-out items for a choice: the AUC's standard error is then about .009."""
# Another stream of random numbers than that of a benchmark's held-out items.
_HELD_OUT_STREAM = 7
_MARGIN = 0.0005


@dataclass(frozen=True)
class Trial:
    """One small training.

    Attributes:
        parts: Parts that the ranker read.
        new_auc: AUC on the events of held-out items.
        known_auc: AUC on the validation events of the other items.
    """

    parts: tuple[str, ...]
    new_auc: float
    known_auc: float


@dataclass(frozen=True)
class ItemReads:
    """Parts of an item that a ranker reads, and the trials that chose them.

    Attributes:
        parts: The parts, in the order of `ITEM_PARTS`.
        trials: Small trainings, that with all parts first; empty if nothing was chosen.
        events: Events on the held-out items.
    """

    parts: tuple[str, ...]
    trials: tuple[Trial, ...] = ()
    events: int = 0

    def lines(self) -> list[str]:
        """Returns what each part gave, one line a trial, for people."""
        if not self.trials:
            return []
        first, *others = self.trials
        found = [f"{' + '.join(first.parts)}: {first.new_auc:.4f} on held-out items, {first.known_auc:.4f} on others"]
        for trial in others:
            new, known = trial.new_auc - first.new_auc, trial.known_auc - first.known_auc
            found.append(f"{' + '.join(trial.parts)}: {new:+.4f}, {known:+.4f}")
        return found


def choose_reads(
    schema: Schema,
    frame: Frame,
    config: TrainConfig,
    *,
    kept: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ItemReads:
    """Chooses the parts of an item that a ranker of this schema reads.

    Parts are left out one after another, as long as a part is found that does not pay. Trials train on one block of
    the training part, so their cost does not grow with the events.

    Args:
        schema: Schema that reads all parts.
        frame: Frame of the run. Its test part is not read.
        config: Training of the run; its seed decides the held-out items.
        kept: File of finished trials, from which a later call continues.
        progress: Called with (trials done, most trials).
    """
    has = parts_of(schema)
    optional = [part for part in has if part != "id"]
    trials = _Trials(schema, frame, config, kept)
    if "id" not in has or not optional or trials.events < LEAST_EVENTS:
        return ItemReads(has, (), trials.events)
    most = 1 + len(optional) * (len(optional) + 1) // 2
    best = trials.of(has)
    done = [best]
    progress(1, most)
    while True:
        without = []
        for part in best.parts:
            if part != "id":
                without.append(trials.of(tuple(other for other in best.parts if other != part)))
                done.append(without[-1])
                progress(len(done), most)
        fit = [trial for trial in without if _pays_less(trial, best)]
        if not fit:
            break
        best = max(fit, key=lambda trial: trial.new_auc + trial.known_auc)
    progress(most, most)
    return ItemReads(best.parts, tuple(done), trials.events)


def _pays_less(trial: Trial, before: Trial) -> bool:
    """True if the part that a trial leaves out gives held-out items nothing, and other items less than it costs."""
    new, known = trial.new_auc - before.new_auc, trial.known_auc - before.known_auc
    return new > -_MARGIN and new + known > 0


class _Trials:
    """Small trainings on the frame without the held-out items, each done once.

    Attributes:
        events: Events on held-out items of the rarer label, times two.
    """

    def __init__(self, schema: Schema, frame: Frame, config: TrainConfig, kept: Path | None) -> None:
        self._schema, self._kept = schema, kept
        # As many epochs as the run: a network that is trained too little leans on content, and overrates it.
        self._config = replace(config, patience=min(config.patience, 1))
        held_out = np.random.default_rng([config.seed, _HELD_OUT_STREAM]).random(frame.items.height) < HELD_OUT
        self._frame, self._new = without_items(frame, held_out)
        positives = int(self._new["label"].sum()) if self._new.height else 0
        known = self._new.height - self._new["label"].null_count() if self._new.height else 0
        self.events = 2 * min(positives, known - positives)
        self._done: dict[str, Trial] = _read(kept)

    def of(self, parts: Sequence[str]) -> Trial:
        """Returns the trial of these parts."""
        name = " ".join(parts)
        if name not in self._done:
            self._done[name] = self._measured(tuple(parts))
            if self._kept is not None:
                write_file(self._kept, msgspec.json.encode({key: asdict(one) for key, one in self._done.items()}))
        return self._done[name]

    def _measured(self, parts: tuple[str, ...]) -> Trial:
        schema = reading(self._schema, parts)
        trained = train(schema, self._frame, self._config)
        found = []
        for rows in (self._new, self._frame.part("validation")):
            admission = Admission(trained.sketch, schema.admission)
            predicted = predict_part(trained.ranker, schema, self._frame, held_blocks(rows, 1), admission)
            found.append(quality(rows["label"].to_numpy().astype(np.float32), predicted).auc)
        new, known = (math.nan if auc is None else auc for auc in found)
        return Trial(parts, new, known)


@dataclass(frozen=True)
class PathChoice:
    """Choice whether a ranker has a position path.

    Attributes:
        kept: True if it has.
        gain: Log loss of held-out rows without the path, less that with the path. Both are told the places.
        error: Standard error of the gain; rows of a user are dependent.
        rows: Held-out rows.
    """

    kept: bool
    gain: float
    error: float
    rows: int


def choose_path(
    schema: Schema,
    frame: Frame,
    config: TrainConfig,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PathChoice:
    """Chooses whether the position path stays: the gain on the validation part must exceed its standard error.

    A ranker of a log has taken position for relevance, or relevance for position. Rows at one place tell which, since
    the place does not differ between them.

    Args:
        schema: Schema with a placement.
        frame: Frame of the run. Its test part is not read, and of the other parts the first block.
        config: Training of the run.
        progress: Called with (trainings done, trainings).
    """
    parts = {name: frame.blocks(name).read(0) for name in ("train", "validation")}
    small = frame.replace(examples={name: held_blocks(rows, 1) for name, rows in parts.items()})
    held = parts["validation"]
    labels, places = held["label"].to_numpy().astype(np.float32), place_numbers(schema.placement, held)
    assert places is not None
    losses = []
    for number, read in enumerate((schema, schema.served)):
        trained = train(read, small, config)
        admission = Admission(trained.sketch, schema.admission)
        predicted = predict_part(trained.ranker, schema.served, small, held_blocks(held, 1), admission)
        told = at_places(predicted, labels, places)
        losses.append(-np.log(np.where(labels > 0, told, 1 - told)))
        progress(number + 1, 2)
    gains = losses[1] - losses[0]
    gain = float(gains.mean())
    units = held["user"].to_numpy() if frame.users.height > 1 else np.arange(held.height)
    of_units = np.bincount(np.unique(units, return_inverse=True)[1], gains - gain)
    error = float(np.sqrt((of_units**2).sum())) / held.height
    return PathChoice(gain > error, gain, error, held.height)


def _read(kept: Path | None) -> dict[str, Trial]:
    if kept is None or not kept.is_file():
        return {}
    return msgspec.json.decode(kept.read_bytes(), type=dict[str, Trial])


def without_items(frame: Frame, held_out: NDArray[np.bool_]) -> tuple[Frame, pl.DataFrame]:
    """Returns one block of the frame without the held-out items, and the events of those items as of new items."""
    parts: dict[str, Any] = {}
    new = []
    for name in ("train", "validation"):
        block = without_visits(frame.blocks(name).read(0), held_out)
        is_new = pl.Series(held_out[block["item"].to_numpy()])
        parts[name] = held_blocks(block.filter(~is_new), 1)
        new.append(block.filter(is_new))
    return frame.replace(examples=parts), _as_new(pl.concat(new), frame)


def _as_new(rows: pl.DataFrame, frame: Frame) -> pl.DataFrame:
    """Returns examples whose aggregates by item are those of an item without events."""
    columns = _by_item(frame.aggregates)
    if not columns or not rows.height:
        return rows
    bare = frame.replace(examples=rows[:1].drop(frame.aggregates.columns))
    first = with_aggregates(bare, frame.aggregates, base_rate=frame.aggregates.base_rate)[0].examples
    values: Mapping[str, Any] = first.row(0, named=True)
    return rows.with_columns(pl.lit(values[name], dtype=pl.Float32).alias(name) for name in columns)


def _by_item(plan: AggregatePlan) -> list[str]:
    return [name for one in plan.aggregations if "item" in one.by for name in one.columns]
