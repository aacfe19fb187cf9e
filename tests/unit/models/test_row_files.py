"""Rows in files: whatever the ranges of files and readers, the same rows come back, and a bundle ranks the same."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from features.errors import BundleError
from models.bundle.bundle import BundleParts, load_bundle, write_bundle
from models.ranker.loading import examples, sighted
from models.ranker.train import snapshot
from models.table.reference import ReferenceTable
from models.table.row_files import FileTable, load_rows, row_files, row_ranges, write_rows
from models.table.schema import Schema
from tests.build import coloured_frame, coloured_parts, coloured_schema

FRAME = coloured_frame()
SCHEMA = coloured_schema(FRAME)


@given(rows=st.integers(1, 40), count=st.integers(1, 12))
def test_ranges_are_consecutive_and_hold_every_row_once(rows: int, count: int) -> None:
    ranges = row_ranges(rows, count)
    assert len(ranges) == count
    assert [row for own in ranges for row in range(own.low, own.high)] == list(range(rows))
    assert max(len(own) for own in ranges) == -(-rows // count)


def table(schema: Schema) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(3)
    return torch.rand(schema.rows, schema.dim, generator=rng), torch.rand(schema.rows, generator=rng)


@pytest.mark.parametrize("files", [1, 2, 3])
@pytest.mark.parametrize("readers", [1, 2, 5])
def test_readers_of_any_ranges_read_files_of_any_ranges(files: int, readers: int, tmp_path: Path) -> None:
    weight, accumulator = table(SCHEMA)
    write_rows(tmp_path, weight, accumulator, ranges=files)
    assert len(row_files(tmp_path)) == files
    found = []
    for own in row_ranges(SCHEMA.rows, readers):
        target = {"weight": torch.empty(len(own), SCHEMA.dim), "accumulator": torch.empty(len(own))}
        load_rows(tmp_path, SCHEMA, target, own)
        found.append(target)
    assert torch.equal(torch.cat([part["weight"] for part in found]), weight)
    assert torch.equal(torch.cat([part["accumulator"] for part in found]), accumulator)


@pytest.mark.parametrize("files", [1, 3])
def test_a_stored_table_reads_what_a_table_in_memory_reads(files: int, tmp_path: Path) -> None:
    weight, accumulator = table(SCHEMA)
    write_rows(tmp_path, weight, accumulator, ranges=files)
    part = FRAME.part("train")
    batch = sighted(SCHEMA, FRAME, FRAME.blocks("train")).with_events(part).batch(examples(part.head(64)))
    twin = ReferenceTable(SCHEMA, learning_rate=0.1)
    twin.weight.copy_(weight)
    with torch.no_grad():
        found = FileTable(tmp_path, SCHEMA)(batch)
        assert torch.equal(found, twin(batch))
    assert found.abs().sum() > 0


def test_files_that_are_not_the_tables_rows_are_refused(tmp_path: Path) -> None:
    write_rows(tmp_path, *table(SCHEMA), ranges=3)
    row_files(tmp_path)[1].unlink()
    with pytest.raises(BundleError, match=r"hold .* rows, the schema"):
        FileTable(tmp_path, SCHEMA)
    with pytest.raises(BundleError, match="numbers, the schema's 8"):
        FileTable(tmp_path, replace(SCHEMA, dim=8))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> BundleParts:
    return coloured_parts(tmp_path_factory.mktemp("parts"))


def test_a_bundle_in_ranges_has_the_rows_and_scores_of_a_bundle_in_one_file(parts: BundleParts, tmp_path: Path) -> None:
    state = tmp_path / "trained"
    state.mkdir()
    write_rows(state, parts.ranker.table.weight, parts.ranker.table.accumulator, ranges=3)
    one = write_bundle(parts, tmp_path / "one")
    several = load_bundle(write_bundle(replace(parts, rows=state), tmp_path / "several").directory)
    assert (one.manifest.format, several.manifest.format) == (4, 6)
    assert [path.name for path in row_files(several.directory)] == [f"rows-0000{n}.safetensors" for n in range(3)]
    assert several.rows().tobytes() == one.rows().tobytes()
    states = snapshot(one.ranker()), snapshot(several.ranker())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    items = one.items["item_id"].to_list()[:5]
    np.testing.assert_array_equal(one.rank("u1", items), several.rank("u1", items))
    damaged = row_files(several.directory)[2]
    damaged.unlink()
    with pytest.raises(BundleError, match=f"{damaged.name} is missing"):
        load_bundle(several.directory)
