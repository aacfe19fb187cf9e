"""Kept results of benchmarks: used again while the same things and the same code decide them."""

from pathlib import Path
from typing import Any

import pytest

from tessera.bench.harness import data
from tessera.bench.harness.data import remembered


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
