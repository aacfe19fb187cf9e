"""Runs a benchmark of this version and of another commit in turns, so that both meet the same machine.

The other commit is driven by its own command line, in a worktree and a virtual environment of its own
(`infra/baseline.sh`). Each turn has an output directory of its own, so nothing remembered is printed again.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

from features.errors import TesseraError
from tessera.bench.harness.result import BenchResult

ROOT = Path(__file__).parents[3]
_THIS = "this"
# Columns whose words are a result, such as the plan of a search.
_MEASURED = {"plan"}
_SEED = "seed"
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

    Rows meet by the columns of words that both versions have, and by those numbers that tell rows apart and that both
    versions were given, such as a batch size. A row that only one version prints is left out. `only_here` names
    columns of words that the other version lacks, such as the state of a filter: its number may be of another state.

    Args:
        other, this: for each round the rows that a version printed.

    Raises:
        TesseraError: No row of one version meets a row of the other.
    """
    before, now = ([row for rows in rounds for row in rows] for rounds in (other, this))
    words, given = _words(before) & _words(now), _given(before, now)
    held: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in before:
        held.setdefault(_key(row, words | given), []).append(row)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in now:
        groups.setdefault(_key(row, _words(now) | given), []).append(row)
    found: Rows = []
    for group in groups.values():
        partners = held.get(_key(group[0], words | given), [])
        label = " · ".join(
            str(value) if isinstance(value, str) else f"{name} {value:g}"
            for name, value in group[0].items()
            if isinstance(value, str) or name in given
        )
        unlike = sorted(name for name in _words(group) - words if name in group[0])
        note = {"only_here": ", ".join(unlike)} if unlike else {}
        for name in [name for name in group[0] if name not in given and name != _SEED]:
            left, right = _numbers(partners, name), _numbers(group, name)
            if left and right:
                was, is_now = statistics.median(left), statistics.median(right)
                numbers = {"other": was, "this": is_now, "ratio": _ratio(is_now, was)}
                found.append({"row": label, "what": name} | numbers | note)
    if not found:
        raise TesseraError(
            f"no row of the other version meets a row of this one: its rows have {', '.join(_columns(before))}, these "
            f"have {', '.join(_columns(now))}; choose a benchmark whose rows both versions print"
        )
    return found


def _key(row: dict[str, Any], columns: Set[str]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in sorted(columns))


def _columns(rows: Rows) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _words(rows: Rows) -> Set[str]:
    """Returns the columns that hold words, but for those that hold what was measured."""
    return {name for row in rows for name, value in row.items() if isinstance(value, str)} - _MEASURED


def _given(before: Rows, now: Rows) -> Set[str]:
    """Returns the columns of numbers that tell rows apart and have the same values in both versions."""
    names = (set(_columns(before)) & set(_columns(now))) - {_SEED}
    values = {name: [set(_numbers(rows, name)) for rows in (before, now)] for name in names}
    return {name for name, (left, right) in values.items() if left == right and len(left) > 1}


def _numbers(rows: Rows, name: str) -> list[float]:
    return [float(row[name]) for row in rows if _is_number(row.get(name))]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _ratio(this: float, other: float) -> float | None:
    return this / other if other else None


def other_python(commit: str) -> Path:
    """Returns the Python of another commit, with the commit's code and requirements; makes it if it is not there.

    Raises:
        TesseraError: It cannot be prepared.
    """
    return Path(_prepared(commit)[0]).with_name("python")


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
