"""Shared parts of the commands: consoles, common options, JSON on standard output."""

import re
import sys
from pathlib import Path
from typing import Annotated, Any, get_args

import msgspec
import typer
from rich.console import Console

from features.errors import TesseraError

# Titles, ids, columns and reasons are printed as they are: what is styled is a `Text`, never a markup of rich.
out_console, err_console = (Console(stderr=stderr, markup=False, emoji=False) for stderr in (False, True))

DatasetArgument = Annotated[Path, typer.Argument(help="The dataset descriptor, a TOML file.")]
OutOption = Annotated[Path, typer.Option("--out", help="One directory per stage; a later run continues there.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the report as JSON on standard output.")]
ModelNameOption = Annotated[str | None, typer.Option("--model", help="Registered model; by default the only one.")]
BundleOption = Annotated[Path | None, typer.Option("--bundle", help="A bundle's directory instead of the champion.")]
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def load_with_split(path: Path, by: str | None) -> Any:
    """Loads a descriptor, with another way to split where one is given."""
    from pydantic import ValidationError

    from features.dataset.descriptor import Dataset, load_dataset

    dataset = load_dataset(path)
    if by is None:
        return dataset
    data = dataset.model_dump()
    data["split"]["by"] = by
    try:
        return Dataset.model_validate(data)
    except ValidationError as error:
        raise TesseraError(f"--split {by}: {error.errors()[0]['msg']}") from error


def one_thread() -> None:
    """For a process that computes in small batches: threads would wait for each other longer than they compute."""
    import torch

    torch.set_num_threads(1)


def print_json(data: Any) -> None:
    """Writes indented JSON to standard output."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(data), indent=2).decode() + "\n")
    # A command that goes on is read through a pipe as it goes.
    sys.stdout.flush()


def parse_bytes(text: str) -> int:
    """A size like 1500000, 1.5MB or 2MiB, in bytes."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in _UNITS:
        raise TesseraError(f"--budget {text}: expected bytes, like 1500000, 1.5MB or 2MiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def one_of(choices: Any, value: str, option: str) -> Any:
    """Checks that an option's value is one of a Literal's.

    Raises:
        TesseraError: it is not.
    """
    allowed = get_args(choices)
    if value not in allowed:
        raise TesseraError(f"{option} {value}: expected one of {', '.join(allowed)}")
    return value


def parse_chunks(pairs: list[str] | None) -> dict[str, int]:
    """Reads `NAME=LOOKUPS`, repeated."""
    found: dict[str, int] = {}
    for pair in pairs or ():
        name, _, count = pair.rpartition("=")
        if not name or not count.isdecimal():
            raise TesseraError(f"--chunks {pair}: expected NAME=LOOKUPS, like item_id=2")
        found[name] = int(count)
    return found


def parse_options(pairs: list[str] | None, option: str) -> tuple[tuple[str, str], ...]:
    """Reads `NAME=VALUE`, repeated, sorted by name."""
    found: dict[str, str] = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not name or not equals or not value:
            raise TesseraError(f"{option} {pair}: expected NAME=VALUE")
        found[name] = value
    return tuple(sorted(found.items()))
