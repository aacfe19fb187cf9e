"""The command line as a user meets it: exit codes, messages, JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tessera.synthetic import write_synthetic
from tests.integration.world import World

ROOT = Path(__file__).parents[2]


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


def test_send_stream_and_deadletters_work_over_the_embedded_log(tmp_path: Path, world: World) -> None:
    file = tmp_path / "events.jsonl"
    file.write_bytes(b"\n".join([*world.messages(50), b"oops"]))
    sent = tessera("send", "events", str(file), home=tmp_path)
    assert sent.returncode == 0, sent.stderr
    streamed = tessera("stream", "--bundle", str(world.bundle.directory), "--once", "--json", home=tmp_path)
    assert streamed.returncode == 0, streamed.stderr
    assert json.loads(streamed.stdout)["events"] == 50
    listed = json.loads(tessera("deadletters", "list", "--json", home=tmp_path).stdout)
    assert [(filed["letter"]["topic"], filed["letter"]["offset"]) for filed in listed] == [("events", 50)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("check", "no-such.toml"), "no-such.toml"),
        (("serve",), "tessera run"),
        (("send", "wishes", "x"), "items or events"),
        (("bench", "nothing"), "main-job"),
        (("run", "no-such.toml", "--seed", "-1"), "--seed"),
    ],
)
def test_what_cannot_work_is_one_line_and_status_2(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    found = tessera(*arguments, home=tmp_path)
    assert found.returncode == 2
    assert words in found.stderr.replace("\n", " ")
    assert "Traceback" not in found.stderr
