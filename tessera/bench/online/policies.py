"""`policies`: measures what a policy with all rules costs a ranking, and whether it leaves out all consumed items.

Each request is ranked three times in turn by one service in this process: without a policy, with the policy, and
without again. The two without are the control. HTTP would add the same time to all three, so it is left out.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console

from features.dataset.descriptor import Dataset
from features.errors import TesseraError
from features.frame import Frame
from features.shown.policy import Boost, Diversity, NewItems, PinnedPlace, Policy
from features.value.filter import Filter
from models.bundle.bundle import Bundle
from serving.ranking.service import RankService
from serving.retrieval.meaning import NOTHING, Meant, PolicyRequest
from serving.store.fill import fill_store
from serving.store.memory import MemoryStore
from tessera.bench.harness.result import BenchResult, Claim, at_most
from tessera.bench.harness.rows import measured_rows
from tessera.pipeline.artifact import read_frame
from tessera.pipeline.options import load_options
from tessera.pipeline.run import run
from tessera.terminal import one_thread

_NAME, _K, _CANDIDATES, _ROUNDS, _WARM = "all", 20, 200, 400, 40
ANSWERS, _ANSWERED = 100_000, 100


def policies(dataset: Dataset, out: Path, *, seeds: int, console: Console) -> BenchResult:
    """Trains once, and measures each seed on the bundle."""
    if dataset.items is None or dataset.events.user is None:
        raise TesseraError(f"bench policies needs users and a catalogue; {dataset.name} lacks one")
    ruled = dataset.model_copy(update={"policies": {_NAME: all_rules(dataset)}})
    options = load_options(dataset, ["seed=0"])
    bundle = run(ruled, out / dataset.name, options, console=console, registry=None, until="publish").bundle
    if bundle is None:
        raise TesseraError("the run released no bundle to serve; see its report")
    seen = consumed_of(read_frame(out / dataset.name / "frame"))
    one_thread()
    rows = measured_rows()
    for seed in range(seeds):
        rows += measure(bundle, seen, seed)
    return BenchResult("policies", dataset.name, seeds, rows, claims(rows))


def all_rules(dataset: Dataset) -> Policy:
    """Returns a policy with every rule that the dataset's columns allow."""
    column = next(iter(dataset.items.filterable), None) if dataset.items is not None else None
    known = Filter.model_validate({"not": {"column": column, "eq": None}}) if column is not None else None
    by: dict[str, Any] = {"by": "content", "weight": 0.3} if dataset.has_content else {}
    capped: dict[str, Any] = {"column": column, "most": 5} if column is not None else {}
    return Policy(
        leave_out_consumed=True,
        diversity=Diversity(**by, **capped) if by or capped else None,
        boost=(Boost(filter=known, times=1.5),) if known is not None else (),
        pin=(PinnedPlace(filter=known, position=3),) if known is not None else (),
        new=NewItems(share=0.1, positives=3),
    )


def consumed_of(frame: Frame) -> dict[str, set[str]]:
    """Returns the items of each user's positive events before the test part, from the frame and not from the bundle."""
    blocks = frame.all_blocks().frames("user", "item", "label", "split")
    events = pl.concat([block.filter((pl.col("label") == 1) & (pl.col("split") != "test")) for block in blocks])
    users, items = frame.users["user_id"].to_list(), frame.items["item_id"].to_list()
    return {
        users[user]: {items[item] for item in own}
        for user, own in events.group_by("user").agg(pl.col("item").unique()).iter_rows()
    }


def measure(
    bundle: Bundle, seen: Mapping[str, set[str]], seed: int, *, rounds: int = _ROUNDS, answers: int = ANSWERS
) -> list[dict[str, Any]]:
    """Returns the rows of a seed: two kinds of requests, and the consumed items among answers."""
    store = MemoryStore()
    fill_store(store, bundle)
    service, rng = RankService(bundle, store), np.random.default_rng(seed)
    items, users = bundle.items["item_id"].to_numpy(), sorted(seen)

    def given() -> list[str]:
        found: list[str] = rng.choice(items, min(_CANDIDATES, len(items)), replace=False).tolist()
        return found

    asked: tuple[tuple[str, Callable[[], list[str] | None]], ...] = (("given", given), ("retrieved", lambda: None))
    rows = [
        {"part": f"rank: {kind}", "seed": seed} | _timed(service, users, choose, rng, rounds) for kind, choose in asked
    ]
    return [*rows, {"part": "consumed", "seed": seed} | _answered(service, users, seen, items, rng, answers)]


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """Judges the medians over the seeds."""
    found = []
    for kind in ("given", "retrieved"):
        ratios = [row["ratio"] for row in rows if row["part"] == f"rank: {kind}"]
        found.append(at_most(f"p50 of rank with all rules over without, {kind}", float(np.median(ratios)), 1.3))
    shown = sum(row["consumed"] for row in rows if row["part"] == "consumed")
    return [*found, at_most("consumed items among the answers", float(shown), 0.0)]


def _timed(
    service: RankService,
    users: list[str],
    choose: Callable[[], list[str] | None],
    rng: np.random.Generator,
    rounds: int,
) -> dict[str, Any]:
    """Times requests without a policy, with it, and without again, in an order that rotates."""
    taken: list[list[float]] = [[], [], []]
    for number in range(rounds + _WARM):
        user, candidates = users[rng.integers(len(users))], choose()
        wishes = (NOTHING, Meant(policy=PolicyRequest(_NAME, f"{number}")), NOTHING)
        for place in range(3):
            turn = (number + place) % 3
            began = time.perf_counter()
            service.rank(user, candidates, _K, meant=wishes[turn])
            if number >= _WARM:
                taken[turn].append(1_000 * (time.perf_counter() - began))
    before, ruled, after = (float(np.median(one)) for one in taken)
    plain = float(np.sqrt(before * after))
    return {"p50_ms": ruled, "without_p50_ms": plain, "ratio": ruled / plain, "control": after / before}


def _answered(
    service: RankService,
    users: list[str],
    seen: Mapping[str, set[str]],
    items: Any,
    rng: np.random.Generator,
    answers: int,
) -> dict[str, Any]:
    """Counts the consumed items among answered items, with the policy and without."""
    counts = {"answers": 0, "consumed": 0, "without_answers": 0, "consumed_without": 0}
    number = 0
    while counts["answers"] < answers:
        user = users[rng.integers(len(users))]
        candidates = rng.choice(items, min(2 * _ANSWERED, len(items)), replace=False).tolist() if number % 2 else None
        policy = Meant(policy=PolicyRequest(_NAME, f"{number}"))
        for meant, total, consumed in (
            (policy, "answers", "consumed"),
            (NOTHING, "without_answers", "consumed_without"),
        ):
            found = [item for item, _ in service.rank(user, candidates, _ANSWERED, meant=meant).items]
            counts[total] += len(found)
            counts[consumed] += len(seen[user].intersection(found))
        number += 1
        if number > answers:
            break
    return counts
