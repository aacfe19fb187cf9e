"""Shared parts of the commands: consoles, common options, JSON on standard output."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from features.errors import TesseraError

# Titles, ids, columns and reasons are printed as they are: what is styled is a `Text`, never a markup of rich.
out_console, err_console = (Console(stderr=stderr, markup=False, emoji=False) for stderr in (False, True))

DatasetArgument = Annotated[Path, typer.Argument(help="The dataset descriptor, a TOML file.")]
OutOption = Annotated[Path, typer.Option("--out", help="One directory per stage; a later run continues there.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the report as JSON on standard output.")]
ModelNameOption = Annotated[str | None, typer.Option("--model", help="Registered model; by default the only one.")]
BundleOption = Annotated[
    str | None, typer.Option("--bundle", help="A bundle instead of the champion: its directory, or an address.")
]


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
    import msgspec

    sys.stdout.write(msgspec.json.format(msgspec.json.encode(data), indent=2).decode() + "\n")
    # A command that goes on is read through a pipe as it goes.
    sys.stdout.flush()
