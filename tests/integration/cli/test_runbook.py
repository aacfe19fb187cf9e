"""The runbook's failures that need no server to die: each is caused, its page's commands are run, and all is well."""

import contextlib
import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import typer
import yaml

from features.dataset.descriptor import load_dataset
from features.dataset.tables import read_events
from features.errors import BundleError, FencedError, LogError
from features.storage.folders import Folders
from features.storage.location import Remote
from models.ranker.train import TrainConfig
from models.registry.release import CHALLENGER
from serving.api.keys import KeyFile
from serving.api.log_sink import LogSink
from serving.metrics import Metrics
from serving.rollout.experiment import RampStep
from serving.rollout.lifecycle import start
from serving.skew.sample import SkewSampler
from serving.store.memory import MemoryStore
from serving.store.redis.embedded import open_embedded
from serving.traffic.follow import ServiceOpener
from streaming.log.protocol import BLANK
from streaming.metrics import StreamMetrics
from streaming.snapshot import Snapshots
from streaming.trainer import TrainerOptions
from tessera.cli.main import app
from tessera.demo.synthetic import write_synthetic
from tessera.follow.release import ReleaseWatch
from tessera.follow.service import FollowService
from tessera.pipeline.run import RunOptions, run
from tessera.stream_service import StreamConnections, StreamService
from tests.integration.embedded_site import RANK, site
from tests.integration.world import World, make_world, quiet
from tests.mlflow_server import MlflowServer, Way
from tests.object_store import object_store
from tests.runbook import PAGE, blocks, sections
from tests.schema_registry import schema_registry

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The same data, trained for a moment from another seed."""
    return make_world(tmp_path_factory.mktemp("other"), seed=1, training=TrainConfig(max_epochs=1))


@pytest.fixture(scope="module", autouse=True)
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """Comes up while the other tests run."""
    with contextlib.closing(MlflowServer(tmp_path_factory.mktemp("mlflow"))) as server:
        yield server


# The page.


def test_every_failure_of_the_page_is_caused_by_a_test_and_its_commands_are_run() -> None:
    text = "".join((HERE / name).read_text() for name in ("test_runbook.py", "test_runbook_servers.py"))
    mended = set(re.findall(r'mends\("([a-z-]+)"', text))
    assert len(sections()) >= 10
    assert mended == sections().keys()
    assert all(blocks(name) for name in sections())
    for name, section in sections().items():
        assert all(f"**{part}" in section for part in ("Seen.", "Meanwhile.", "Steps.", "Over")), name


def test_every_alert_is_in_the_runbook() -> None:
    rules = yaml.safe_load((HERE.parents[2] / "infra" / "prometheus" / "alerts.yaml").read_text(encoding="utf-8"))
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    named = set(re.findall(r"\bTessera[A-Z]\w+", PAGE.read_text(encoding="utf-8")))
    assert alerts == named


def test_every_command_of_the_page_exists_with_its_options() -> None:
    for line in re.findall(r"\btessera ([a-z][^`\n]*)`|^tessera ([^#\n]*)", PAGE.read_text(), flags=re.MULTILINE):
        words = "".join(line).split()
        command: Any = typer.main.get_command(app)
        while hasattr(command, "commands") and words:
            name = words.pop(0)
            assert name in command.commands, line
            command = command.commands[name]
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, line


# The failures.


def test_a_damaged_champion_leaves_the_one_before_serving_and_a_rollback_ends_it(
    world: World, other: World, tmp_path: Path
) -> None:
    with site(tmp_path, world, other) as place:
        damaged = place.bundles[1]
        for path in (tmp_path / "mlflow").rglob("manifest.json"):
            if json.loads(path.read_text())["id"] == damaged.id:
                (path.parent / "table.safetensors").write_bytes(b"broken")
        place.operator.run(f"tessera rollout promote {damaged.id}")
        with contextlib.closing(place.follower.follow(every_s=0.1)):
            _until(lambda: place.parts.metrics.swap_failures._value.get() > 0)
            assert place.serves() == place.bundles[0].id
            assert "table.safetensors" in place.faults()[f"champion of {world.dataset.name}"]
            place.operator.mends("bad-bundle")
        assert place.follower.look() == place.serves() == place.bundles[0].id
        assert place.faults() == {}


@pytest.fixture(scope="module")
def with_field(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The same data with a field of each request, trained for a moment."""
    directory = tmp_path_factory.mktemp("field")
    path = write_synthetic(directory / "data", users=60, items=120, events=2_000)
    path.write_text(path.read_text() + '[events.request]\npage = { type = "category", default = "home" }\n')
    events = pl.read_parquet(path.parent / "events.parquet")
    events.with_columns(page=pl.lit("home")).write_parquet(path.parent / "events.parquet")
    options = RunOptions(quantizer="residual-kmeans", training=TrainConfig(max_epochs=1))
    dataset = load_dataset(path)
    bundle = run(dataset, directory / "run", options, console=quiet(), registry=None, until="publish").bundle
    assert bundle is not None
    return World(dataset, directory / "run", bundle)


def test_a_champion_that_lacks_a_field_refuses_callers_until_a_rollback(
    with_field: World, other: World, tmp_path: Path
) -> None:
    asked = {**RANK, "context": {"page": "search"}}
    with site(tmp_path, with_field, other) as place:
        assert place.client.post("/v1/rank", json=asked).status_code == 200
        place.operator.run(f"tessera rollout promote {place.bundles[1].id}")
        assert place.follower.look() == place.bundles[1].id
        refused = place.client.post("/v1/rank", json=asked)
        assert (refused.status_code, refused.json()["field"]) == (422, "context")
        assert "unknown column 'page'" in refused.json()["detail"]
        place.operator.mends("unknown-field")
        assert place.follower.look() == place.bundles[0].id
        assert place.client.post("/v1/rank", json=asked).status_code == 200


def test_wrong_messages_stop_the_stream_and_are_set_aside_mended_and_counted_once(world: World, tmp_path: Path) -> None:
    with site(tmp_path, world) as place:
        right, wrong = world.messages(90), [json.dumps({"metric": n}).encode() for n in range(300)]
        place.send([*right[:50], *wrong, *right[50:80]])
        said = place.operator.run("tessera stream --once --batch 100", status=2)
        assert "Is this the right topic" in said
        with contextlib.closing(place.settings.open_log()) as log:
            before = log.end_offsets(place.settings.topics.dead_letters)[0]
        assert before == 50  # of the first batch, which half of a hundred does not stop
        place.operator.mends("poisoned-topic")
        letters = json.loads(place.operator.run("tessera deadletters list --json"))
        assert len(letters) == 300
        lines = [
            json.dumps({"number": one["number"], "value": json.loads(message)})
            for one, message in zip(letters, right[80:], strict=False)
        ]
        (tmp_path / "mended.jsonl").write_text("\n".join(lines))
        place.operator.mends("poisoned-topic", 1)
        again = place.operator.mends("poisoned-topic", 1)
        assert "0 messages put back" in again
        letters = json.loads(place.operator.run("tessera deadletters list --json"))
        assert sum(one["put_back"] for one in letters) == 10
        status = json.loads(place.operator.run("tessera status --json --no-experiments"))
        assert status["lag"] == {"items": 0, "events": 0, "deltas": 0}
        # Each right message once: those that were sent, and those that were mended.
        with contextlib.closing(place.settings.open_log()) as log:
            assert log.end_offsets(place.settings.topics.events)[0] == 80 + 300 + 10


def test_a_schema_registry_that_is_away_or_lacks_a_schema_loses_no_message(world: World, tmp_path: Path) -> None:
    with schema_registry() as registry, site(tmp_path, world) as place:
        place.operator.environment["TESSERA_SCHEMA_REGISTRY"] = registry.address
        rows = [{**json.loads(message), "_event_id": f"e{number}"} for number, message in enumerate(world.messages(20))]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        place.operator.run("tessera send events rows.jsonl --format avro")
        registry.broken = True
        assert "answers 503" in place.operator.run("tessera stream --once", status=2)
        assert "schema registry" in place.operator.run("tessera doctor", status=1)
        registry.broken = False
        hidden = registry.schemas.pop(1)
        place.operator.mends("schema-registry")
        letters = json.loads(place.operator.run("tessera deadletters list --json"))
        assert [one["letter"]["cause"] for one in letters] == ["unknown-schema"] * 20
        registry.schemas[1] = hidden
        out = place.operator.mends("schema-registry", 1)
        assert "20 messages put back" in out
        assert "20 messages: 20 events" in out
        assert place.operator.run("tessera verify").startswith("equal")


@contextlib.contextmanager
def small_disk(path: Path, megabytes: int) -> Iterator[None]:
    """A volume of so many megabytes at a path; skipped where none may be mounted."""
    path.mkdir(exist_ok=True)
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)], capture_output=True)
    if made.returncode:
        pytest.skip("a small volume cannot be mounted here: it takes root")
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,size=64m", str(path)], check=True)
        if (path / "redis").is_dir():
            # A server that could not save runs on until it can.
            open_embedded(path / "redis").close()
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk_leaves_nothing_half_written_and_all_goes_on_when_there_is_room(
    world: World, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    with small_disk(home, 16), site(home, world) as place:
        place.send(world.messages(40))
        assert place.streamed()["events"] == 40
        event = json.loads(world.messages(41)[40])
        kept = Snapshots(home / "snapshots").newest(world.bundle)
        _fill(home / "filler")
        assert place.client.post("/v1/events", json={"events": [event]}).status_code == 503
        assert place.serves() == world.bundle.id
        assert "No space left" in place.faults()["home"]
        for line in ("tessera stream --once", f"tessera send events {world.directory / 'none'}"):
            assert "error: " in place.operator.run(line, status=2)
        found = Snapshots(home / "snapshots").newest(world.bundle)
        assert found is not None
        assert kept is not None
        assert found.seq == kept.seq
        assert not list(home.rglob(".*.tmp"))
        assert "filler" in place.operator.mends("disk-full")
        subprocess.run(["mount", "-o", "remount,size=64m", str(home)], check=True)
        _until(lambda: place.client.post("/v1/events", json={"events": [event]}).status_code == 202)
        place.operator.mends("disk-full", 1)
        assert place.faults() == {}
        with contextlib.closing(place.settings.open_log()) as log:
            assert log.end_offsets(place.settings.topics.events)[0] == 41


def test_a_bundle_that_does_not_fit_on_the_disk_is_refused_in_one_line(world: World, tmp_path: Path) -> None:
    with site(tmp_path / "home", world) as place, small_disk(tmp_path / "cache", 1):
        _fill(tmp_path / "cache" / "filler")
        with pytest.raises(BundleError, match=r"No space left on device.*make room") as caught:
            place.registry.open(place.releases[0], tmp_path / "cache")
        assert "\n" not in str(caught.value)
        assert [path.name for path in (tmp_path / "cache").glob("[!.]*")] == ["filler"]


def _fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_an_object_store_that_is_away_costs_nothing_when_it_is_back(world: World, tmp_path: Path) -> None:
    with object_store("other") as store, site(tmp_path / "home", world) as place:
        address = Remote("s3://away/snapshots")
        place.operator.environment["TESSERA_SNAPSHOTS"] = str(address)
        place.send(world.messages(40))
        line = "tessera stream --once --lateness-s 1000000000"
        assert "s3://away/snapshots" in place.operator.run(line, status=2)
        place.settings = replace(place.settings, snapshots_at=str(address))
        assert "no bucket 'away'" in place.faults()["object store: TESSERA_SNAPSHOTS"]
        with store.opened() as (client, _):
            client.mkdir("away")
        place.operator.mends("object-store")
        assert place.faults() == {}
        copies = Folders(tmp_path / "none", address / world.bundle.id, record="manifest.json")
        assert len(copies.complete()) == 1


def test_of_two_streams_the_older_ends_and_every_event_counts_once(world: World, tmp_path: Path) -> None:
    with site(tmp_path, world) as place:
        options = TrainerOptions(batch=16, wait_s=0.02, lateness_s=1e9)
        ended: list[BaseException] = []
        stops = [threading.Event(), threading.Event()]
        gauges = [StreamMetrics(), StreamMetrics()]

        def stream(number: int) -> None:
            try:
                service = StreamService(
                    world.bundle, StreamConnections.of(place.settings), options, metrics=gauges[number]
                )
                service.run(stops[number])
            except LogError as error:
                ended.append(error)

        threads = [threading.Thread(target=stream, args=(number,)) for number in range(2)]
        place.send(world.messages(40))
        threads[0].start()
        _until(lambda: gauges[0].counts["events"] == 40)
        threads[1].start()
        _until(lambda: "writer" not in gauges[1].last_error and threads[1].is_alive())
        for message in world.messages(80)[40:]:
            place.send([message])
            time.sleep(0.02)
        threads[0].join(20)
        assert isinstance(ended[0], FencedError)
        assert "stop this writer" in str(ended[0])
        _until(lambda: sum(one.counts["events"] for one in gauges) == 80)
        place.operator.mends("second-stream")
        stops[1].set()
        threads[1].join(20)
        assert len(ended) == 1
        assert sum(one.counts["events"] for one in gauges) == 80


def test_servers_go_on_while_the_registry_is_away(world: World, tmp_path: Path, mlflow_server: MlflowServer) -> None:
    _until(mlflow_server.answers, 120)
    with Way(mlflow_server.port) as way, site(tmp_path / "home", world, mlflow=f"http://127.0.0.1:{way.port}") as place:
        way.close()
        assert "registry" in place.operator.run("tessera rollout list", status=2)
        assert "registry" in place.faults()
        with pytest.raises(BundleError, match="see that it answers"):
            place.follower.look()
        assert place.serves() == world.bundle.id
        way.open()
        said = place.operator.mends("registry-away")
        assert world.bundle.id in said
        assert place.follower.look() == world.bundle.id
        assert place.faults() == {}


def test_a_leaked_key_ends_and_a_damaged_file_admits_no_new_key_until_it_is_made_anew(
    world: World, tmp_path: Path
) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    leaked = keys.add("shop", ["read"])
    with site(tmp_path, world, keys=keys) as place:

        def status(secret: str) -> int:
            headers = {"authorization": f"Bearer {secret}"}
            return int(place.client.post("/v1/rank", json=RANK, headers=headers).status_code)

        assert status(leaked) == 200
        secret = place.operator.mends("leaked-key", NAME="shop").split()[-1]
        _until(lambda: status(leaked) == 401, 2)
        assert status(secret) == 200
        keys.path.write_text("{broken")
        time.sleep(1.1)
        assert status(secret) == 200
        assert status("tsr_foreign") == 401
        assert place.client.get("/readyz").status_code == 200
        assert "keys.json" in place.faults()["keys"]
        said = place.operator.mends("leaked-key", 1, NAME="shop")
        renewed = next(word for word in said.split() if word.startswith("tsr_"))
        _until(lambda: status(renewed) == 200, 2)
        assert status(secret) == 401


def test_a_drift_of_the_candidates_is_named_and_a_new_reference_ends_it(world: World, tmp_path: Path) -> None:
    with site(tmp_path, world) as place:
        sink = LogSink(place.settings.open_log, place.settings.topics)
        service, close = ServiceOpener(MemoryStore())(world.bundle)
        users, item = world.bundle.users["user_id"].to_list()[:40], world.bundle.items["item_id"][0]
        with contextlib.closing(sink), contextlib.closing(SkewSampler(sink, Metrics(), 1.0)) as sampler:
            for user in users:
                sampler.offer(f"request {user}", service.rank(user, [item], 1))
        close()
        found = json.loads(place.operator.run("tessera skew --json", status=3))["drift"]
        assert found["users"] == len(users)
        assert "item.topic" in found["alarms"]
        assert "0 of" in place.operator.mends("drift", RIGHT=str(tmp_path / "right.json"))


def test_a_user_who_asks_is_forgotten_and_the_next_frame_leaves_the_events_out(world: World, tmp_path: Path) -> None:
    with site(tmp_path, world) as place:
        messages = world.messages(80)
        events = world.dataset.events
        assert events.user is not None
        user = str(json.loads(messages[0])[events.user])
        place.send(messages)
        place.streamed()
        said = place.operator.mends("forget-user", USER_ID=user)
        assert "table rows" in said
        assert "equal" in said
        # The published bundle alone still names the user.
        assert {line.split()[0] for line in said.splitlines() if "removed by:" in line} == {"bundle"}
        with contextlib.closing(place.settings.open_log()) as log:
            kept = [
                message for message in log.read(place.settings.topics.events, 0, 0, 10**6) if message.value != BLANK
            ]
        assert all(str(json.loads(message.value).get(events.user)) != user for message in kept)
        listed = tmp_path / "forgotten.jsonl"
        place.operator.mends("forget-user", 1, LIST=str(listed))
        kinds = [json.loads(line)["kind"] for line in listed.read_text().splitlines()]
        assert kinds == ["requested", "removed", "rewritten"]
        assert f'"{user}"' not in listed.read_text()
        listing = events.model_copy(update={"forgotten": str(listed)})
        without = world.dataset.model_copy(update={"events": listing})
        left, dropped = read_events(without)
        whole, before = read_events(world.dataset)
        own = int((whole["user_id"] == user).sum())
        assert own > 0
        assert left.height == whole.height - own
        assert dropped == before + own
        assert user not in left["user_id"].to_list()


def test_a_challenger_that_hurts_is_stopped_by_hand_and_a_promoted_one_is_undone(
    world: World, other: World, tmp_path: Path
) -> None:
    with site(tmp_path, world, other) as place:
        champion, challenger = place.bundles
        place.registry.challenge(place.releases[1], verdict={})
        start(place.registry, None, CHALLENGER, [RampStep(0.0, 1.0)], name="friday")
        place.follower.look()
        place.operator.run("tessera rollout status")
        users = [f"visitor-{number}" for number in range(40)]

        def served() -> set[str]:
            answers = [place.client.post("/v1/rank", json={"user": user, "k": 1}).json() for user in users]
            return {answer["bundle"] for answer in answers}

        assert challenger.id in served()
        said = place.operator.mends("bad-challenger", EXPERIMENT="friday")
        assert "complaints" in said
        place.follower.look()
        assert served() == {champion.id}
        place.operator.run(f"tessera rollout promote {challenger.id}")
        place.follower.look()
        assert served() == {challenger.id}
        place.operator.mends("bad-challenger", 1)
        place.follower.look()
        assert served() == {champion.id}


def test_a_challenger_that_cannot_be_opened_is_named_and_leaves_the_follower(
    world: World, other: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tessera.follow.lease.EVERY_S", 0.3)
    with site(tmp_path, world, other) as place:
        champion, challenger = place.bundles
        place.registry.challenge(place.releases[1], verdict={})
        start(place.registry, None, CHALLENGER, [RampStep(0.0, 1.0)], name="friday")
        lost = [path for path in place.settings.home.rglob("manifest.json") if challenger.id in path.read_text()]
        for path in lost:
            path.unlink()
        stop = threading.Event()
        watch = ReleaseWatch(place.settings.open_registry(create=False), place.settings.bundles, None)
        service = FollowService(watch, StreamConnections.of(place.settings), TrainerOptions(lateness_s=1e9))
        thread = threading.Thread(target=service.run, args=(stop,))
        thread.start()
        try:
            _until(lambda: challenger.id in place.faults().get("followed", ""), 120)
            place.send(world.messages(40))
            place.operator.mends("bundle-not-followed", EXPERIMENT="friday")
            _until(lambda: "followed" not in place.faults(), 120)
            _until(lambda: service.metrics.streams()[champion.id].counts["events"] == 40, 120)
            assert list(service.streams) == [champion.id]
        finally:
            stop.set()
            thread.join()


def _until(true: Any, seconds: float = 20) -> None:
    give_up = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < give_up, "it did not become so in time"
        time.sleep(0.05)
