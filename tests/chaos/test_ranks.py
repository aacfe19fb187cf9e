"""Rounds of deaths among several trainers; see `tests.chaos.rank_rounds`. `RANK_ROUNDS=100` is the long run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.cluster import ROOT

ROUNDS = int(os.environ.get("RANK_ROUNDS", "2"))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300 + 120 * ROUNDS)]


def test_after_every_death_of_a_trainer_the_bits_are_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    kafka = os.environ.get("TESSERA_TEST_KAFKA")
    if not kafka:
        message = "no broker: set TESSERA_TEST_KAFKA"
        if os.environ.get("REQUIRE_SERVICES") == "1":
            pytest.fail(message)
        pytest.skip(message)
    command = [sys.executable, "-m", "tests.chaos.rank_rounds", str(tmp_path), kafka, str(ROUNDS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, "\n".join([*lines, done.stderr[-4_000:]])
    assert [line.partition(":")[0] for line in lines] == [*[f"round {n}" for n in range(ROUNDS)], "deaths"]
    assert lines[-1].endswith("verify: equal")
