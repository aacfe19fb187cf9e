"""Guides as scripts: the blocks of a Markdown file, run in order as a reader would, and compared with what it shows.

A block says what it is after its fence:

    sh              commands; they must succeed
    sh fails        commands of which the last must fail
    sh servers      commands for Kafka and Redis, run where these are there
    python          a program
    text            what the block before prints, in this order, numbers and ids aside; `…` stands for anything
    text exact      the same with the numbers

Everything runs in one shell, so variables, folders and background processes last from block to block.
"""

import contextlib
import os
import re
import shlex
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

KINDS = ("sh", "sh fails", "sh servers", "python", "text", "text exact")
_FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARK = "\x1e"
_LIMIT_S = 540


@dataclass(frozen=True)
class Block:
    """A fenced block: what stands after its fence, its text, and the line that it begins on."""

    kind: str
    text: str
    line: int


class GuideError(AssertionError):
    """A guide does not do what it says."""


def read_blocks(markdown: str) -> list[Block]:
    """All fenced blocks, in order.

    Raises:
        GuideError: a block is of no known kind, or shows the output of nothing.
    """
    found: list[Block] = []
    for match in _FENCE.finditer(markdown):
        block = Block(match[1].strip(), match[2], markdown.count("\n", 0, match.start()) + 1)
        if block.kind not in KINDS:
            raise GuideError(f"line {block.line}: a block of {block.kind!r}; expected one of {', '.join(KINDS)}")
        if block.kind.startswith("text") and (not found or found[-1].kind.startswith("text")):
            raise GuideError(f"line {block.line}: shows an output, but no command stands before it")
        found.append(block)
    return found


def run_guide(markdown: str, *, root: Path, tools: Path, directory: Path, servers: bool = False) -> None:
    """Runs a guide from the repository's root and compares.

    Args:
        root: where the guide begins.
        tools: put before the PATH for each block.
        directory: takes the script, what it prints, and the folders that the guide makes.
        servers: True if blocks for servers are run.

    Raises:
        GuideError: a block failed, or did not where it should, or printed something else; says which and what.
    """
    blocks = read_blocks(markdown)
    if not servers:
        skipped = {n for n, block in enumerate(blocks) if block.kind == "sh servers"}
        skipped |= {n + 1 for n in skipped if n + 1 < len(blocks) and blocks[n + 1].kind.startswith("text")}
        blocks = [block for n, block in enumerate(blocks) if n not in skipped]
    printed = _run(blocks, root, tools, directory)
    for number, block in enumerate(blocks):
        if block.kind.startswith("text"):
            _compare(block, printed[number - 1])


def _run(blocks: list[Block], root: Path, tools: Path, directory: Path) -> dict[int, str]:
    """Runs each block and returns its output by its number."""
    script, output = directory / "guide.sh", directory / "output"
    script.write_text(_script(blocks, tools), encoding="utf-8")
    own = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "LC_ALL") if name in os.environ}
    own |= {"TMPDIR": str(directory), "COLUMNS": "120", "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
    with output.open("wb") as sink:
        shell = subprocess.Popen(
            ["bash", str(script)],
            cwd=root,
            env=own,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = shell.wait(_LIMIT_S)
        except subprocess.TimeoutExpired:
            status = -1
        finally:
            # What a guide has left running, or a shell that hangs.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGTERM)
            shell.wait(30)
    parts = output.read_text(encoding="utf-8", errors="replace").split(_MARK)[1:]
    printed = {int(number): text for number, _, text in (part.partition("\n") for part in parts)}
    if status:
        last = max(printed, default=0)
        how = "did not end" if status == -1 else "did not fail" if status == 99 else f"ended with status {status}"
        raise GuideError(f"line {blocks[last].line}: {how}\n{blocks[last].text}\n{printed.get(last, '')}")
    return printed


def _script(blocks: list[Block], tools: Path) -> str:
    lines = ["set -euo pipefail"]
    for number, block in enumerate(blocks):
        if block.kind.startswith("text"):
            continue
        lines += [
            f"PATH={shlex.quote(str(tools))}:${{PATH#{shlex.quote(f'{tools}:')}}}",
            f"printf '{_MARK}{number}\\n'",
        ]
        if block.kind == "python":
            lines.append(f"python - <<'END OF PROGRAM'\n{block.text}END OF PROGRAM")
        elif block.kind == "sh fails":
            lines.append(f"set +e\n(\nset -e\n{block.text})\n[ $? -ne 0 ] || exit 99\nset -e")
        else:
            lines.append(block.text)
    return "\n".join(lines) + "\n"


def _compare(shown: Block, printed: str) -> None:
    exact = shown.kind == "text exact"
    lines = [_plain(line, exact) for line in printed.replace("\r", "\n").splitlines()]
    place = 0
    for line in shown.text.splitlines():
        wanted = _plain(line, exact)
        if wanted in ("", "…"):
            continue
        pattern = re.compile(".*".join(re.escape(part.strip()) for part in wanted.split("…")))
        while place < len(lines) and not pattern.fullmatch(lines[place]):
            place += 1
        if place == len(lines):
            raise GuideError(f"line {shown.line}: {line!r} was not printed, or not in this order, but this:\n{printed}")
        place += 1


def _plain(line: str, exact: bool) -> str:
    """A line without drawn borders and spaces that depend on a screen; without numbers and ids where these may vary."""
    line = re.sub(r"[\u2500-\u257f\s]+", " ", line).strip()
    if exact:
        return line
    return re.sub(r"[-+]?\d+(?:[.,:]\d+)*", "#", re.sub(r"\bb-[0-9a-f]{16}\b", "b-#", line))
