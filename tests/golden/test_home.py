"""A home made by version 1 (commit 310ca4f) is opened, served and streamed on, with the answers that version 1 gave."""

import contextlib
import json
import math
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from features.errors import BundleError
from serving.api.keys import KeyFile
from tests.rehearsal.process import Server
from tests.runbook import Operator

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent / "home-310ca4f"
ANSWERS = json.loads((HERE / "answers.json").read_text(encoding="utf-8"))
CHAMPION, CHALLENGER = "b-7dc66bd3b08df511", "b-503bf35b210922b2"
# Another processor than the one that wrote the answers adds float32 numbers in another order.
NEAR = 2e-5


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Operator:
    """Somebody who unpacked the home in another place than it was made in."""
    place = tmp_path_factory.mktemp("golden")
    with tarfile.open(HERE / "home.tar.xz") as archive:
        archive.extractall(place / "home", filter="data")
    return Operator({"TESSERA_HOME": str(place / "home")}, place)


@pytest.fixture(scope="module")
def migrated(operator: Operator) -> Operator:
    """The same after `tessera migrate`."""
    with pytest.raises(BundleError, match=r"was made in file:///tmp/.*run `tessera migrate`"):
        _registry(operator).resolve(None)
    found = json.loads(operator.run("tessera migrate --json"))
    assert found["addresses of artifacts in the registry"] > 0
    assert not any(json.loads(operator.run("tessera migrate --json")).values())
    return operator


@pytest.fixture(scope="module")
def server(migrated: Operator) -> Iterator[Server]:
    place = Path(migrated.environment["TESSERA_HOME"])
    found = Server(Path(sys.executable).with_name("tessera"), migrated.place, "server", migrated.environment)
    found.start()
    with contextlib.ExitStack() as stack:
        stack.callback(found.process.kill)
        found.wait()
        yield found
        found.stop()
    assert place.exists()


def test_it_answers_as_version_1_before_and_after_the_messages_that_wait(migrated: Operator, server: Server) -> None:
    _same(_asked(server), ANSWERS["before"])
    assert migrated.run("tessera verify").startswith("equal: 1,024 rows and 43 records, up to batch 1")
    streamed = json.loads(migrated.run("tessera stream --once --json").partition("\n{")[2].join(("{", "")))
    assert (streamed["events"], streamed["items"], streamed["bad"]) == (120, 2, 1)
    assert migrated.run("tessera verify").startswith("equal: 1,024 rows and 45 records, up to batch 2")
    _same(_asked(server), ANSWERS["after"])


def test_its_keys_letters_and_experiments_are_there(migrated: Operator) -> None:
    home = Path(migrated.environment["TESSERA_HOME"])
    key = KeyFile(home / "keys.json").find(ANSWERS["key"])
    assert key is not None
    assert (key.name, key.may("write"), key.may("admin")) == ("golden", True, False)
    letters = json.loads(migrated.run("tessera deadletters list --json"))
    assert letters[0]["letter"]["offset"] == 120
    status = migrated.run("tessera rollout status")
    assert f"running: {CHALLENGER} against {CHAMPION}, 25.0% of the users" in status
    migrated.run(f"tessera rollout report ended --html {migrated.place / 'ended.html'}")
    listed = migrated.run("tessera rollout list")
    assert "ended" in listed
    assert "seen enough" in listed


def _registry(operator: Operator) -> Any:
    from tessera.settings import Settings

    return Settings.from_environment(operator.environment).open_registry()


def _asked(server: Server) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(HERE / "ask.py"), server.url, ANSWERS["key"]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + server.process.log.read_text()[-2_000:]
    return dict(json.loads(done.stdout))


def _same(found: Any, expected: Any, place: str = "") -> None:
    """Equal, numbers up to the last bits."""
    assert type(found) is type(expected), place
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for name, value in expected.items():
            _same(found[name], value, f"{place}/{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), f"{place}: {found} {expected}"
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            _same(one, other, f"{place}/{number}")
    elif isinstance(expected, float):
        assert math.isclose(found, expected, rel_tol=NEAR, abs_tol=NEAR), f"{place}: {found}, {expected} expected"
    else:
        assert found == expected, place
