"""Vectors that a team brings: LSA vectors, exported and read back, give the codes, neighbours and scores of LSA.

The law is held for files (jsonl, parquet lists and arrays, npy), for the stream and over HTTP, bit for bit.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from fastapi.testclient import TestClient

from features.content.chain import Chain
from features.content.given.encoder import GivenVectors
from features.content.kinds import load_encoder
from features.dataset.descriptor import load_dataset
from features.dataset.profile import profile
from features.errors import BundleError, DatasetError, TesseraError
from features.jobs.shard import read_shards
from models.bundle import record
from models.bundle.bundle import load_bundle
from models.ranker.loading import content_vectors
from serving.api.app import AppParts, create_app
from serving.api.ingest import Intake
from serving.api.log_sink import LogSink
from serving.ranking.service import RankService
from serving.store.fill import fill_store
from serving.store.memory import MemoryStore
from serving.traffic.router import Router
from streaming.dead_letter import read_dead_letters
from streaming.trainer import TrainerOptions
from tessera.demo.synthetic import new_item
from tessera.encoders.upgrade import UpgradeOptions, upgrade
from tessera.pipeline.options import RunOptions, load_options
from tessera.pipeline.run import run
from tessera.settings import Settings
from tessera.stream_service import StreamConnections, StreamService
from tests.integration.world import World, quiet

TEXT = 'text = ["title", "description"]'
SPACE = "lsa-export"
SMALL = ("quantizer=residual-kmeans", "levels=2", "codes=8")


def descriptor(world: World, directory: Path, vectors: str, *, path: str = "items.jsonl", text: str = "") -> Path:
    """Writes the world's descriptor with vectors, with or without text, beside links to its tables."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("users.parquet", "events.parquet"):
        if not (directory / name).exists():
            (directory / name).symlink_to(world.dataset.directory / name)
    plain = world.dataset.source.read_text().replace('"items.jsonl"', f'"{path}"')
    (directory / "dataset.toml").write_text(plain.replace(TEXT, f"{text}\nvectors = {vectors}"))
    return directory / "dataset.toml"


def rows_of(world: World) -> list[dict[str, Any]]:
    """The catalogue's rows, with the vector of the world's encoder as floats of JSON."""
    lines = (world.dataset.directory / "items.jsonl").read_text().splitlines()
    vectors = dict(read_shards(world.directory / "encode" / "vectors").iter_rows())
    return [row | {"vector": list(vectors[row["item_id"]])} for row in map(json.loads, lines)]


def write_jsonl(rows: list[dict[str, Any]], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def given(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The world's run again, from its exported vectors alone."""
    directory = tmp_path_factory.mktemp("given")
    write_jsonl(rows_of(world), directory / "data")
    file = descriptor(world, directory / "data", f'{{ lsa2 = {{ column = "vector", space = "{SPACE}" }} }}')
    dataset = load_dataset(file)
    result = run(dataset, directory / "run", RunOptions(), console=quiet(), registry=None, until="publish")
    assert result.bundle is not None
    return World(dataset, directory / "run", result.bundle)


class Server:
    """A server and a stream of one bundle, over a log and a store of their own."""

    def __init__(self, world: World, directory: Path) -> None:
        self.bundle, self.settings, self.store = world.bundle, Settings(home=directory), MemoryStore()
        fill_store(self.store, self.bundle)
        self.service = RankService(self.bundle, self.store)
        self.sink = LogSink(self.settings.open_log, self.settings.topics)
        self.client = TestClient(create_app(Router(self.service), AppParts(intake=Intake(self.sink))))

    def post(self, path: str, **body: Any) -> Any:
        return self.client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})

    def drain(self) -> None:
        with contextlib.closing(self.settings.open_log()) as log:
            connections = StreamConnections.shared(log, self.store, topics=self.settings.topics)
            with StreamService(self.bundle, connections, TrainerOptions(batch=64, lateness_s=1e9)) as stream:
                stream.drain()
        self.service.refresh()

    def record(self, item: str) -> record.ItemRecord:
        (payload,) = self.store.read_records(self.bundle.id, record.ITEM, [item])
        assert payload is not None
        return record.decode_item(payload)


@pytest.fixture
def servers(world: World, given: World, tmp_path: Path) -> Iterator[tuple[Server, Server]]:
    made = [Server(one, tmp_path / name) for name, one in (("text", world), ("given", given))]
    with contextlib.ExitStack() as stack:
        for one in made:
            stack.enter_context(one.client)
            stack.enter_context(contextlib.closing(one.sink))
        yield made[0], made[1]


def test_exported_vectors_give_the_same_codes_vectors_and_scores(world: World, given: World) -> None:
    assert given.bundle.manifest.encoder is not None
    assert given.bundle.manifest.encoder.startswith(f"{SPACE}-")
    columns = ["item_id", "content_vector", "semantic_codes"]
    assert given.bundle.items.select(columns).equals(world.bundle.items.select(columns))
    assert given.bundle.rows().tobytes() == world.bundle.rows().tobytes()
    items = world.bundle.items["item_id"].to_list()
    for user in world.bundle.history["user_id"].unique(maintain_order=True).to_list()[:5]:
        assert given.bundle.rank(user, items).tobytes() == world.bundle.rank(user, items).tobytes()


@pytest.mark.parametrize("form", ["list", "array", "npy"])
def test_every_file_form_gives_the_same_vectors(world: World, tmp_path: Path, form: str) -> None:
    rows, data = rows_of(world), tmp_path / "data"
    data.mkdir()
    table = pl.DataFrame([{name: value for name, value in row.items() if name != "vector"} for row in rows])
    vectors = np.array([row["vector"] for row in rows], dtype=np.float32)
    if form == "npy":
        np.save(data / "clip.npy", vectors)
    else:
        own = pl.Series("vector", vectors)
        table = table.with_columns(own if form == "array" else own.arr.to_list())
    table.write_parquet(data / "items.parquet")
    declared = '{ clip = "clip.npy" }' if form == "npy" else '{ clip = "vector" }'
    dataset = load_dataset(descriptor(world, data, declared, path="items.parquet"))
    run(dataset, tmp_path / "run", load_options(dataset), console=quiet(), registry=None, until="encode")
    found, expected = (read_shards(place / "encode" / "vectors") for place in (tmp_path / "run", world.directory))
    assert found.equals(expected)
    shown = profile(dataset)
    assert (shown.text, shown.vectors["clip"].space, shown.vectors["clip"].dim) == (None, "clip", vectors.shape[1])


def test_a_streamed_item_and_an_item_over_http_have_the_codes_and_neighbours_of_text(
    servers: tuple[Server, Server], world: World
) -> None:
    text, given = servers
    row = new_item(4)
    assert world.bundle.encoder is not None
    (vector,) = world.bundle.encoder.encode(["\n".join((row["title"], row["description"]))])
    assert text.post("/v1/items", items=[row]).status_code == 202
    answer = given.post("/v1/items", items=[row | {"vector": vector.tolist()}])
    assert answer.status_code == 202, answer.text
    for server in servers:
        server.drain()
    found, expected = given.record(row["item_id"]), text.record(row["item_id"])
    assert (found.vector, found.codes, found.features) == (expected.vector, expected.codes, expected.features)
    user = world.bundle.history["user_id"][0]
    ids = [row["item_id"], *world.bundle.items["item_id"].to_list()[:99]]
    for body in ({"item": row["item_id"], "k": 20}, {"user": user, "k": 20}):
        near = [server.post("/v1/retrieve", **body).json()["items"] for server in servers]
        assert near[0] == near[1]
    ranked = [server.post("/v1/rank", user=user, candidates=ids, k=100).json()["items"] for server in servers]
    assert ranked[0] == ranked[1]


@pytest.mark.parametrize(
    ("vector", "fault"),
    [
        ([0.5] * 3, "holds 3 numbers, expected 128"),
        ([0.0] * 128, "has length 0"),
        ([1e39] * 128, "number 1 is infinite in float32"),
        ([], "holds an empty list"),
        ([0.5] * 127 + ["x"], "clip_vector"),
        ([0.5] * 127 + [None], "clip_vector"),
        ("clip", "clip_vector"),
    ],
)
def test_a_vector_that_cannot_be_used_is_refused_by_the_field_of_the_request(
    servers: tuple[Server, Server], vector: Any, fault: str
) -> None:
    row = new_item(5) | {"vector": vector}
    answer = servers[1].post("/v1/items", items=[new_item(6) | {"vector": [0.5] * 128}, row])
    assert answer.status_code == 422
    problem = answer.json()
    assert "items.1" in json.dumps(problem)
    assert fault.replace("clip_vector", "vector") in problem["detail"], problem


def test_a_message_with_a_wrong_vector_is_a_dead_letter_and_stops_no_other(given: World, tmp_path: Path) -> None:
    server = Server(given, tmp_path)
    good, bad = new_item(7) | {"vector": [0.5] * 128}, new_item(8) | {"vector": [0.5] * 64}
    with contextlib.closing(server.settings.open_log()) as log:
        log.create_topics(server.settings.topics.partitions())
        log.append(server.settings.topics.items, [(b"", json.dumps(row).encode()) for row in (bad, good)])
    server.drain()
    assert server.record(good["item_id"]).codes
    assert server.store.read_records(given.bundle.id, record.ITEM, [bad["item_id"]]) == [None]
    with contextlib.closing(server.settings.open_log()) as log:
        (filed,) = read_dead_letters(log, server.settings.topics)
    assert "vectors.lsa2: holds 64 numbers, expected 128" in filed.letter.reason
    server.sink.close()


def test_a_text_is_refused_where_no_encoder_reads_text(given: World, servers: tuple[Server, Server]) -> None:
    with pytest.raises(BundleError, match=r"reads vectors.lsa2 of space 'lsa-export', which has no text encoder"):
        given.bundle.semantic_ids(["a red bicycle"])
    assert not given.bundle.reads_text
    answer = servers[1].post("/v1/retrieve", text="a red bicycle")
    assert answer.status_code == 422
    assert "no text encoder" in answer.json()["detail"]
    answer = servers[1].post("/v1/retrieve", text="a red bicycle", channels=["content"])
    assert "channels: " in answer.json()["detail"]
    coded = given.bundle.items.filter(pl.col("content_vector").is_not_null())
    vectors, codes = coded["content_vector"].to_numpy(), coded["semantic_codes"].to_numpy()
    np.testing.assert_array_equal(given.bundle.semantic_ids(vectors={"lsa2": vectors}), codes)
    with pytest.raises(DatasetError, match=r"vectors.lsa2, row 1: number 1 is NaN"):
        given.bundle.semantic_ids(vectors={"lsa2": np.where(np.arange(3)[:, None] == 1, np.nan, vectors[:3])})


def test_vectors_stand_beside_text_and_words_still_answer_a_text(world: World, tmp_path: Path) -> None:
    write_jsonl(rows_of(world), tmp_path / "data")
    dataset = load_dataset(descriptor(world, tmp_path / "data", '{ clip = "vector" }', text=TEXT))
    options = load_options(dataset, ["encoder=lsa+clip", *SMALL, "training.max_epochs=1"])
    result = run(dataset, tmp_path / "run", options, console=quiet(), registry=None, until="publish")
    assert result.bundle is not None
    encoder = result.bundle.encoder
    assert isinstance(encoder, Chain)
    assert [type(one) for one in encoder.bases][1] is GivenVectors
    assert not result.bundle.reads_text
    own = content_vectors(world.bundle.items)
    # Both bases are the same vectors here, so each half of a joined vector is the vector over the root of 2.
    np.testing.assert_allclose(content_vectors(result.bundle.items), np.hstack([own, own]) / np.sqrt(2), atol=1e-6)
    server = Server(World(dataset, tmp_path / "run", result.bundle), tmp_path / "home")
    row = world.bundle.items.row(7, named=True)
    answer = server.post("/v1/retrieve", text=row["text"], k=3).json()
    assert answer["channels"] == ["lexical"]
    assert answer["items"][0]["item"] == row["item_id"]
    server.sink.close()


def test_a_warm_start_of_another_space_is_refused(world: World, given: World, tmp_path: Path) -> None:
    write_jsonl(rows_of(world), tmp_path / "data")
    other = load_dataset(descriptor(world, tmp_path / "data", '{ lsa2 = { column = "vector", space = "v2" } }'))
    options = RunOptions(warm_start=given.directory)
    with pytest.raises(TesseraError, match=r"space 'lsa-export', but the descriptor has them in space 'v2'"):
        run(other, tmp_path / "run", options, console=quiet(), registry=None, until="encode")


def test_an_upgrade_maps_new_vectors_into_the_space_of_the_old(world: World, tmp_path: Path) -> None:
    rows = rows_of(world)
    vectors = np.array([row["vector"] for row in rows])
    turned = vectors @ np.linalg.qr(np.random.default_rng(0).normal(size=(vectors.shape[1],) * 2))[0]
    write_jsonl([row | {"new": new.tolist()} for row, new in zip(rows, turned, strict=True)], tmp_path / "data")
    both = '{ old = { column = "vector", space = "clip-v3" }, next = { column = "new", space = "clip-v4" } }'
    dataset = load_dataset(descriptor(world, tmp_path / "data", both))
    for name, until in (("old", "assign"), ("next", "encode")):
        options = load_options(dataset, [f"encoder={name}", *SMALL])
        run(dataset, tmp_path / name, options, console=quiet(), registry=None, until=until)
    made = upgrade(tmp_path / "old", tmp_path / "next", UpgradeOptions(name="up", sample=200, least={}))
    assert (made.map.source[:8], made.map.target[:8]) == ("clip-v4-", "clip-v3-")
    # The new space is a rotation of the old space.
    assert made.map.fidelity["cosine"] > 0.9
    assert load_encoder(made.directory / "encoder").fields == ("next",)  # type: ignore[attr-defined]


def test_a_bundle_of_vectors_opens_again_and_shutil_copies_it(given: World, tmp_path: Path) -> None:
    shutil.copytree(given.bundle.directory, tmp_path / "copy")
    again = load_bundle(tmp_path / "copy")
    assert again.id == given.bundle.id
    assert again.dataset.items is not None
    assert again.dataset.items.vectors["lsa2"].dim == 128
