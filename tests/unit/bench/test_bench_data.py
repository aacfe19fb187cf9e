"""Kept results of benchmarks are used again while the same things and the same code decide them. Frames are chosen."""

from pathlib import Path
from typing import Any

import pytest

from features.dataset.descriptor import load_dataset
from tessera.bench.harness import data
from tessera.bench.harness.data import dataset_frame, remembered
from tessera.demo.synthetic import write_synthetic


def test_a_kept_result_is_made_again_when_what_decides_it_or_the_code_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def work() -> dict[str, Any]:
        calls.append(1)
        return {"calls": len(calls)}

    def ask(decided_by: Any) -> int:
        return int(remembered(tmp_path / "kept.json", "tessera.bench.offline.multiplexing", decided_by, work)["calls"])

    assert [ask("a"), ask("a"), ask("b"), ask("b")] == [1, 1, 2, 2]
    monkeypatch.setattr(data, "code_version", lambda module: f"an edited {module}")
    assert [ask("b"), ask("b")] == [3, 3]


def test_a_frame_has_the_aggregates_that_are_asked_for(tmp_path: Path) -> None:
    dataset = load_dataset(write_synthetic(tmp_path, users=50, items=100, events=1_000))
    bare, full = dataset_frame(dataset), dataset_frame(dataset, aggregates="default")
    assert bare.aggregates.columns == ()
    assert "aggregate.user_rate.all" in full.aggregates.columns
    assert set(full.examples.columns) - set(bare.examples.columns) == set(full.aggregates.columns)
