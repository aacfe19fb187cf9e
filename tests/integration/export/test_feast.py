"""Feast itself applies the generated repository, materialises it into SQLite and Redis, and gives the frame's rows."""

import json
import math
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from features.errors import TesseraError
from models.export.feast import materialize, write_repository
from models.export.write import write_export
from tessera.bench.harness.needs import FEAST
from tessera.bench.harness.peer import PEER_FOLDER, peer_python
from tests.export_source import made
from tests.integration.world import quiet

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def feast_python() -> Path:
    """Interpreter of Feast's environment, which is built once and kept."""
    pins = PEER_FOLDER / FEAST.pins
    try:
        return peer_python(ROOT / "out" / "peers" / pins.stem, pins, quiet())
    except TesseraError as error:
        if os.environ.get("REQUIRE_SERVICES") == "1":
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.mark.slow
def test_feast_reads_back_the_rows_of_the_frame(feast_python: Path, redis_address: str, tmp_path: Path) -> None:
    source, frame = made(tmp_path, events=200)
    export, sqlite, redis = (tmp_path / name for name in ("export", "sqlite", "redis"))
    schema = write_export(source, export, buckets=2)
    write_repository(schema, export, sqlite)
    materialize(str(feast_python.parent / "feast"), sqlite)
    # The project is the test's own, since its keys in the shared server carry the name.
    write_repository(schema, export, redis, redis=redis_address)
    configuration = redis / "feature_store.yaml"
    configuration.write_text(configuration.read_text().replace("project: coloured", f"project: c{os.getpid()}"))
    reader = Path(__file__).with_name("feast_reader.py")
    done = subprocess.run(
        [feast_python, reader, export, sqlite, redis], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    items = pl.read_parquet(export / "items")
    for store in ("sqlite", "redis"):
        check_online(found["online"][store], {row["item_id"]: row for row in items.to_dicts()})
    joined = found["joined"]
    examples = pl.read_parquet(export / "examples").sort("event")
    assert joined["event"] == examples["event"].to_list()
    assert joined["history"] == examples["history"].to_list()
    for name in frame.aggregates.columns:
        assert [math.nan if value is None else value for value in joined[name]] == pytest.approx(
            examples[name].to_list(), nan_ok=True, rel=0, abs=0
        )
    of_item = examples.join(items, on="item_id", how="left", maintain_order="left")
    assert joined["colour"] == of_item["colour"].to_list()
    assert joined["semantic_codes"] == of_item["semantic_codes"].to_list()
    users = pl.read_parquet(export / "users")
    assert joined["age"] == examples.join(users, on="user_id", how="left", maintain_order="left")["age"].to_list()


def check_online(found: dict[str, list[Any]], items: dict[str, dict[str, Any]]) -> None:
    """Features of an item with content, one without, one that only events have, and one that nobody knows."""
    assert found["item_id"] == ["i0", "i38", "i39", "nobody"]
    for name in ("content_vector", "semantic_codes", "semantic_id"):
        assert found[name] == [items[key][name] if key in items else None for key in found["item_id"]]
    assert found["age"] == [0.0, 1.5, 3.0, None]
    assert found["history"] == [["i1"], ["i3", "i2"], None, None]


@pytest.mark.parametrize(
    ("command", "message"), [("/no/feast", "install Feast into an environment of its own"), ("false", "exit status 1")]
)
def test_a_command_of_feast_that_fails_is_shown(command: str, message: str, tmp_path: Path) -> None:
    source, _ = made(tmp_path, events=40)
    schema = write_export(replace(source, examples=None), tmp_path / "export")
    write_repository(schema, tmp_path / "export", tmp_path / "repository")
    with pytest.raises(TesseraError, match=message):
        materialize(command, tmp_path / "repository")
