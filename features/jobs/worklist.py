"""Work list of a running job: a directory, on disk or at an object store, that the driver and all workers see.

The driver writes the paths of all shards into one file, and hands each worker a range of its bytes. So the job's graph
is as small for a million shards as for a thousand. Workers record in the directory that they began, what they finished,
and at which shard they failed. From these records the driver counts, and names the shard or the missing worker.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec

from features.storage.file import make_directory, names, read_part, remove, write
from features.storage.location import Location, absolute, locate

MOST_BLOCKS = 512
"""Largest number of blocks of a job, and so of workers that are busy at once."""
_SHARDS, _BEGUN, _DONE, _FAILED = "shards", "begun", "done-", "failed"


class Block(NamedTuple):
    """Range of the list of shards: the unit that an engine hands to a worker.

    Attributes:
        number: Position among the job's blocks, from 0.
        start: Offset of the first byte of the block's lines.
        size_bytes: Bytes of the block's lines.
    """

    number: int
    start: int
    size_bytes: int


class RowCounts(NamedTuple):
    """Rows that a task read, wrote and rejected."""

    read: int
    written: int
    rejected: int


class BlockCount(msgspec.Struct, frozen=True):
    """Count of the work of one block.

    Attributes:
        shards: Shards whose output is in place.
        rows_in: Rows of these shards.
        rows_out: Rows of their output.
        rejected: Rows that the function rejected.
        worker: Host and process that did the block, `HOST:PID`.
    """

    shards: int
    rows_in: int
    rows_out: int
    rejected: int
    worker: str


class Failure(msgspec.Struct, frozen=True):
    """Shard that the function failed at.

    Attributes:
        shard: Name of the shard.
        error: Class and message of the error.
        fixable: True if a user can fix the cause, see `features.errors.TesseraError`.
    """

    shard: str
    error: str
    fixable: bool


@dataclass(frozen=True)
class JobReport:
    """Counts of a finished job, shards that were in place before it included.

    Attributes:
        shards: Shards of the job.
        rows_in: Rows of all shards.
        rows_out: Rows of all output shards.
        rejected: Rows that the function rejected.
        workers: Shards that each worker did or found in place, by `HOST:PID`.
    """

    shards: int
    rows_in: int
    rows_out: int
    rejected: int
    workers: dict[str, int]


def report(counts: Sequence[BlockCount]) -> JobReport:
    """Sums the work of all blocks."""
    workers: Counter[str] = Counter()
    for count in counts:
        workers[count.worker] += count.shards
    return JobReport(
        shards=sum(count.shards for count in counts),
        rows_in=sum(count.rows_in for count in counts),
        rows_out=sum(count.rows_out for count in counts),
        rejected=sum(count.rejected for count in counts),
        workers=dict(workers),
    )


class Worklist:
    """List of a job's shards, and the records of its workers.

    Args:
        directory: Absolute path or address that all workers see.
    """

    def __init__(self, directory: Location) -> None:
        self._directory = directory
        self._counts: dict[int, BlockCount] = {}
        self.poll_s = 0.2 if isinstance(directory, Path) else 1.0
        """Seconds between two reads of the records; a store charges for each."""

    def create(self, shards: Sequence[Location]) -> list[Block]:
        """Writes the list, in place of that of an earlier job, and returns its blocks.

        The shards are dealt to the blocks in turn, so that blocks are alike where neighbouring shards are.
        """
        self.remove()
        make_directory(self._directory)
        lines = list(_absolute(shards))
        count = min(len(lines), MOST_BLOCKS)
        texts = [("\n".join(lines[number::count]) + "\n").encode() for number in range(count)]
        blocks, at = [], 0
        for number, text in enumerate(texts):
            blocks.append(Block(number, at, len(text)))
            at += len(text)
        write(self._directory / _SHARDS, b"".join(texts))
        return blocks

    def remove(self) -> None:
        """Removes the directory."""
        remove(self._directory)

    def shards(self, block: Block) -> list[Location]:
        """Returns the absolute paths, or the addresses, of a block's shards."""
        lines = read_part(self._directory / _SHARDS, block.start, block.size_bytes).decode()
        return [locate(line) for line in lines.splitlines()]

    def begin(self) -> None:
        """Records that a worker runs."""
        write(self._directory / _BEGUN, b"")

    def wait(self) -> None:
        """Forgets that a worker began, before the job is submitted again."""
        remove(self._directory / _BEGUN)

    def finish(self, block: Block, count: BlockCount) -> None:
        """Records that a block is done. A block that is done twice counts once."""
        self._put(f"{_DONE}{block.number}", count)

    def fail(self, failure: Failure) -> None:
        """Records a failure that another try would not cure."""
        self._put(_FAILED, failure)

    @property
    def begun(self) -> bool:
        """True if any worker of the job runs, or ran."""
        return (self._directory / _BEGUN).exists()

    @property
    def failure(self) -> Failure | None:
        """The failure that was recorded last."""
        try:
            return msgspec.json.decode((self._directory / _FAILED).read_bytes(), type=Failure)
        except FileNotFoundError:
            return None

    def finished(self) -> dict[int, BlockCount]:
        """Returns the blocks that are done, by number. Each record is read once."""
        for name in names(self._directory):
            number = name.removeprefix(_DONE)
            if number != name and int(number) not in self._counts:
                content = (self._directory / name).read_bytes()
                self._counts[int(number)] = msgspec.json.decode(content, type=BlockCount)
        return self._counts

    def _put(self, name: str, record: msgspec.Struct) -> None:
        write(self._directory / name, msgspec.json.encode(record))


def _absolute(shards: Sequence[Location]) -> Iterator[str]:
    """Yields absolute paths and addresses; each folder is made absolute once."""
    folders: dict[str, str] = {}
    for shard in shards:
        folder, slash, name = str(shard).rpartition("/")
        folder += slash
        if folder not in folders:
            folders[folder] = str(absolute(locate(folder)))
        yield f"{folders[folder]}/{name}"
