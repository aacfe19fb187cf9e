"""`tessera bench NAME`: chooses the benchmark, prints its rows and claims."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from features.errors import TesseraError
from tessera.terminal import JsonOption, OutOption, err_console, load_with_split, out_console, print_json

if TYPE_CHECKING:
    from features.dataset.descriptor import Dataset
    from tessera.bench.harness.result import BenchResult

NAMES = (
    "main-job",
    "multiplexing",
    "compression",
    "training-speed",
    "resize",
    "cold-start",
    "id-churn",
    "codebook-change",
    "semantic-ids",
    "stream",
    "freshness",
    "online-learning",
    "soak",
    "filtered",
    "serving",
    "swaps",
    "rollout",
    "operation",
    "growth",
)
_ONLINE = NAMES[NAMES.index("stream") :]
_TIMED = ("soak", "swaps")


def bench(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(NAMES)}.")],
    dataset: Annotated[Path | None, typer.Option(help="Descriptor; by default the synthetic catalogue.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from 0.")] = 3,
    split: Annotated[
        list[str] | None, typer.Option(help="Ways to split; repeatable. Default: the descriptor's.")
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(help="cold-start: the items to hold out, in SQL, 'year >= 2000'; by default a tenth."),
    ] = None,
    seconds: Annotated[float | None, typer.Option(min=10, help="soak, swaps: seconds to run; 60 by default.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Commit of another version, such as 310ca4f; both run in turns.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="With --against: turns of each version.")] = 2,
    out: OutOption = Path("out/bench"),
    json: JsonOption = False,
) -> None:
    """Measure a benchmark with its peers side by side; exit 1 when a claim does not hold."""
    from tessera.bench.harness.result import render

    if name not in NAMES:
        raise TesseraError(f"benchmark {name!r} is unknown; there are: {', '.join(NAMES)}")
    if against is not None:
        from tessera.bench.harness.against import against as compare

        optional = {"dataset": dataset, "held-out": held_out, "seconds": seconds}
        options = [f"--seeds={seeds}", *(f"--split={way}" for way in split or ())]
        options += [f"--{option}={value}" for option, value in optional.items() if value is not None]
        turns = compare(against, name, options, out / f"{name}-against", rounds=rounds, console=err_console)
        print_json(turns.to_json()) if json else render(turns, out_console)
        return
    chosen = _chosen(name, dataset, split or [], out)
    if held_out is not None:
        if name != "cold-start":
            raise TesseraError(f"--held-out is for cold-start, not for {name}")
        chosen = partial(chosen, held_out=held_out)
    if seconds is not None:
        if name not in _TIMED:
            raise TesseraError(f"--seconds is for {' and '.join(_TIMED)}, not for {name}")
        chosen = partial(chosen, seconds=seconds)
    result = chosen(seeds=seeds, console=err_console)
    if json:
        print_json(result.to_json())
    else:
        render(result, out_console)
    if not result.holds:
        raise typer.Exit(1)


def _chosen(name: str, path: Path | None, ways: Sequence[str], out: Path) -> "Callable[..., BenchResult]":
    if name == "operation" and path is None:
        # The console is measured with this many items.
        from tessera.demo.synthetic import write_synthetic

        path = write_synthetic(out / "synthetic-100k", users=5_000, items=100_000, events=200_000)
    if name in _ONLINE:
        return _online(name, _datasets(path, ways or [None], out)[0], out / name)
    if name == "training-speed":
        from tessera.bench.offline.training_speed import training_speed

        return partial(training_speed, out / name)
    if name == "semantic-ids":
        from tessera.bench.offline.semantic_ids import semantic_ids

        # Vectors are generated unless a dataset is given.
        own = _datasets(path, [None], out)[0] if path else None
        return partial(semantic_ids, own, out / f"{name}-{own.name if own else 'synthetic'}")
    if name == "main-job":
        from tessera.bench.offline.main_job import main_job

        return partial(main_job, _datasets(path, ways or [None], out), out)
    # The papers' protocols split at random.
    (found,) = _datasets(path, ways or ["random"], out)[:1]
    return partial(_on_dataset(name), found, out / f"{name}-{found.name}")


def _on_dataset(name: str) -> "Callable[..., BenchResult]":
    if name == "multiplexing":
        from tessera.bench.offline.multiplexing import multiplexing

        return multiplexing
    if name == "cold-start":
        from tessera.bench.offline.cold_start import cold_start

        return cold_start
    if name == "id-churn":
        from tessera.bench.offline.id_churn import id_churn

        return id_churn
    if name == "codebook-change":
        from tessera.bench.offline.codebook_change import codebook_change

        return codebook_change
    if name == "compression":
        from tessera.bench.offline.compression import compression

        return compression
    from tessera.bench.offline.resize import resize

    return resize


def _datasets(path: Path | None, ways: Sequence[str | None], out: Path) -> "list[Dataset]":
    from tessera.demo.synthetic import write_synthetic

    descriptor = path or write_synthetic(out / "synthetic")
    return [load_with_split(descriptor, by) for by in ways]


def _online(name: str, dataset: "Dataset", out: Path) -> "Callable[..., BenchResult]":
    from tessera.bench.online.filtered import filtered
    from tessera.bench.online.freshness import freshness
    from tessera.bench.online.growth import growth
    from tessera.bench.online.online_learning import online_learning
    from tessera.bench.online.operation import operation
    from tessera.bench.online.rollout_rates import rollout
    from tessera.bench.online.serving_reads import serving
    from tessera.bench.online.soak import soak
    from tessera.bench.online.stream_rates import stream
    from tessera.bench.online.swaps import swaps

    out.mkdir(parents=True, exist_ok=True)
    benches: dict[str, Callable[..., BenchResult]] = {
        "stream": stream,
        "freshness": freshness,
        "online-learning": online_learning,
        "soak": soak,
        "filtered": filtered,
        "serving": serving,
        "swaps": swaps,
        "rollout": rollout,
        "operation": operation,
        "growth": growth,
    }
    return partial(benches[name], dataset, out)
