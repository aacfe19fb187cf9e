"""A wheel of the repository: whole, installed into an empty environment, and used outside the repository."""

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from features.value.forgotten import hashed
from tessera.install import CHAIN, EXTRAS
from tests.integration.cli.readme_shop import write_shop
from tests.servers import free_port

ROOT = Path(__file__).parents[3]
PACKAGES = (*CHAIN, "tessera")
OVERRIDE = "fbgemm-gpu ; sys_platform == 'never'"
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


def run(*command: str | Path, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def code_of_readme(language: str) -> list[str]:
    """The README's blocks of code in a language."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", readme, flags=re.DOTALL)


def uv() -> str:
    """The project's uv; `make setup` leaves one where the machine has none."""
    own = ROOT / ".uv" / "bin" / "uv"
    found = str(own) if own.exists() else shutil.which("uv")
    assert found, "no uv: run `make setup`"
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built of a copy, since a build leaves directories in its tree."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    built = run(sys.executable, "-W", "ignore", "-c", BUILD, out, folder=copy)
    assert built.returncode == 0, built.stderr
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment that holds the wheel alone, beside the libraries that are installed here."""
    place = tmp_path_factory.mktemp("clean")
    venv.create(place, with_pip=False)
    found = place / "bin" / "python"
    installed = run(uv(), "pip", "install", "--no-index", "--no-deps", "--python", found, wheel, folder=place)
    assert installed.returncode == 0, installed.stderr
    packages = next(place.glob("lib/python*/site-packages"))
    # Files of that directory that end in .pth are not read, so the editable install of this repository is not seen.
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    return found


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.partition("/")[0] in PACKAGES}
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", *PACKAGES, folder=ROOT).stdout
    assert packed == {name for name in listed.splitlines() if (ROOT / name).exists()}


def test_the_installed_library_and_command_work_outside_the_repository(python: Path, tmp_path: Path) -> None:
    code = "import tessera, serving; from tessera import Client; print(tessera.__file__, serving.__file__, Client.rank)"
    told = run(python, "-c", code, folder=tmp_path)
    assert told.returncode == 0, told.stderr
    assert told.stdout.count(str(python.parents[1])) == 2
    assert str(ROOT) not in told.stdout
    help_text = run(python.with_name("tessera"), "--help", folder=tmp_path)
    assert (help_text.returncode, "Feature embeddings for recommenders" in help_text.stdout) == (0, True)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside the repository: the README's dataset and Python, and copies of the examples."""
    folder = tmp_path_factory.mktemp("shop")
    write_shop(folder, code_of_readme("toml")[0])
    for name, code in zip(("library.py", "service.py"), code_of_readme("python"), strict=True):
        (folder / name).write_text(code, encoding="utf-8")
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def script(python: Path, shop: Path, *command: str | Path) -> str:
    """Runs a script by the installed library, and returns what it prints."""
    done = run(python, "-W", "ignore", *command, folder=shop, OMP_NUM_THREADS="1", PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def bundle(python: Path, shop: Path) -> Path:
    """The bundle that the README's lines make, once for all scripts."""
    assert "Labels(positives=" in script(python, shop, "library.py")
    return shop / "out" / "publish" / "bundle"


@pytest.fixture(scope="module")
def url(python: Path, bundle: Path) -> Iterator[str]:
    """Address of the installed command `tessera serve`."""
    address = f"http://127.0.0.1:{free_port()}"
    command = [python.with_name("tessera"), "serve", "--bundle", bundle, "--port", address.rpartition(":")[2]]
    with (bundle.parent / "serve.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=bundle.parent, stdout=log, stderr=log)
    try:
        give_up = time.monotonic() + 120
        while not answers(address):
            assert process.poll() is None, (bundle.parent / "serve.log").read_text()
            assert time.monotonic() < give_up
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def answers(address: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{address}/readyz").status_code == 200
    return False


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arguments", "printed"), [
    ("embeddings.py", ["BUNDLE"], "content like that of SKU-"),
    ("semantic_ids.py", ["BUNDLE", "a red bicycle"], "codes, such as SKU-"),
    ("client.py", ["URL"], "refused: 422"),
    ("own_encoder.py", ["shop.toml", "own-encoder"], "random-words: encode"),
    ("own_quantizer.py", ["shop.toml", "own-quantizer"], "random-directions: encode"),
    ("own_ranker.py", ["shop.toml", "own-ranker"], "test AUC "),
    ("own_model.py", [], "accuracy on new rows"),
    ("own_vectors.py", ["shop.toml", "own-vectors"], "a red bicycle is "),
    ("placement.py", ["placement"], "placed: the even items lead by"),
    ("request_fields.py", ["request-fields"], "S0 at half its price"),
    ("several_labels.py", ["several-labels"], "score of even items "),
    ("explored_items.py", ["shown.jsonl", "outcomes.jsonl"], "home: new items would be clicked in 100.0%"),
    ("exported.py", ["EXPORT"], "items in a history on average"),
    ("forgotten.py", ["audit.jsonl", "customer-42"], "requested by the shop"),
    ("arrow_batches.py", ["audit.jsonl"], "1 rows in 1 messages"),
    ("served.py", ["served.json"], "3 requests, nothing to look at"),
])  # fmt: skip
def test_every_example_runs_by_the_wheel_in_a_folder_of_the_users(
    name: str, arguments: list[str], printed: str, python: Path, shop: Path, bundle: Path, url: str
) -> None:
    places = {"BUNDLE": str(bundle), "URL": url, "EXPORT": "export"}
    if "EXPORT" in arguments:
        done = run(python.with_name("tessera"), "export", "out", "--out", "export", folder=shop)
        assert done.returncode == 0, done.stderr
    line = {"user": hashed("customer-42", "0a"), "salt": "0a", "time_ms": 0, "kind": "requested", "by": "by the shop"}
    (shop / "audit.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    shown = {"kind": "shown", "id": "1", "policy": "home", "items": ["a", "b"], "propensities": [1, 0.5]}
    (shop / "shown.jsonl").write_text(json.dumps(shown) + "\n", encoding="utf-8")
    (shop / "outcomes.jsonl").write_text('{"impression": "1", "item": "b"}\n', encoding="utf-8")
    (shop / "served.json").write_text('{"requests": 3, "differences": [], "drift": null}', encoding="utf-8")
    assert printed in script(
        python, shop, f"examples/{name}", *(places.get(argument, argument) for argument in arguments)
    )


def test_no_example_is_left_out(request: pytest.FixtureRequest) -> None:
    (marks,) = [mark for mark in test_every_example_runs_by_the_wheel_in_a_folder_of_the_users.pytestmark
                if mark.name == "parametrize"]  # fmt: skip
    assert {name for name, *_ in marks.args[1]} == {path.name for path in (ROOT / "examples").glob("*.py")}


@pytest.mark.slow
def test_the_readmes_lines_for_a_server_run_by_the_wheel(python: Path, shop: Path, url: str) -> None:
    code = (shop / "service.py").read_text(encoding="utf-8")
    assert code.count("http://127.0.0.1:8000") == 1
    (shop / "service_here.py").write_text(code.replace("http://127.0.0.1:8000", url), encoding="utf-8")
    script(python, shop, "service_here.py")


@pytest.mark.slow
def test_the_installed_command_runs_the_demo(python: Path, tmp_path: Path) -> None:
    told = run(python.with_name("tessera"), "demo", "--small", "--out", "demo", folder=tmp_path, OMP_NUM_THREADS="1")
    assert told.returncode == 0, told.stderr
    assert "report" in told.stdout
    assert (tmp_path / "demo" / "report.html").is_file()


def test_the_base_needs_what_the_client_needs_and_no_more(wheel: Path, tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == ["httpx", "msgspec", "rich", "typer"]
    code = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('polars', 'torch', 'numpy'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from tessera import Client, TesseraError\n"
        "from tessera import load_bundle\n"
    )
    told = run(sys.executable, "-c", code, folder=tmp_path)
    assert told.returncode == 1
    assert "is not installed; pip install 'tessera[train]', or 'tessera[all]' for everything" in told.stderr
    command = code.replace("from tessera import load_bundle\n", "sys.argv = ['tessera', 'check', 'x.toml']\n")
    told = run(sys.executable, "-c", f"{command}from tessera.__main__ import main\nmain()", folder=tmp_path)
    assert told.returncode == 2
    assert re.match(r"error: \w+ is not installed; pip install 'tessera\[train\]'", told.stderr)


def closure(extras: dict[str, list[str]], name: str) -> set[str]:
    """Distributions of an extra, those of the extras that it names included."""
    found: set[str] = set()
    for line in extras[name]:
        own = re.match(r"tessera\[(.+)\]", line)
        for part in own[1].split(",") if own else ():
            found |= closure(extras, part)
        if not own:
            found.add(re.split(r"[\[=<>]", line)[0])
    return found


def test_the_extra_that_an_error_names_holds_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    by_import = importlib.metadata.packages_distributions()
    wrong = {
        package: extra
        for package, extra in EXTRAS.items()
        if not {re.sub("[-_.]+", "-", name).lower() for name in by_import[package]} & closure(extras, extra)
    }
    assert wrong == {}
    assert closure(extras, "all") >= closure(extras, "train") | closure(extras, "stream") | closure(extras, "serve")


def test_one_line_overrides_the_cuda_package_that_torchrec_asks_for(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "override.txt").write_text(OVERRIDE + "\n")
    install = (uv(), "pip", "install", "--dry-run", "--no-index", "--python", sys.executable, f"{wheel}[all]")
    refused = run(*install, folder=tmp_path)
    assert refused.returncode != 0
    assert "fbgemm-gpu" in refused.stderr
    installed = run(*install, "--override", "override.txt", folder=tmp_path)
    assert installed.returncode == 0, installed.stderr
    assert OVERRIDE in (ROOT / "docs" / "start" / "install.md").read_text()
