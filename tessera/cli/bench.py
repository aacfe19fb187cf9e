"""`tessera bench NAME`: chooses the benchmark, prints its rows and claims."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from features.errors import TesseraError
from tessera.bench.harness.needs import CTR, FEAST, RETRIEVAL, RQ, Needs, build_peers, check_datasets, check_servers
from tessera.terminal import JsonOption, OutOption, err_console, load_with_split, out_console, print_json

if TYPE_CHECKING:
    from features.dataset.descriptor import Dataset
    from tessera.bench.harness.result import BenchResult

NEEDS = {
    "main-job": Needs(),
    "multiplexing": Needs(),
    "compression": Needs(),
    "training-speed": Needs(peers=(CTR,)),
    "training-blocks": Needs(),
    "processes": Needs(),
    "rankers": Needs(ranks=True, peers=(CTR,)),
    "labels": Needs(ranks=True),
    "retrieval": Needs(ranks=True, peers=(RETRIEVAL,)),
    "resize": Needs(),
    "cold-start": Needs(content=True),
    "code-value": Needs(content=True),
    "id-churn": Needs(content=True),
    "codebook-change": Needs(content=True),
    "encoders": Needs(content=True, ranks=True),
    "upgrade": Needs(content=True, ranks=True),
    "aspects": Needs(content=True, ranks=True),
    "correction": Needs(content=True, ranks=True),
    "aggregates": Needs(ranks=True),
    "shown": Needs(ranks=True),
    "semantic-ids": Needs(content=True, peers=(RQ,)),
    "expressions": Needs(),
    "drift": Needs(),
    "stream": Needs(servers=True, peers=(FEAST,)),
    "streaming": Needs(),
    "freshness": Needs(servers=True),
    "stream-processes": Needs(servers=True),
    "follow": Needs(servers=True),
    "online-learning": Needs(),
    "soak": Needs(servers=True),
    "filtered": Needs(content=True),
    "serving": Needs(servers=True, ranks=True, peers=(FEAST,)),
    "candidates": Needs(servers=True, content=True, ranks=True),
    "policies": Needs(ranks=True),
    "swaps": Needs(ranks=True),
    "rollout": Needs(),
    "operation": Needs(ranks=True),
    "growth": Needs(ranks=True),
    "formats": Needs(),
}
"""Conditions of each benchmark. They are checked before it measures."""
NAMES = tuple(NEEDS)
_ONLINE = NAMES[NAMES.index("stream") :]
_TIMED = ("soak", "swaps")
_IN_PARTS = (
    "aggregates",
    "cold-start",
    "code-value",
    "encoders",
    "filtered",
    "rankers",
    "retrieval",
    "serving",
    "streaming",
)


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
    users: Annotated[
        bool, typer.Option("--users", help="cold-start: hold out a tenth of the users instead of items.")
    ] = False,
    part: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(_IN_PARTS)}: a part, such as step; repeatable. Default: all."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="upgrade: sentence transformer that replaces MiniLM, a directory or a hub id.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="training-speed, semantic-ids, encoders: measure this device, cuda or cpu."),
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
    from tessera.settings import Settings

    if name not in NAMES:
        raise TesseraError(f"benchmark {name!r} is unknown; there are: {', '.join(NAMES)}")
    check_servers(name, NEEDS[name], Settings.from_environment())
    if against is not None and name != "streaming":
        from tessera.bench.harness.against import against as compare

        optional = {"dataset": dataset, "held-out": held_out, "model": model, "device": device, "seconds": seconds}
        options = [f"--seeds={seeds}", *(f"--split={way}" for way in split or ())]
        options += [f"--part={one}" for one in part or ()]
        options += [f"--{option}={value}" for option, value in optional.items() if value is not None]
        options += ["--users"] if users else []
        turns = compare(against, name, options, out / f"{name}-against", rounds=rounds, console=err_console)
        print_json(turns.to_json()) if json else render(turns, out_console)
        return
    if users and (name != "cold-start" or held_out is not None):
        raise TesseraError("--users is for cold-start without --held-out")
    needs = Needs() if users else NEEDS[name]
    chosen, datasets = _new_users(dataset, split or [], out) if users else _chosen(name, dataset, split or [], out)
    if held_out is not None:
        if name != "cold-start":
            raise TesseraError(f"--held-out is for cold-start, not for {name}")
        chosen = partial(chosen, held_out=held_out)
    if part:
        if name not in _IN_PARTS:
            raise TesseraError(f"--part is for {', '.join(_IN_PARTS)}, not for {name}")
        chosen = partial(chosen, parts=part)
    if against is not None:
        chosen = partial(chosen, commit=against)
    if model is not None:
        if name != "upgrade":
            raise TesseraError(f"--model is for upgrade, not for {name}")
        chosen = partial(chosen, model=model)
    if device is not None:
        chosen, needs = _on_device(name, device, out / f"{name}-{device}"), Needs()
    if seconds is not None:
        if name not in _TIMED:
            raise TesseraError(f"--seconds is for {' and '.join(_TIMED)}, not for {name}")
        chosen = partial(chosen, seconds=seconds)
    check_datasets(name, needs, datasets)
    if NEEDS[name].peers and device is None:
        chosen = partial(chosen, peers=build_peers(NEEDS[name], out / "peers", err_console))
    result = _measured(chosen, name, datasets, seeds, out)
    if json:
        print_json(result.to_json())
    else:
        render(result, out_console)
    if not result.holds:
        raise typer.Exit(1)


def _measured(
    chosen: "Callable[..., BenchResult]", name: str, datasets: "Sequence[Dataset]", seeds: int, out: Path
) -> "BenchResult":
    """Runs a benchmark; one that fails after its first row gives a result with the rows it has measured."""
    from rich.text import Text

    from tessera.bench.harness.result import BenchResult
    from tessera.bench.harness.rows import keep_rows
    from tessera.code_version import code_version

    module = (chosen.func if isinstance(chosen, partial) else chosen).__module__
    header = {"bench": name, "code": code_version(module), "seeds": seeds}
    with keep_rows(out / f"{name}-rows.jsonl", header) as kept:
        try:
            return chosen(seeds=seeds, console=err_console)
        except (Exception, KeyboardInterrupt) as error:
            # Hours of measurements must not depend on the kind of the error that ends them.
            if not kept.rows:
                raise
            err_console.print_exception()
            err_console.print(Text(f"kept {len(kept.rows)} rows in {kept.path}"))
            failed = f"{type(error).__name__}: {error}"
            dataset = datasets[0].name if datasets else "synthetic"
            return BenchResult(name, dataset, seeds, list(kept.rows), [], failed=failed)


def _chosen(
    name: str, path: Path | None, ways: Sequence[str], out: Path
) -> "tuple[Callable[..., BenchResult], list[Dataset]]":
    """Returns a benchmark, and the datasets that it reads."""
    if name == "operation" and path is None:
        # The console is measured with this many items.
        from tessera.demo.synthetic import write_synthetic

        path = write_synthetic(out / "synthetic-100k", users=5_000, items=100_000, events=200_000)
    if name == "streaming":
        from tessera.bench.versions.ratios import streaming

        if path is None:
            raise TesseraError("bench streaming needs --dataset: a descriptor that both versions understand")
        datasets = _datasets(path, ways or [None], out)[:1]
        return partial(streaming, datasets[0], path, out / f"{name}-{datasets[0].name}"), datasets
    if name in _ONLINE:
        datasets = _datasets(path, ways or [None], out)[:1]
        return _online(name, datasets[0], out / name), datasets
    if name == "training-speed":
        from tessera.bench.offline.training_speed import training_speed

        return partial(training_speed, out / name), []
    if name == "expressions":
        from tessera.bench.online.expressions import expressions

        return partial(expressions, out / name), []
    if name == "drift":
        from tessera.bench.skew.drift import drift

        return partial(drift, out / name), []
    if name == "semantic-ids":
        from tessera.bench.offline.semantic_ids import semantic_ids

        # Vectors are generated unless a dataset is given.
        datasets = _datasets(path, [None], out) if path else []
        own = datasets[0] if datasets else None
        return partial(semantic_ids, own, out / f"{name}-{own.name if own else 'synthetic'}"), datasets
    if name == "main-job":
        from tessera.bench.offline.main_job import main_job

        datasets = _datasets(path, ways or [None], out)
        return partial(main_job, datasets, out), datasets
    if name == "training-blocks":
        from tessera.bench.offline.training_blocks import training_blocks

        datasets = _datasets(path, ways or [None], out)[:1]
        return partial(training_blocks, datasets[0], out / f"{name}-{datasets[0].name}"), datasets
    if name == "processes":
        from tessera.bench.offline.processes import processes

        datasets = _datasets(path, ways or [None], out)[:1]
        return partial(processes, datasets[0], out / f"{name}-{datasets[0].name}"), datasets
    if name == "rankers":
        from tessera.bench.rankers.kinds import rankers

        datasets = _datasets(path, ways or [None], out)[:1]
        return partial(rankers, datasets[0], out / f"{name}-{datasets[0].name}"), datasets
    if name == "labels":
        from tessera.bench.rankers.labels import labels

        datasets = _datasets(path, ways or [None], out)[:1]
        return partial(labels, datasets[0], out / f"{name}-{datasets[0].name}"), datasets
    if name == "retrieval":
        from tessera.bench.retrieval.retrieval import retrieval

        datasets = _datasets(path, ways or [None], out)[:1]
        return partial(retrieval, datasets[0], out / f"{name}-{datasets[0].name}"), datasets
    if name == "encoders":
        from tessera.bench.encoder.encoders import encoders

        datasets = _datasets(path, ways or [None], out)[:1]
        return partial(encoders, datasets[0], out / f"{name}-{datasets[0].name}"), datasets
    if name == "correction":
        from tessera.bench.encoder.correction import correction

        datasets = _datasets(path, ways or [None], out)[:1]
        return partial(correction, datasets[0], out / f"{name}-{datasets[0].name}"), datasets
    if name == "aggregates":
        from tessera.bench.offline.aggregates import aggregates

        datasets = _datasets(path, ways or [None], out)[:1]
        return partial(aggregates, datasets[0], out / f"{name}-{datasets[0].name}"), datasets
    # The papers' protocols split at random.
    (found,) = _datasets(path, ways or ["random"], out)[:1]
    return partial(_on_dataset(name), found, out / f"{name}-{found.name}"), [found]


def _new_users(path: Path | None, ways: Sequence[str], out: Path) -> "tuple[Callable[..., BenchResult], list[Dataset]]":
    """Returns the benchmark of users that training never saw, and its dataset under the descriptor's own split."""
    from tessera.bench.offline.new_users import new_users

    datasets = _datasets(path, ways[:1] or [None], out)
    return partial(new_users, datasets[0], out / f"new-users-{datasets[0].name}"), datasets


def _on_device(name: str, device: str, out: Path) -> "Callable[..., BenchResult]":
    """Returns the part of a benchmark that measures a device.

    Raises:
        TesseraError: The benchmark has no such part, or there is no such device.
    """
    from features.device import resolve

    if name not in ("training-speed", "semantic-ids", "encoders"):
        raise TesseraError(f"--device is for training-speed, semantic-ids and encoders, not for {name}")
    found = resolve(device, fused=name == "training-speed").name  # type: ignore[arg-type]
    if name == "training-speed":
        from tessera.bench.device.training import training_device

        return partial(training_device, out, found)
    if name == "encoders":
        from tessera.bench.device.encoders import encoders_device

        return partial(encoders_device, found)
    from tessera.bench.device.codebook import codebook_device

    return partial(codebook_device, found)


def _on_dataset(name: str) -> "Callable[..., BenchResult]":
    if name == "multiplexing":
        from tessera.bench.offline.multiplexing import multiplexing

        return multiplexing
    if name == "cold-start":
        from tessera.bench.offline.cold_start import cold_start

        return cold_start
    if name == "code-value":
        from tessera.bench.encoder.code_value import code_value

        return code_value
    if name == "aspects":
        from tessera.bench.encoder.aspects import aspects

        return aspects
    if name == "id-churn":
        from tessera.bench.offline.id_churn import id_churn

        return id_churn
    if name == "codebook-change":
        from tessera.bench.offline.codebook_change import codebook_change

        return codebook_change
    if name == "upgrade":
        from tessera.bench.encoder.upgrade import upgrade

        return upgrade
    if name == "shown":
        from tessera.bench.shown.shown import shown

        return shown
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
    from tessera.bench.online.candidates import candidates
    from tessera.bench.online.filtered import filtered
    from tessera.bench.online.freshness import freshness
    from tessera.bench.online.growth import growth
    from tessera.bench.online.message_formats import formats
    from tessera.bench.online.online_learning import online_learning
    from tessera.bench.online.operation import operation
    from tessera.bench.online.policies import policies
    from tessera.bench.online.rollout_rates import rollout
    from tessera.bench.online.serving_reads import serving
    from tessera.bench.online.soak import soak
    from tessera.bench.online.stream_rates import stream
    from tessera.bench.online.swaps import swaps
    from tessera.bench.several.follow_cost import follow
    from tessera.bench.several.stream_processes import stream_processes

    out.mkdir(parents=True, exist_ok=True)
    benches: dict[str, Callable[..., BenchResult]] = {
        "stream": stream,
        "freshness": freshness,
        "stream-processes": stream_processes,
        "follow": follow,
        "online-learning": online_learning,
        "soak": soak,
        "filtered": filtered,
        "serving": serving,
        "candidates": candidates,
        "policies": policies,
        "swaps": swaps,
        "rollout": rollout,
        "operation": operation,
        "growth": growth,
        "formats": formats,
    }
    return partial(benches[name], dataset, out)
