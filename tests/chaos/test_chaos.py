"""Rounds of faults; see `tests.chaos.rounds`. `CHAOS_ROUNDS=30` is the long run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.cluster import ROOT, jars

ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "3"))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600 + 120 * ROUNDS)]


def test_after_every_round_of_faults_the_bits_are_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    if not jars():
        message = "no broker to kill: `make up` fetches its jars (needs Java 17 and Maven)"
        if os.environ.get("REQUIRE_SERVICES") == "1":
            pytest.fail(message)
        pytest.skip(message)
    command = [sys.executable, "-m", "tests.chaos.rounds", str(tmp_path), str(ROUNDS)]
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, "\n".join([*lines, done.stderr[-4_000:]])
    assert [line.partition(":")[0] for line in lines] == [*[f"round {n}" for n in range(ROUNDS)], "uncommitted repeats"]
    assert int(lines[-1].split()[2].rstrip(";")) > 0
