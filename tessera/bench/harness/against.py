"""Runs a benchmark of this version and of another commit in turns, so that both meet the same machine.

The other commit is driven by its own command line, in a worktree and a virtual environment of its own
(`infra/baseline.sh`). Each turn has an output directory of its own, so nothing remembered is printed again.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

from features.errors import TesseraError
from tessera.bench.harness.result import BenchResult

ROOT = Path(__file__).parents[3]
_THIS = "this"
Rows = list[dict[str, Any]]


def against(commit: str, name: str, options: Sequence[str], out: Path, *, rounds: int, console: Console) -> BenchResult:
    """Runs `tessera bench NAME` of both versions alternately and sets their rows side by side.

    Args:
        commit: the other version; it must be in this clone.
        options: of the benchmark, understood by both versions.
        out: directory of the turns' outputs.
        rounds: turns of each version; the order of a pair is turned round each time.

    Returns:
        One row for each row and number that both versions print: the medians over the rounds, and `ratio`, this
        version's number divided by the other's. There are no claims.

    Raises:
        TesseraError: the other version cannot be prepared, or a turn printed no result.
    """
    commands = {commit: _prepared(commit), _THIS: [sys.executable, "-m", "tessera"]}
    turns: dict[str, list[Rows]] = {commit: [], _THIS: []}
    for number in range(rounds):
        for version in sorted(commands, reverse=bool(number % 2), key=lambda one: one == _THIS):
            console.print(Text(f"round {number + 1} of {rounds}: {name} of {version}", "dim"))
            folder = out / f"{version}-{number}"
            folder.mkdir(parents=True, exist_ok=True)
            turns[version].append(_turn([*commands[version], "bench", name, *options, "--out", str(folder)], folder))
    return BenchResult(f"{name} against {commit}", "as asked", rounds, compared(turns[commit], turns[_THIS]), [])


def compared(other: list[Rows], this: list[Rows]) -> Rows:
    """Sets two versions' rows side by side; see `against`.

    Args:
        other, this: for each round the rows that a version printed.
    """
    numbers_other, numbers_this = _numbers(other), _numbers(this)
    rows: Rows = []
    for key in numbers_this:
        if key in numbers_other:
            before, now = statistics.median(numbers_other[key]), statistics.median(numbers_this[key])
            rows.append({"row": key[0], "what": key[1], "other": before, "this": now, "ratio": _ratio(now, before)})
    return rows


def _numbers(rounds: list[Rows]) -> dict[tuple[str, str], list[float]]:
    """Returns the numbers of each round by the words of their row and the name of their column."""
    numbers: dict[tuple[str, str], list[float]] = {}
    for rows in rounds:
        for row in rows:
            words = " · ".join(str(value) for value in row.values() if isinstance(value, str))
            for column, value in row.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    numbers.setdefault((words, column), []).append(float(value))
    return numbers


def _ratio(this: float, other: float) -> float | None:
    return this / other if other else None


def _prepared(commit: str) -> list[str]:
    script = ROOT / "infra" / "baseline.sh"
    if not (ROOT / ".git").exists() or not script.is_file():
        raise TesseraError(f"--against {commit}: {ROOT} is no git clone of Tessera; clone the repository")
    environment = os.environ | {"BASELINE": commit}
    done = subprocess.run(["bash", str(script), "setup"], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TesseraError(f"--against {commit}: {done.stderr.strip() or done.returncode}")
    return [str(Path(done.stdout.strip().splitlines()[-1]) / ".venv" / "bin" / "tessera")]


def _turn(command: list[str], folder: Path) -> Rows:
    """Returns the rows of one turn; its home is its own unless addresses of servers are set."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["TESSERA_HOME"] = str(folder / "home")
    done = subprocess.run([*command, "--json"], env=environment, stdout=subprocess.PIPE, text=True, check=False)
    try:
        # Exit status 1 says that a claim does not hold; the rows are there all the same.
        result = msgspec.json.decode(done.stdout[done.stdout.index("{") :])
        rows = list(result["rows"])
    except (ValueError, KeyError, msgspec.DecodeError) as error:
        raise TesseraError(f"{' '.join(command)}: exit {done.returncode}, no result in its output") from error
    if failed := result.get("failed"):
        raise TesseraError(f"{' '.join(command)}: {failed}")
    return rows
