"""The image's file parses, and each of its command lines does its work on this machine."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import dockerfile
import pytest

from tests.kubernetes import INFRA, instructions

ROOT = INFRA.parent
SITE = sysconfig.get_paths()["purelib"]


def expanded(text: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(f"${{{name}}}", value)
    return text


class Build:
    """Does the instructions of the file in directories of its own, with the build arguments PREFIX and STATE.

    The packages of the lock are those of this environment, so the file of the lock is empty here.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.values = {"PREFIX": str(directory / "prefix"), "STATE": str(directory / "state"), "BASE": "scratch"}
        self.environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": SITE,
            "HOME": str(directory),
        }
        self.user = ""
        self.work = directory
        self.entry: list[str] = []
        self.command: list[str] = []
        self.ran: list[str] = []

    def do(self, one: dockerfile.Command) -> None:
        values = [expanded(value, self.values) for value in one.value]
        kind = one.cmd.upper()
        if kind == "WORKDIR":
            inside = Path(values[0]).is_relative_to(self.directory)
            self.work = Path(values[0]) if inside else self.directory / values[0].lstrip("/")
            self.work.mkdir(parents=True, exist_ok=True)
        elif kind == "COPY" and not one.flags:
            for source in values[:-1]:
                self._copy(ROOT / source, self.work / values[-1])
        elif kind == "COPY":
            # From the stage before: the prefix of this machine is that of both stages.
            assert one.flags == ("--from=build",)
            assert values == [self.values["PREFIX"]] * 2
        elif kind == "ENV":
            found = dict(zip(values[::2], values[1::2], strict=True))
            self.environment |= found | {"PATH": f"{found['PATH']}:{os.environ['PATH']}"} if "PATH" in found else found
        elif kind == "RUN":
            self.ran.append(values[0])
            subprocess.run(["/bin/sh", "-c", values[0]], cwd=self.work, env=self.environment, check=True)
        elif kind == "USER":
            self.user = values[0]
        elif kind == "ENTRYPOINT":
            self.entry = values
        elif kind == "CMD":
            self.command = values
        else:
            assert kind in ("FROM", "ARG", "EXPOSE", "STOPSIGNAL"), one.original

    def _copy(self, source: Path, target: Path) -> None:
        assert source.exists(), f"COPY of {source}, which does not exist"
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.name == "requirements-image.txt":
            (target / source.name).write_text("")
        else:
            shutil.copy(source, target)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="a build changes owners")
def test_each_command_line_of_the_image_does_its_work(tmp_path: Path) -> None:
    build = Build(tmp_path)
    for one in dockerfile.parse_file(str(INFRA / "Containerfile")):
        build.do(one)
    assert len(build.ran) == len(instructions("RUN")) == 5
    assert (build.user, build.entry, build.command) == ("10001:10001", ["tessera"], ["doctor"])
    prefix, state = tmp_path / "prefix", tmp_path / "state"
    assert (prefix / "bin/tessera").exists()
    assert list(prefix.glob("lib/python3.11/site-packages/tessera/cli/__pycache__/main.*.pyc"))
    assert (prefix / "lib/python3.11/site-packages/serving/store/redis/lua").is_dir()
    assert (state.stat().st_uid, state.stat().st_gid, state.stat().st_mode & 0o777) == (10001, 10001, 0o770)
    assert build.environment["TESSERA_HOME"] == str(state)
    for words in (["--help"], ["serve", "--help"], build.command):
        done = subprocess.run(
            [*build.entry, *words], cwd=build.work, env=build.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    # The entry point is the installed one, and the code is that of the prefix.
    where = "import tessera; print(tessera.__file__)"
    found = subprocess.run(
        [str(prefix / "bin/python"), "-c", where],
        cwd=tmp_path,
        env={"PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.startswith(str(prefix))


def versions(lock: Path) -> dict[str, str]:
    words = (line.split(" ")[0].partition("==") for line in lock.read_text().splitlines())
    return {name: version for name, mark, version in words if mark}


def test_the_lock_of_the_image_has_the_versions_of_this_one_and_no_tools() -> None:
    full, image = (versions(ROOT / name) for name in ("requirements.txt", "requirements-image.txt"))
    shared = full.keys() & image.keys()
    assert len(shared) > 150
    assert {name: image[name] for name in shared} == {name: full[name] for name in shared}
    assert {"torch", "s3fs", "gcsfs", "boto3", "kafka-python", "redis", "setuptools"} <= image.keys()
    assert not image.keys() & {"pytest", "moto", "mypy", "playwright", "kubernetes-validate"}
    assert sys.version_info[:2] == (3, 11)
    assert "python:3.11" in instructions("ARG")[0].value[0]
