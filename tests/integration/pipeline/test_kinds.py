"""Each kind of network, and one of one's own, through run, bundle, stream, servers and rollout."""

import contextlib
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from features.dataset.descriptor import load_dataset
from features.errors import BundleError, DatasetError, TesseraError
from models.bundle.bundle import load_bundle
from models.networks.kinds import DEFAULT, KINDS, reads_sequence
from models.ranker.network import NetworkConfig
from models.ranker.train import TrainConfig
from models.table.default_schema import TableOptions
from serving.store.fill import fill_store
from serving.store.memory import MemoryStore
from serving.store.verify import verify
from serving.store.writer import StoreWriter
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics
from streaming.trainer import Trainer, TrainerOptions
from tessera.demo.synthetic import write_synthetic
from tessera.pipeline.options import load_options
from tessera.pipeline.run import RunOptions, run
from tests.contract.test_network import OPTIONS
from tests.integration.embedded_site import site
from tests.integration.streaming.test_ranks import TOPICS, filled, stream
from tests.integration.world import World, quiet

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning")
SMALL = RunOptions(
    quantizer="residual-kmeans",
    encoder_dim=8,
    levels=2,
    codes=8,
    table=TableOptions(dim=8),
    training=TrainConfig(batch=64, max_epochs=2),
)
ROOT = Path(__file__).parents[3]
OWN = "own_ranker:GatedProducts"


def made(directory: Path, kind: str, **options: Any) -> World:
    """A small world whose ranker is of a kind."""
    dataset = load_dataset(write_synthetic(directory / "data", users=60, items=120, events=2_000))
    network = NetworkConfig(kind=kind, options=OPTIONS.get(kind, {}))
    chosen = replace(SMALL, training=replace(SMALL.training, network=network, **options))
    result = run(dataset, directory / "run", chosen, console=quiet(), registry=None, until="publish")
    assert result.bundle is not None
    return World(dataset, directory / "run", result.bundle)


@pytest.fixture(scope="module", autouse=True)
def examples() -> Iterator[None]:
    """The class of the example can be imported, here and in other processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        yield


@pytest.fixture(scope="module", params=[*sorted(KINDS), OWN])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return made(tmp_path_factory.mktemp("kind"), request.param)


def test_a_bundle_of_the_kind_answers_as_the_ranker_that_was_trained(world: World) -> None:
    bundle, kind = load_bundle(world.bundle.directory), world.bundle.manifest.network["kind"]
    assert bundle.manifest.format == 7
    assert bundle.manifest.metrics["quality"]["ranker"]["all"]["auc"] > 0.5
    assert bool(bundle.manifest.network["source"]) == (kind == OWN)
    assert bundle.schema.attends == reads_sequence(kind)
    items = bundle.items["item_id"].to_list()[:20]
    for user in (bundle.users["user_id"][0], "stranger"):
        scores = bundle.rank(user, items)
        assert len(set(scores.tolist())) == 20
        np.testing.assert_allclose(bundle.rank(user, items[3:5]), scores[3:5], atol=1e-5)


def test_a_stream_of_the_kind_is_the_fold_of_its_log(world: World, tmp_path: Path) -> None:
    bundle, store, topics = world.bundle, MemoryStore(), Topics()
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        log.create_topics(topics.partitions())
        log.append(topics.events, [(None, line) for line in world.messages(150)])
        fill_store(store, bundle)
        options = TrainerOptions(batch=50, wait_s=0, lateness_s=1e9)
        with contextlib.closing(Trainer(log, bundle, topics=topics, options=options)) as trainer:
            while trainer.run_once():
                pass
            assert not np.array_equal(trainer.step.ranker.table.weight.numpy(), bundle.rows())
        writer = StoreWriter(log, bundle.id, store, topics=topics)
        while writer.run_once():
            pass
        assert verify(log, bundle, store, topics).difference == ""


def test_two_trainers_of_the_kind_have_the_bits_of_one(world: World, tmp_path: Path) -> None:
    found = set()
    for count in (1, 2):
        with contextlib.closing(filled(tmp_path / f"{count}.db", world)) as log:
            found.add(stream(world, log, count))
            assert log.end_offsets(TOPICS.deltas)[0] > 0
    assert len(found) == 1


def test_a_kind_trains_in_two_processes(tmp_path: Path) -> None:
    # The other networks differ in layers alone, which every process holds whole.
    one, two = (made(tmp_path / str(count), "din", processes=count).bundle for count in (1, 2))
    users, items = one.users["user_id"].to_list()[:10], one.items["item_id"].to_list()[:20]
    for user in users:
        np.testing.assert_allclose(one.rank(user, items), two.rank(user, items), atol=2e-3)


def test_a_ranker_of_ones_own_is_served_streamed_explained_and_rolled_out(tmp_path: Path) -> None:
    champion, own = made(tmp_path / "default", DEFAULT), made(tmp_path / "own", OWN)
    assert "kind" not in champion.bundle.manifest.network
    with site(tmp_path / "home", champion, own) as place:
        assert place.serves() == champion.bundle.id
        place.operator.run("tessera rollout start --challenger 2 --share 0.5 --name own")
        place.operator.run("tessera rollout stop own")
        place.operator.run(f"tessera rollout promote {own.bundle.id}")
        place.follower.look()
        assert place.serves() == own.bundle.id
        body = {"user": own.bundle.users["user_id"][0], "k": 3, "explain": True}
        answer = place.client.post("/v1/rank", json=body).json()
        assert len(answer["items"][0]["reasons"]) > 3
        place.send(own.messages(60))
        assert place.streamed()["events"] > 0
        assert "equal" in place.operator.run("tessera verify")


def test_a_class_that_changed_or_is_gone_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (ROOT / "examples" / "own_ranker.py").read_text()
    (tmp_path / "changing_ranker.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    world = made(tmp_path / "world", "changing_ranker:GatedProducts")
    (tmp_path / "changing_ranker.py").write_text(source + "# another version\n")
    with pytest.raises(BundleError, match=r"ranker changing_ranker:GatedProducts: its file has sha256 .* train again"):
        load_bundle(world.bundle.directory).network()
    (tmp_path / "changing_ranker.py").unlink()
    monkeypatch.delitem(sys.modules, "changing_ranker")
    importlib.invalidate_caches()
    with pytest.raises(DatasetError, match=r"changing_ranker:GatedProducts: it cannot be imported .*PYTHONPATH"):
        load_bundle(world.bundle.directory).network()
    command = [sys.executable, "-m", "tessera", "stream", "--once", "--bundle", str(world.bundle.directory)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "it cannot be imported" in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr


def test_a_run_names_a_wrong_kind_before_it_reads_data(tmp_path: Path) -> None:
    dataset = load_dataset(write_synthetic(tmp_path, users=60, items=120, events=2_000))
    with pytest.raises(TesseraError, match="nearest is 'deepfm'"):
        load_options(dataset, ["ranker.kind=deepFM"])
    with pytest.raises(TesseraError, match=r"ranker\.options\.towers: dlrm has no such option; valid: bottom, top"):
        load_options(dataset, ["ranker.kind=dlrm", "ranker.options.towers=3"])
    chosen = load_options(dataset, ["ranker.kind=din", "ranker.options.hidden=[8, 4]"]).training.network
    assert (chosen.kind, json.dumps(dict(chosen.options))) == ("din", '{"hidden": [8, 4]}')
