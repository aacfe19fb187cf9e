"""The rate of the online step with aggregates beside the same step without, in turns in one process."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from features.dataset.aggregate import Aggregate
from features.dataset.descriptor import Dataset
from streaming.log.protocol import Message
from streaming.log.topics import Topics
from streaming.step import Step
from tessera.bench.harness.live_data import NEVER_LATE_S, LiveData, live_data
from tessera.bench.harness.result import Claim, at_least
from tessera.terminal import one_thread

BATCHES = (64, 256)
EVENTS, ROUNDS = 20_000, 3
_KEPT = 0.75
_JUDGED_AT = 256
_WAYS = ("four aggregates", "default aggregates", "no aggregates")


def worlds(dataset: Dataset, out: Path, console: Console) -> dict[str, LiveData]:
    """Returns a bundle of the dataset with four declared aggregates, with the default ones, and with none."""
    four = dataset.model_copy(update={"aggregates": four_aggregates(dataset)})
    asked = zip(_WAYS, (four, dataset, dataset), ("declared", "default", "off"), strict=True)
    # One epoch: training decides no cost of a step.
    return {
        way: live_data(own, out / choice, console, overrides=(f"aggregates={choice}", "training.max_epochs=1"))
        for way, own, choice in asked
    }


def four_aggregates(dataset: Dataset) -> dict[str, Aggregate]:
    """Returns windows of an item, decay of a user, and a rate of a user by the first column of the items."""
    value = "count" if dataset.events.label.implicit else "rate"
    column = next(iter(dataset.items.categorical), "") if dataset.items else ""
    crossed = ("user", f"item.{column}") if column else ("user", "item")
    declared: dict[str, dict[str, Any]] = {
        "item_clicks": {"by": "item", "value": "positive", "windows": ["1h", "1d", "7d", "all"]},
        "item_rate": {"by": "item", "value": value, "windows": ["1d", "all"]},
        "user_genre": {"by": crossed, "value": value},
        "user_mood": {"by": "user", "value": value, "half_life": ["1h", "7d"]},
    }
    return {name: Aggregate.model_validate(one) for name, one in declared.items()}


def step_rates(
    by_way: dict[str, LiveData], *, seed: int, events: int = EVENTS, rounds: int = ROUNDS
) -> Iterator[dict[str, Any]]:
    """Yields, by batch size and round, the events a CPU second of each way; the ways take turns batch by batch.

    CPU seconds of one thread are counted, so that other work of the machine does not decide the ratio.
    """
    one_thread()
    for batch in BATCHES:
        for number in range(rounds):
            yield {"part": "step", "seed": seed, "round": number, "batch": batch} | _round(by_way, batch, events)


def _round(by_way: dict[str, LiveData], batch: int, events: int) -> dict[str, float]:
    steps = {way: Step(data.bundle, Topics(), lateness_s=NEVER_LATE_S) for way, data in by_way.items()}
    sent = {way: _messages(data, events) for way, data in by_way.items()}
    spent = dict.fromkeys(by_way, 0.0)
    warm = events // 10 // batch * batch
    for start in range(0, events, batch):
        for way, step in steps.items():
            began = time.process_time()
            step.apply(sent[way][start : start + batch])
            if start >= warm:
                spent[way] += time.process_time() - began
    rates = {way: (events - warm) / seconds for way, seconds in spent.items()}
    named = {f"{way.split()[0]}_events_per_cpu_s": rate for way, rate in rates.items()}
    without = rates[_WAYS[-1]]
    return named | {f"{way.split()[0]}_over_none": rates[way] / without for way in _WAYS[:-1]}


def _messages(data: LiveData, events: int) -> list[Message]:
    count, now = len(data.messages), time.time_ns() // 1_000_000
    return [Message("events", 0, number, None, data.messages[number % count], now) for number in range(events)]


def step_claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """Returns the claim that the step with four aggregates keeps three quarters of its rate, by the median round."""
    kept = [row["four_over_none"] for row in rows if row["part"] == "step" and row["batch"] == _JUDGED_AT]
    if not kept:
        return []
    words = f"step, events a second at batch {_JUDGED_AT} with four aggregates over the same without"
    return [at_least(words, float(np.median(kept)), _KEPT)]
