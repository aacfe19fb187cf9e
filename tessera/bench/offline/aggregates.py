"""`aggregates`: one law in three ways, rates of the frame and the step, and what the ranker gains.

- law: generated events by the frame, by the stream's micro-batches and by a slow loop; values that differ.
- frame: events a second of windows and of decay, beside tiles by polars.
- step: events a second of the online step with four aggregates, with the default ones and with none, in turns.
- quality: test AUC of the ranker by kind of aggregate, and without ids, content or history; trees as a control.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from features.dataset.descriptor import Dataset
from tessera.bench.aggregate.law import law, law_claims
from tessera.bench.aggregate.quality import quality_claims, quality_rows
from tessera.bench.aggregate.step import EVENTS, ROUNDS, step_claims, step_rates, worlds
from tessera.bench.aggregate.tiles import frame_claims, frame_rates
from tessera.bench.harness.parts import chosen_parts
from tessera.bench.harness.result import BenchResult
from tessera.bench.harness.rows import measured_rows

PARTS = ("law", "frame", "step", "quality")


@dataclass(frozen=True)
class Sizes:
    """Sizes of the parts.

    Attributes:
        law, frame: Generated events.
        step: Events of a round.
        rounds: Rounds of the step at each batch size.
    """

    law: int = 1_000_000
    frame: int = 1_000_000
    step: int = EVENTS
    rounds: int = ROUNDS


def aggregates(
    dataset: Dataset,
    out: Path,
    *,
    seeds: int,
    console: Console,
    parts: Sequence[str] | None = None,
    sizes: Sizes = Sizes(),
    overrides: tuple[str, ...] = (),
) -> BenchResult:
    """Measures the parts in each seed; `law` and `frame` read generated events, `step` and `quality` the dataset.

    Args:
        parts: Names in `PARTS`; all by default.
        overrides: Values of `[run]` for the rankers of `quality`, `NAME=VALUE` each.

    Raises:
        TesseraError: A part is unknown, or the dataset cannot serve it.
    """
    chosen = chosen_parts("aggregates", parts, PARTS)
    rows = measured_rows()
    bundles = worlds(dataset, out, console) if "step" in chosen else {}
    for seed in range(seeds):
        if "law" in chosen:
            with console.status(f"seed {seed}: the law"):
                rows += law(sizes.law, seed=seed)
        if "frame" in chosen:
            with console.status(f"seed {seed}: the frame"):
                rows += frame_rates(sizes.frame, seed=seed)
        if "step" in chosen:
            with console.status(f"seed {seed}: the step"):
                rows += step_rates(bundles, seed=seed, events=sizes.step, rounds=sizes.rounds)
        if "quality" in chosen:
            rows += quality_rows(dataset, out, seed=seed, console=console, overrides=overrides)
    claims = [*law_claims(rows), *frame_claims(rows), *step_claims(rows), *quality_claims(rows)]
    return BenchResult("aggregates", dataset.name, seeds, rows, claims)
