"""Lends a batch job's files to workers that share no disk with the driver, through a folder at an object store.

The shards and the directories that the function reads are put there before the job, and the output is fetched after it.
The folder has a random name, which the output directory keeps until everything is fetched. So a job that was
interrupted finds its finished shards. After the fetch the folder is removed.
"""

import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from features.durable import write_file
from features.errors import TesseraError
from features.storage.copy import files_below, transfer, upload
from features.storage.file import names, remove
from features.storage.location import Location, Remote, locate

_KEPT, _FETCHED = ".exchange", ".fetched"


class Lent(NamedTuple):
    """Files of a job as its workers see them.

    Attributes:
        shards: Shards in order.
        out: Directory of the output shards.
        reads: Directories that the function reads, by the name of its argument.
    """

    shards: list[Location]
    out: Location
    reads: dict[str, Location]


def is_finished(shards: Sequence[Location], out: Location) -> bool:
    """Returns whether each shard has its output on disk, fetched or made there."""
    return isinstance(out, Path) and not (out / _KEPT).exists() and {path.name for path in shards} <= {*names(out)}


@contextmanager
def lent(exchange: str, shards: Sequence[Location], out: Path, reads: Mapping[str, Location]) -> Iterator[Lent]:
    """Puts the files of a job into a folder at an address. Fetches the output if the body ends without an error.

    Args:
        exchange: Address that driver and workers can read and write.
        shards: Shards on disk.
        out: Existing directory of the output.
        reads: Directories on disk that the function reads, by the name of its argument.

    Raises:
        TesseraError: The address is none of an object store.
        StorageError: The store does not answer.
    """
    folder = _folder(exchange, out)
    have = {file.address for file in files_below(folder)}
    given = [folder / "in" / shard.name for shard in shards]
    transfer([(shard, put) for shard, put in zip(shards, given, strict=True) if put.address not in have])
    there = {name: folder / name for name in reads}
    for name, directory in reads.items():
        assert isinstance(directory, Path)
        upload(directory, there[name])
    yield Lent([*given], folder / "out", {**there})
    _fetch(folder / "out", out)
    (out / _KEPT).unlink()
    remove(folder)


def _folder(exchange: str, out: Path) -> Remote:
    """Returns the folder of a new job, or of the job that was interrupted."""
    kept = out / _KEPT
    if not kept.exists():
        write_file(kept, secrets.token_hex(8).encode())
    place = locate(f"{exchange.rstrip('/')}/{kept.read_text()}")
    if isinstance(place, Path):
        kept.unlink()
        raise TesseraError(f"exchange {exchange}: expected the address of an object store, such as s3://bucket/folder")
    return place


def _fetch(folder: Remote, out: Path) -> None:
    """Fetches the output, rejected rows included. A shard appears in `out` when all shards are on this disk."""
    aside = out / _FETCHED
    shutil.rmtree(aside, ignore_errors=True)
    files = {file.address.removeprefix(f"{folder.address}/"): file for file in files_below(folder)}
    # Records of the job are hidden.
    wanted = {name: file for name, file in files.items() if not name.startswith(".")}
    transfer([(file, aside / name) for name, file in wanted.items()])
    for name in wanted:
        (out / name).parent.mkdir(exist_ok=True)
        (aside / name).rename(out / name)
    shutil.rmtree(aside)
