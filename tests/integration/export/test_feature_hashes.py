"""An export as plain hashes on a real Redis server."""

import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import redis

from features.errors import StoreError, TesseraError
from models.export.schema import ExportSchema, read_schema
from models.export.source import ExportSource
from models.export.write import write_export
from serving.store.redis.feature_hashes import features_key, push_export
from tests.build import coloured_dataset

VECTORS = np.array([[0.5, -1.25, 3e-8]], dtype=np.float32)


@pytest.fixture
def name(redis_address: str) -> Iterator[str]:
    """A dataset's name of the test's own, whose keys go when the test ends."""
    found = f"hashes-{uuid.uuid4().hex[:12]}"
    yield found
    with redis.Redis.from_url(redis_address) as client:
        for key in client.scan_iter(features_key(found, "*"), count=1000):
            client.unlink(key)


def export(name: str, out: Path, *, items: int = 1_500) -> ExportSchema:
    """Exports items of which the first has content, and two users."""
    ids = [f"i{number}" for number in range(items)]
    rest: list[None] = [None] * (items - 1)
    table = pl.DataFrame(
        {
            "item_id": ids,
            "colour": ["red", *rest],
            "listed": [True, *(False for _ in rest)],
            "content_vector": pl.Series([*VECTORS.tolist(), *rest], dtype=pl.Array(pl.Float32, 3)),
            "semantic_codes": pl.Series([[3, 1], *rest], dtype=pl.Array(pl.UInt16, 2)),
            "semantic_id": pl.Series([["3", "3.1"], *rest], dtype=pl.List(pl.String)),
        }
    )
    users = pl.DataFrame({"user_id": ["u0", "ü 1"], "age": [1.5, None], "listed": [True, True]})
    source = ExportSource(name, coloured_dataset(), {"encoder": "lsa-1"}, users.lazy(), table.lazy())
    return write_export(source, out)


def test_hashes_hold_the_export_and_vectors_are_little_endian_float32(
    name: str, redis_address: str, tmp_path: Path
) -> None:
    schema = export(name, tmp_path)
    told: list[tuple[int, int]] = []
    assert push_export(redis_address, tmp_path, progress=lambda *done: told.append(done)) == 1_502
    assert told[-1] == (1_502, 1_502)
    with redis.Redis.from_url(redis_address) as client:
        current = client.get(features_key(name, "current")).decode()
        assert current == schema.id
        stored = json.loads(client.get(features_key(name, current, "schema")))
        assert stored == json.loads((tmp_path / "schema.json").read_text())
        item = client.hgetall(features_key(name, current, "items", "i0"))
        assert np.frombuffer(item[b"content_vector"], "<f4").tolist() == VECTORS[0].tolist()
        assert json.loads(item[b"semantic_codes"]) == [3, 1]
        assert json.loads(item[b"semantic_id"]) == ["3", "3.1"]
        assert (item[b"colour"], item[b"listed"]) == (b"red", b"1")
        assert item[b"event_timestamp"] == b"1970-01-01T00:00:00+00:00"
        assert client.hgetall(features_key(name, current, "items", "i1499"))[b"listed"] == b"0"
        assert b"age" not in client.hgetall(features_key(name, current, "users", "ü 1"))


def test_a_new_export_takes_over_whole_and_the_one_before_stays_until_the_next(
    name: str, redis_address: str, tmp_path: Path
) -> None:
    ids = []
    with redis.Redis.from_url(redis_address) as client:
        for items in (3, 4, 4, 5):
            ids.append(export(name, tmp_path, items=items).id)
            push_export(redis_address, tmp_path)
            assert client.get(features_key(name, "current")).decode() == ids[-1]
        keys = {key.decode() for key in client.scan_iter(features_key(name, "*"), count=1000)}
    kept = {key.split(":")[3] for key in keys} - {"current"}
    assert kept == {ids[2], ids[3]}
    assert len(keys) == 1 + (4 + 2 + 1) + (5 + 2 + 1)


def test_a_push_that_fails_leaves_the_current_export(name: str, redis_address: str, tmp_path: Path) -> None:
    first = export(name, tmp_path / "a", items=3)
    push_export(redis_address, tmp_path / "a")
    export(name, tmp_path / "b", items=4)
    (users,) = (tmp_path / "b" / "users").rglob("*.parquet")
    users.write_bytes(b"no parquet")
    with pytest.raises(TesseraError, match="users: the export cannot be read"):
        push_export(redis_address, tmp_path / "b")
    with redis.Redis.from_url(redis_address) as client:
        assert client.get(features_key(name, "current")).decode() == first.id
        assert client.exists(features_key(name, first.id, "users", "u0"))


def test_a_server_that_does_not_answer_is_named(tmp_path: Path) -> None:
    export("unreachable", tmp_path, items=2)
    assert read_schema(tmp_path).name == "unreachable"
    with pytest.raises(StoreError, match=r"redis://127\.0\.0\.1:1/0 failed"):
        push_export("redis://127.0.0.1:1/0", tmp_path)
