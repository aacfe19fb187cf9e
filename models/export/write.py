"""Writes an export: parquet files in directories by partition, and the schema file, whole or not at all."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.dataset as arrow_dataset

from features.durable import make_directory, recover_directory, replace_directory
from features.errors import TesseraError
from features.lock import locked
from features.storage.copy import files_below, upload
from features.storage.file import remove, write
from features.storage.location import Location, Remote
from models.export.dtypes import described, to_arrow
from models.export.meaning import meaning_of, models_of
from models.export.schema import (
    FORMAT,
    SCHEMA,
    ExportColumn,
    ExportSchema,
    ExportTable,
    identified,
    read_schema,
    write_schema,
)
from models.export.source import ExportSource
from models.export.tables import CHUNK_ROWS, By, TableRows, tables_of

# Files that are open at once; beyond these a partition continues in a new file.
_OPEN_FILES: Final = 128
# Rows of a row group; a partition waits for the least number before it writes.
_LEAST_ROWS: Final = 4_096
_MOST_ROWS: Final = 65_536
_MOST_PARTITIONS: Final = 100_000
# File at a store while an export is written there.
_PARTIAL: Final = ".partial"

Progress = Callable[[int, int], None]


def write_export(
    source: ExportSource,
    destination: Location,
    *,
    by: By = "split",
    buckets: int | None = None,
    progress: Progress = lambda done, total: None,
) -> ExportSchema:
    """Writes an export, replacing an earlier export at the same place in one rename.

    Memory follows the size of a chunk, the ids of users and items, and the rows that wait for their row group. A store
    has no rename: an export is written to a temporary directory on this disk first. At the store its `schema.json` is
    removed before other files and written after them, so an export with a schema is whole.

    Args:
        source: Run or bundle.
        destination: Directory of the export, on disk or at an object store: new, empty, or an earlier export.
        by: Partitioning of the examples: part of the data, or date of the event in UTC.
        buckets: Number of hash partitions of the other tables. Default: by their rows.
        progress: Called with the rows written and all rows.

    Returns:
        The schema, which is also the file `schema.json`.

    Raises:
        TesseraError: The directory holds other files, another process exports into it, or a column cannot be exported.
        OSError: The disk refused the write, and an earlier export stays; or the store did.
    """
    if isinstance(destination, Remote):
        with tempfile.TemporaryDirectory(prefix="tessera-") as directory:
            _check_place(destination)
            made = write_export(source, Path(directory, "export"), by=by, buckets=buckets, progress=progress)
            _publish(Path(directory, "export"), destination)
        return made
    destination = destination.absolute()
    make_directory(destination.parent)
    with locked(destination, wait_s=0):
        recover_directory(destination)
        _check_place(destination)
        partial = destination.with_name(f".{destination.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            schema = _fill(source, partial, tables_of(source, by=by, buckets=buckets), progress)
            replace_directory(partial, destination)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return schema


def _publish(made: Path, destination: Remote) -> None:
    """Puts a complete export at an address, in place of an earlier export or of one that was interrupted."""
    write(destination / _PARTIAL, b"")
    remove(destination / SCHEMA)
    upload(made, destination, last=SCHEMA)
    wanted = {destination / path.relative_to(made).as_posix() for path in made.rglob("*")}
    for file in files_below(destination):
        if file not in wanted:
            remove(file)


def _check_place(destination: Location) -> None:
    if isinstance(destination, Remote):
        if not destination.exists() or (destination / _PARTIAL).exists():
            return
    elif not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    if not destination.is_dir() or not (destination / SCHEMA).is_file():
        raise TesseraError(
            f"{destination} is no export (it has no {SCHEMA}), and is not replaced; choose another directory"
        )
    read_schema(destination)


def _fill(source: ExportSource, directory: Path, tables: list[TableRows], progress: Progress) -> ExportSchema:
    total, written = sum(table.rows for table in tables), 0
    exported: dict[str, ExportTable] = {}

    def advance(rows: int) -> None:
        nonlocal written
        written += rows
        progress(written, total)

    for table in tables:
        arrow = to_arrow(table.empty(), table.name).schema
        exported[table.name] = _described(source, table)
        _write(table, arrow, directory / table.name, advance)
    schema = identified(ExportSchema(FORMAT, "", source.name, dict(source.ids), exported))
    write_schema(schema, directory)
    return schema


def _write(table: TableRows, arrow: pa.Schema, directory: Path, advance: Callable[[int], None]) -> None:
    """Writes the files of a table."""
    column = arrow.field(table.partitioning.column)

    def batches() -> Iterator[pa.RecordBatch]:
        for chunk in table.chunks(CHUNK_ROWS):
            yield from to_arrow(chunk, table.name).to_batches()
            advance(chunk.height)

    parquet = arrow_dataset.ParquetFileFormat()
    arrow_dataset.write_dataset(
        pa.RecordBatchReader.from_batches(arrow, batches()),
        directory,
        format=parquet,
        file_options=parquet.make_write_options(compression="zstd"),
        basename_template="part-{i}.parquet",
        partitioning=arrow_dataset.partitioning(pa.schema([column]), flavor="hive"),
        # Rows keep their order, and equal sources give equal bytes.
        use_threads=False,
        preserve_order=True,
        max_partitions=_MOST_PARTITIONS,
        max_open_files=_OPEN_FILES,
        min_rows_per_group=_LEAST_ROWS,
        max_rows_per_group=_MOST_ROWS,
    )


def _described(source: ExportSource, table: TableRows) -> ExportTable:
    """Returns the entry of a table in the schema file."""
    columns = []
    for name, dtype in table.empty().schema.items():
        if name == table.partitioning.column:
            continue
        dtype_name, shape = described(dtype)
        meaning = meaning_of(table.name, name, source.dataset, source.aggregates)
        models = models_of(table.name, name, dict(source.ids))
        columns.append(ExportColumn(name, dtype_name, shape, meaning, models))
    return ExportTable(table.rows, list(table.keys), table.timestamp, table.partitioning, columns)
