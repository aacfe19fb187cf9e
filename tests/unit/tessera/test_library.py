"""`import tessera`: light, typed, complete, and clear where a package is missing or a name clashes."""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import tessera
from tessera import install

ROOT = Path(__file__).parents[3]
HEAVY = {
    "apache_beam", "torch", "polars", "numpy", "mlflow", "sklearn", "scipy", "pydantic", "torchrec", "faiss",
    "fastapi", "redis", "kafka", "pandas",
}  # fmt: skip


def loaded_by(code: str, *, folder: Path = ROOT) -> set[str]:
    """Top-level modules in a fresh interpreter after some code."""
    told = run_python(f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))", folder=folder)
    assert told.returncode == 0, told.stderr
    return {name.partition(".")[0] for name in json.loads(told.stdout.splitlines()[-1])}


def run_python(code: str, *, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)


def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, cwd=folder, capture_output=True, text=True, check=False)


def child_cpu_s(*arguments: str) -> float:
    """CPU seconds of a process: on a busy machine the wall clock measures the neighbours."""
    child = os.posix_spawn(
        arguments[0],
        list(arguments),
        os.environ,
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
    )
    _, status, usage = os.wait4(child, 0)
    assert status == 0
    return usage.ru_utime + usage.ru_stime


def test_importing_the_package_loads_nothing_heavy_and_nothing_else_of_ours() -> None:
    found = loaded_by("import tessera; dir(tessera)")
    assert not found & (HEAVY | set(install.CHAIN) | {"httpx", "msgspec", "typer", "rich"})


def test_the_client_needs_httpx_and_msgspec_alone() -> None:
    found = loaded_by("from tessera import Client, AsyncClient, ApiError")
    assert not found & HEAVY
    assert found & set(install.CHAIN) == {"serving"}
    assert {"httpx", "msgspec"} <= found


def test_help_loads_no_engine() -> None:
    code = (
        "import sys; sys.argv = ['tessera', '--help']\n"
        "from tessera.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
    )
    assert not loaded_by(code) & HEAVY


def test_start_up_costs_little_beside_the_imports_of_its_libraries() -> None:
    python, libraries, face, told = sys.executable, [], [], []
    # The least of a few runs is the machine's; neighbours only add to it.
    for _ in range(8):
        libraries.append(child_cpu_s(python, "-c", "import typer, rich, httpx, msgspec"))
        face.append(child_cpu_s(python, "-c", "import tessera"))
        told.append(child_cpu_s(python, "-m", "tessera", "--help"))
        if len(told) >= 3 and min(told) <= 1.6 * min(libraries) and min(face) <= 0.5 * min(libraries):
            break
    assert min(told) <= 1.6 * min(libraries)
    assert min(face) <= 0.5 * min(libraries)


@pytest.mark.parametrize("name", tessera.__all__)
def test_a_public_name_is_there_and_is_documented(name: str) -> None:
    value = getattr(tessera, name)
    text = inspect.getdoc(value) or ""
    assert name in dir(tessera)
    if inspect.isfunction(value):
        assert "Args:" in text
        assert "Raises:" in text
        assert "Example:" in text


def test_an_unknown_name_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'Clint'.*AsyncClient"):
        _ = tessera.Clint


def test_types_and_run_time_name_the_same_places() -> None:
    tree = ast.parse((ROOT / "tessera" / "__init__.py").read_text())
    typed = {
        alias.asname or alias.name: (node.module, alias.name)
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(typed) == set(tessera.__all__) == set(tessera._PLACES)
    for name, (module, attribute) in typed.items():
        assert (tessera._PLACES[name], tessera._NAMED_OTHERWISE.get(name, name)) == (module, attribute)


@pytest.mark.parametrize("package", ["tessera", *install.CHAIN])
def test_a_package_says_that_it_is_typed(package: str) -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert (ROOT / package / "py.typed").is_file()
    assert "py.typed" in data[package]


@pytest.fixture(params=["features.py", "models/__init__.py", "models/net.py", "serving/app.py"])
def clashing(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file in a folder of the user's that has the name of a package of Tessera."""
    place: Path = tmp_path / request.param
    place.parent.mkdir(exist_ok=True)
    place.write_text("ANSWER = 42\n")
    return place


def test_the_command_works_in_a_folder_with_such_a_name(clashing: Path) -> None:
    folder = clashing.parent if clashing.name == "features.py" else clashing.parents[1]
    script = Path(sys.executable).with_name("tessera")
    for start in ([str(script)], [sys.executable, "-m", "tessera"]):
        told = command(*start, "check", "missing.toml", folder=folder)
        assert (told.returncode, "missing.toml: cannot be read" in told.stderr) == (2, True), told.stderr


def test_the_library_works_or_names_the_clash(clashing: Path) -> None:
    folder = clashing.parent if clashing.name == "features.py" else clashing.parents[1]
    name = clashing.relative_to(folder).parts[0]
    hidden = f"name clash: {folder / name} hides Tessera's package '{name.removesuffix('.py')}'; rename yours"
    for import_, needs in (("Client", {"serving"}), ("load_bundle", {"features", "models"})):
        told = run_python(f"from tessera import {import_}", folder=folder)
        if name.removesuffix(".py") in needs:
            # A folder without __init__.py hides no package that pip installed, but does hide an editable one.
            assert hidden in told.stderr or (told.returncode == 0 and clashing.name in ("net.py", "app.py"))
        else:
            assert told.returncode == 0, told.stderr


def test_a_clash_that_the_command_cannot_avoid_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "features.py").touch()
    told = subprocess.run(
        [Path(sys.executable).with_name("tessera"), "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 2
    assert re.fullmatch(
        r"error: name clash: .*features\.py hides Tessera's package 'features'; rename .*\n", told.stderr
    )


def test_a_run_and_a_server_start_without_what_they_use_later() -> None:
    code = "import tessera.pipeline.run, serving.api.app, tessera.pages.console.app, serving.ranking.service"
    later = {"apache_beam", "mlflow", "sklearn", "torchrec", "pandas", "matplotlib", "sentence_transformers", "kafka"}
    assert not loaded_by(code) & later
