"""No command ends in a traceback: not on a home that cannot be used, not on brackets in any text."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import typer

import tessera.cli.main
from features.dataset import tables
from features.lock import locked
from streaming.dead_letter import encode_dead_letter
from streaming.log.protocol import Message
from tessera.pipeline.artifact import read_frame
from tessera.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning")

REALFILES = Path(__file__).parents[2] / "realfiles"
BASE, MARKUP = REALFILES / "base", REALFILES / "26-ids-show-markup"
ODD = "[/r/x] [bold] :tea:"
# Of every command what it needs; {out} is a directory in the place that cannot be used, {run} a finished run.
ARGUMENTS = {
    "check": "{base}/base.toml",
    "run": "{base}/base.toml --out {out}",
    "features": "{base}/base.toml --out {out}",
    "train": "{base}/base.toml --out {out}",
    "publish": "{base}/base.toml --out {out}",
    "serve": "",
    "doctor": "",
    "status": "",
    "migrate": "",
    "bench": "main-job --out {out}",
    "stream": "",
    "send": "events {base}/../19-stream-neighbour-ids/messages.jsonl",
    "replay": "",
    "verify": "",
    "skew": "",
    "retrain": "{base}/base.toml --out {out}",
    "sweep": "{base}/base.toml --out {out}",
    "backfill": "{base}/base.toml",
    "demo": "--small --out {out}",
    "table report": "{out}",
    "export": "{run} --out {out}",
    "topics export": "impressions {out}/shown.jsonl",
    "advise capacity": "--items 5 --users 5",
    "encoder tune": "{out}",
    "encoder report": "{out}",
    "encoder advise": "{out}",
    "encoder cut": "{out} --dims 2",
    "encoder upgrade": "{out} --to {run}",
    "encoder reembed": "{out} --map m",
    "encoder concept add": "{out} tea --items i001,i002,i003",
    "encoder concept list": "{out}",
    "encoder concept erase": "{out} tea --view mild",
    "ids show": "{run} i003",
    "ids compare": "{run} {run}",
    "ids report": "{run} --html {out}/page.html",
    "ids export": "{run} {out}/ids.csv",
    "keys add": "bob",
    "keys list": "",
    "keys remove": "bob",
    "rollout list": "",
    "rollout start": "",
    "rollout status": "",
    "rollout watch": "--once",
    "rollout stop": "one",
    "rollout report": "one",
    "rollout promote": "1",
    "rollout rollback": "",
    "deadletters list": "",
    "deadletters show": "0",
    "deadletters replay": "",
    "topics create": "",
    "topics rewrite": "",
    "forget": "bob",
    "propensities": "{out}/shop.toml",
    "forgotten": "",
    "topics positions": "",
}
# What needs nothing of the place works.
WORK = {"advise capacity", "check", "doctor", "migrate", "ids show", "ids compare", "keys list"}


def leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    if hasattr(command, "commands"):
        for name, below in command.commands.items():
            yield from leaves(below, (*path, name))
    else:
        yield " ".join(path)


class Shell:
    """Runs the entry point in this process; what it printed is in `out` and `err`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        self.out = self.err = ""

    def run(self, *words: str) -> int:
        self._monkeypatch.setattr(sys, "argv", ["tessera", *words])
        self._capsys.readouterr()
        status = 0
        try:
            tessera.cli.main.main()
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        self.out, self.err = self._capsys.readouterr()
        assert "Traceback" not in self.out + self.err, f"{words}: {self.err}"
        return status


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Shell(monkeypatch, capsys)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first stages of the dataset whose titles are full of brackets."""
    from rich.console import Console

    from features.dataset.descriptor import load_dataset
    from tessera.pipeline.run import RunOptions
    from tessera.pipeline.run import run as run_stages

    directory = tmp_path_factory.mktemp("run")
    shutil.copytree(MARKUP, directory / "data")
    options = RunOptions(quantizer="residual-kmeans", encoder_dim=4)
    dataset = load_dataset(directory / "data" / "d.toml")
    run_stages(dataset, directory / "out", options, console=Console(quiet=True), registry=None, until="frame")
    return directory / "out"


@pytest.fixture(params=["below a file", "read-only"])
def unusable(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A place where nothing can be written, not even by root."""
    place = tmp_path / "place"
    if request.param == "below a file":
        place.write_text("a file")
        yield place
        return
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,ro", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a read-only directory")
    yield place
    subprocess.run(["umount", place], check=True)


def test_the_table_names_every_command() -> None:
    assert set(leaves(typer.main.get_command(tessera.cli.main.app))) == set(ARGUMENTS)


def test_no_command_dies_of_a_home_that_cannot_be_used(
    shell: Shell, unusable: Path, run: Path, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    monkeypatch.setenv("TESSERA_HOME", str(unusable / "home"))
    for command, arguments in ARGUMENTS.items():
        with subtests.test(command):
            given = arguments.format(base=BASE, out=unusable / "out", run=run)
            status = shell.run(*command.split(), *given.split())
            if command in WORK:
                continue
            assert status == 2, (status, shell.err)
            said = shell.err.splitlines()[-1]
            assert said.startswith("error: "), shell.err
            assert str(unusable) in said or "key 'bob': no such key" in said, said
            assert "; " in said, said


def test_texts_are_printed_as_they_are(
    shell: Shell, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("TESSERA_HOME", str(home))
    settings = Settings(home=home)
    home.mkdir()
    log = settings.open_log()
    log.create_topics(settings.topics.partitions())
    letter = encode_dead_letter(Message("events", 0, 0, None, b"{", 0), "invalid", f"{ODD}: why")
    log.append(settings.topics.dead_letters, [(None, letter)])
    log.close()
    shown = {
        ("check", str(MARKUP / "columns.toml")): ["price [/unit]", "size [cm]"],
        ("ids", "show", str(run), "i003"): ["[/r/tea]"],
        ("keys", "add", ODD): [],
        ("keys", "list"): [ODD],
        ("deadletters", "list"): [f"{ODD}: why"],
        ("deadletters", "show", "0"): [f"{ODD}: why"],
    }
    for words, texts in shown.items():
        with subtests.test(" ".join(words[:2])):
            assert shell.run(*words) == 0, shell.err
            # A table may break a text between two words.
            for word in (word for text in texts for word in text.split()):
                assert word in shell.out + shell.err
    refused = [
        ("check", ODD),
        ("check", str(MARKUP / ODD)),
        ("send", ODD, str(BASE / "events.csv")),
        ("keys", "remove", f"{ODD} 2"),
        ("ids", "show", str(run), ODD),
        ("ids", "report", ODD),
        ("table", "report", ODD),
        ("bench", ODD),
        ("run", str(BASE / "base.toml"), "--set", f"quantizer={ODD}"),
        ("serve", "--bundle", ODD),
    ]
    for words in refused:
        with subtests.test(" ".join(words[:2])):
            assert shell.run(*words) == 2, shell.err
            assert ODD in shell.err


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_stage_is_named(shell: Shell, run: Path, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    shutil.copytree(run, out)
    part = out / "assign" / "codes" / "part-00000.parquet"
    if damage == "cut":
        part.write_bytes(part.read_bytes()[:-100])
    else:
        part.unlink()
    assert shell.run("ids", "show", str(out), "i003") == 2
    assert f"error: {part} {'was altered' if damage == 'cut' else 'is missing'}" in shell.err


def test_a_file_that_may_not_grow_ends_a_run_in_one_line_and_the_next_goes_on(shell: Shell, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    features = ("features", str(BASE / "base.toml"), "--out", out, "--set", "quantizer=residual-kmeans")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, before[1]))
    try:
        status = shell.run(*features)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2, shell.err
    said = shell.err.splitlines()[-1]
    assert said.startswith("error: ")
    assert "File too large; raise the limit of a file's size" in said
    assert shell.run(*features) == 0
    assert (tmp_path / "out" / "frame" / "stage.json").is_file()


def test_an_input_that_changes_while_it_is_read_leaves_no_frame_of_it(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = shutil.copytree(BASE, tmp_path / "data")
    events, good = data / "events.csv", (data / "events.csv").read_bytes()
    header, *rows = good.decode().splitlines()
    flipped = "\n".join([header, *(f"{row[:-1]}{1 - int(row[-1])}" for row in rows)]) + "\n"
    out = str(tmp_path / "out")
    features = ("features", str(data / "base.toml"), "--out", out, "--set", "quantizer=residual-kmeans")
    read = tables.load_events

    def changed_meanwhile(*arguments: Any) -> Any:
        events.write_text(flipped)
        return read(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(tables, "load_events", changed_meanwhile)
        assert shell.run(*features) == 2
    assert f"error: {events}: changed while the run read it" in shell.err
    events.write_bytes(good)
    assert shell.run(*features) == 0
    positives = read_frame(tmp_path / "out" / "frame").examples["label"].sum()
    assert positives == pl.read_csv(events)["label"].sum()


def test_two_runs_into_one_directory_end_in_one_result_and_one_refusal(shell: Shell, run: Path, tmp_path: Path) -> None:
    out = shutil.copytree(run, tmp_path / "out")
    with locked(out / "run", wait_s=0):
        assert shell.run("features", str(BASE / "base.toml"), "--out", str(out)) == 2
    assert f"error: {out / 'run'}: in use by another process (pid {os.getpid()})" in shell.err
    assert shell.run("ids", "show", str(out), "i003") == 0
