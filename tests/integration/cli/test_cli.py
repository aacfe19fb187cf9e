"""The command line as a user meets it: exit codes, messages, JSON."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from models.bundle import delta
from serving.store.redis.embedded import open_embedded
from tessera.demo.synthetic import write_synthetic
from tessera.settings import Settings
from tests.integration.world import World

ROOT = Path(__file__).parents[3]


def tessera(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tessera", *arguments],
        cwd=ROOT,
        env=os.environ | {"TESSERA_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_check_prints_json_and_refuses_with_status_2(tmp_path: Path) -> None:
    descriptor = write_synthetic(tmp_path, users=60, items=100, events=1_000)
    found = tessera("check", str(descriptor), "--json", home=tmp_path)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["name"]
    descriptor.write_text(descriptor.read_text().replace("[split]", "[splitt]"))
    refused = tessera("check", str(descriptor), home=tmp_path)
    assert refused.returncode == 2
    assert "splitt" in refused.stderr
    descriptor.write_text(descriptor.read_text().replace("[splitt]", "[split]").replace('"clicked"', '"klicked"'))
    assert "[events]" in tessera("check", str(descriptor), home=tmp_path).stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_send_stream_and_deadletters_work_over_the_embedded_log(tmp_path: Path, world: World) -> None:
    file = tmp_path / "events.jsonl"
    file.write_bytes(b"\n".join(world.messages(50)))
    sent = tessera("send", "events", str(file), home=tmp_path)
    assert sent.returncode == 0, sent.stderr
    with contextlib.closing(Settings.from_environment({"TESSERA_HOME": str(tmp_path)}).open_log()) as log:
        log.append("events", [(None, b"oops")])
    streamed = tessera("stream", "--bundle", str(world.bundle.directory), "--once", "--json", home=tmp_path)
    assert streamed.returncode == 0, streamed.stderr
    assert json.loads(streamed.stdout)["events"] == 50
    listed = json.loads(tessera("deadletters", "list", "--json", home=tmp_path).stdout)
    assert [(filed["letter"]["topic"], filed["letter"]["offset"]) for filed in listed] == [("events", 50)]
    assert "undecodable" in tessera("deadletters", "list", home=tmp_path).stdout
    number = str(listed[0]["number"])
    assert tessera("deadletters", "show", number, home=tmp_path).stdout == "oops\n"
    mended = tmp_path / "mended.jsonl"
    mended.write_text(json.dumps({"number": int(number), "value": json.loads(world.messages(51)[50])}))
    back = tessera("deadletters", "replay", "--mended", str(mended), home=tmp_path)
    assert back.stdout.startswith("1 messages put back")
    again = tessera("deadletters", "replay", number, home=tmp_path)
    assert again.stdout.startswith("0 messages put back")
    bundle = ("--bundle", str(world.bundle.directory))
    assert json.loads(tessera("stream", *bundle, "--once", "--json", home=tmp_path).stdout)["events"] == 1
    equal = tessera("verify", *bundle, "--json", home=tmp_path)
    assert (equal.returncode, json.loads(equal.stdout)["seq"]) == (0, 2)
    assert tessera("verify", *bundle, "--from-snapshot", "--sample", "20", home=tmp_path).returncode == 0
    with contextlib.closing(open_embedded(tmp_path / "redis")) as store:
        row = np.array([3])
        store.write_rows(world.bundle.id, row, np.array([9]), np.ones((1, world.bundle.schema.dim), dtype=np.float32))
    differs = tessera("verify", *bundle, home=tmp_path)
    assert differs.returncode == 1
    assert "row 3: seq 9" in differs.stdout
    with contextlib.closing(open_embedded(tmp_path / "redis")) as store:
        store.drop(world.bundle.id)
    assert "records written, up to batch 2" in tessera("replay", *bundle, home=tmp_path).stdout
    assert tessera("verify", *bundle, home=tmp_path).returncode == 0


@pytest.mark.slow
def test_backfill_and_topics_over_the_embedded_log(tmp_path: Path, world: World) -> None:
    assert tessera("topics", "create", "--partitions", "2", home=tmp_path).returncode == 0
    refused = tessera("topics", "create", "--events-days", "7", home=tmp_path)
    assert (refused.returncode, "keeps everything" in refused.stderr) == (2, True)
    descriptor = str(world.dataset.source)
    wrong = tessera("backfill", descriptor, "--from", "yesterday", home=tmp_path)
    assert (wrong.returncode, "--from yesterday" in wrong.stderr) == (2, True)
    sent = json.loads(tessera("backfill", descriptor, "--from", "2025-02-20", "--json", home=tmp_path).stdout)["sent"]
    assert sent > 0
    assert (
        json.loads(tessera("backfill", descriptor, "--from", "2025-02-20", "--json", home=tmp_path).stdout)["sent"] == 0
    )
    bundle = ("--bundle", str(world.bundle.directory))
    assert json.loads(tessera("stream", *bundle, "--once", "--json", home=tmp_path).stdout)["events"] == sent


def _trained(home: Path) -> int:
    """Messages behind the deltas in a home's log."""
    settings = Settings(home=home)
    with contextlib.closing(settings.open_log()) as log:
        topic = settings.topics.deltas
        deltas = log.read(topic, 0, 0, log.end_offsets(topic).get(0, 0))
        return sum(len(delta.decode(message.value).times_ms) for message in deltas)


def test_a_stream_ends_after_the_batch_in_hand_when_it_is_told_to(tmp_path: Path, world: World) -> None:
    file = tmp_path / "events.jsonl"
    file.write_bytes(b"\n".join(world.messages(200)))
    assert tessera("send", "events", str(file), "--key", "user_id", home=tmp_path).returncode == 0
    command = [sys.executable, "-m", "tessera", "stream", "--bundle", str(world.bundle.directory), "--json", "--watch"]
    environment = os.environ | {"TESSERA_HOME": str(tmp_path)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as running:
        give_up = time.monotonic() + 120
        while _trained(tmp_path) < 200 and time.monotonic() < give_up:
            time.sleep(0.1)
        running.terminate()
        out, _ = running.communicate(timeout=30)
    assert running.returncode == 0
    assert json.loads(out)["events"] == 200
    assert list((tmp_path / "snapshots" / world.bundle.id).iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("check", "no-such.toml"), "no-such.toml"),
        (("serve",), "tessera run"),
        (("send", "wishes", "x"), "items or events"),
        (("bench", "nothing"), "main-job"),
        (("run", "no-such.toml", "--seed", "-1"), "--set seed=NUMBER"),
        (("run", "no-such.toml", "--until", "baked"), "--until"),
    ],
)
def test_what_cannot_work_is_one_line_and_status_2(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    found = tessera(*arguments, home=tmp_path)
    assert found.returncode == 2
    assert words in found.stderr.replace("\n", " ")
    assert "Traceback" not in found.stderr
