"""The benchmark of formats: its rows on a small bundle, and the claims that it judges from rows."""

from pathlib import Path
from typing import Any

import msgspec

from models.bundle.bundle import write_bundle
from tessera.bench.online.message_formats import claims, measure, sent_rows, trained
from tests.build import coloured_parts, coloured_tables


def test_the_same_rows_train_one_table_in_every_format(tmp_path: Path) -> None:
    bundle = write_bundle(coloured_parts(tmp_path, events=200, epochs=0), tmp_path / "bundle")
    events = coloured_tables(events=60)["events"].drop("event").to_dicts()
    sent = sent_rows([msgspec.json.encode(row) for row in events], rows=100, chunk=20)
    rows = [*measure(bundle, sent, seed=0, round_=0), *trained(bundle, sent, seed=0)]
    tables = [row for row in rows if row["part"] == "table"]
    assert [row["format"] for row in tables] == ["json", "avro", "protobuf", "arrow"]
    assert all(row["events"] == 100 and row["rejected"] == 0 for row in tables)
    assert claims(rows)[1].holds
    assert all(row["rows_per_cpu_s"] > 0 for row in rows if row["part"] == "decode")


def _rows(ratio: float, shas: list[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"part": "decode", "format": "arrow", "json_over_own": ratio}]
    return found + [{"part": "table", "seed": seed, "sha256": sha} for seed, sha in enumerate(shas) for _ in range(2)]


def test_a_slow_decoder_and_a_table_that_differs_fail_their_claims() -> None:
    assert [claim.holds for claim in claims(_rows(2.0, ["a", "b"]))] == [True, True]
    differs = [*_rows(1.9, ["a"]), {"part": "table", "seed": 0, "sha256": "other"}]
    assert [claim.holds for claim in claims(differs)] == [False, False]
