"""`tessera bench NAME`: chooses the benchmark, prints its rows and claims."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from features.errors import TesseraError
from tessera.bench.benches import BENCHES, NEW_USERS, Bench, takers
from tessera.bench.harness.needs import build_peers, check_datasets, check_servers
from tessera.terminal import JsonOption, OutOption, err_console, out_console, print_json

if TYPE_CHECKING:
    from features.dataset.descriptor import Dataset
    from tessera.bench.harness.result import BenchResult

NAMES = tuple(BENCHES)


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
        typer.Option(help=f"{', '.join(takers('part'))}: a part, such as step; repeatable. Default: all."),
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

    if name not in BENCHES:
        raise TesseraError(f"benchmark {name!r} is unknown; there are: {', '.join(NAMES)}")
    found = BENCHES[name]
    check_servers(name, found.needs, Settings.from_environment())
    given = {"part": part or None, "held-out": held_out, "model": model, "device": device, "seconds": seconds}
    given = {option: value for option, value in given.items() if value is not None}
    if against is not None and name != "streaming":
        from tessera.bench.harness.against import against as compare

        options = [f"--seeds={seeds}", *(f"--split={way}" for way in split or ())]
        options += [f"--part={one}" for one in part or ()]
        options += [f"--{option}={value}" for option, value in given.items() if option != "part"]
        options += [f"--dataset={dataset}"] if dataset is not None else []
        options += ["--users"] if users else []
        turns = compare(against, name, options, out / f"{name}-against", rounds=rounds, console=err_console)
        print_json(turns.to_json()) if json else render(turns, out_console)
        return
    if users and (name != "cold-start" or given):
        raise TesseraError("--users is for cold-start without --held-out and --part")
    for option in given:
        if option not in found.takes:
            raise TesseraError(f"--{option} is for {', '.join(takers(option))}, not for {name}")
    datasets: list[Dataset] = []
    if device is not None:
        if part:
            raise TesseraError("--part: a measurement of a --device has no parts; leave one of the two out")
        found, chosen = Bench(""), _on_device(name, device, out / f"{name}-{device}")
    else:
        found = NEW_USERS if users else found
        chosen, datasets = found.prepared("new-users" if users else name, dataset, split or [], out)
        named = {"part": "parts", "held-out": "held_out"}
        chosen = partial(chosen, **{named.get(option, option): value for option, value in given.items()})
    if against is not None:
        chosen = partial(chosen, commit=against)
    check_datasets(name, found.needs, datasets)
    if found.needs.peers:
        chosen = partial(chosen, peers=build_peers(found.needs, out / "peers", err_console))
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


def _on_device(name: str, device: str, out: Path) -> "Callable[..., BenchResult]":
    """Returns the part of a benchmark that measures a device.

    Raises:
        TesseraError: There is no such device.
    """
    from features.device import resolve

    found = resolve(device, fused=name == "training-speed").name  # type: ignore[arg-type]
    if name == "training-speed":
        from tessera.bench.device.training import training_device

        return partial(training_device, out, found)
    if name == "encoders":
        from tessera.bench.device.encoders import encoders_device

        return partial(encoders_device, found)
    from tessera.bench.device.codebook import codebook_device

    return partial(codebook_device, found)
