"""The operator's runbook as its tests use it: the commands of a failure's section, done as an operator would.

A section of the page begins with `<!-- failure: NAME -->`; what its ```sh blocks say is what the tests run, so that
page and tests cannot drift apart. A line of `tessera` runs in this process, since a new one loads for seconds.
"""

import os
import re
import shlex
import signal
import string
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner

from features.errors import TesseraError
from tessera.cli.main import app
from tests.logs import levels_kept

PAGE = Path(__file__).parents[1] / "docs" / "runbook.md"
_SECTION = re.compile(r"^<!-- failure: ([a-z-]+) -->\n(.*?)(?=^<!-- failure:|^## |\Z)", re.DOTALL | re.MULTILINE)
_BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)


def sections() -> dict[str, str]:
    """By failure, what the page says after its heading."""
    return dict(_SECTION.findall(PAGE.read_text(encoding="utf-8")))


def blocks(failure: str) -> list[list[str]]:
    """The commands of a failure's blocks, a line each, without comments."""
    found = [block.splitlines() for block in _BLOCK.findall(sections()[failure])]
    return [[bare for line in block if (bare := line.partition(" #")[0].strip())] for block in found]


@dataclass
class Operator:
    """Somebody at a shell with the settings of the processes concerned.

    Attributes:
        environment: the settings.
        place: the working directory, of the lines that no `tessera` runs.
    """

    environment: dict[str, str]
    place: Path

    def mends(self, failure: str, block: int = 0, **names: str) -> str:
        """Runs a block of a failure's section, names put in for its $NAMES; every line must succeed.

        Returns:
            What the lines printed.
        """
        lines = blocks(failure)[block]
        assert lines, failure
        return "".join(self.run(line, **names) for line in lines)

    def run(self, line: str, *, status: int = 0, **names: str) -> str:
        """Runs one line and asserts its exit status."""
        full = string.Template(line).substitute(self.environment | names)
        words = shlex.split(full)
        code, out = self._tessera(words[1:]) if words[0] == "tessera" else self._shell(full)
        assert code == status, f"{full}: exit {code}, expected {status}\n{out}"
        return out

    def _shell(self, line: str) -> tuple[int, str]:
        command = ["bash", "-euo", "pipefail", "-c", line]
        done = subprocess.run(
            command, cwd=self.place, env=os.environ | self.environment, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr

    def _tessera(self, words: list[str]) -> tuple[int, str]:
        words = [str(self.place / word) if (self.place / word).is_file() else word for word in words]
        with _undisturbed():
            done = CliRunner().invoke(app, words, env=self.environment)
        if isinstance(done.exception, TesseraError):
            # What `main` makes of it.
            return 2, f"{done.output}error: {done.exception}"
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.exit_code, done.output


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Puts back what a command sets for its process: signals, levels of loggers, filters of warnings."""
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with levels_kept(), warnings.catch_warnings():
            yield
    finally:
        for number, handler in signals.items():
            signal.signal(number, handler)
