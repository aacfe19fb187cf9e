"""The examples in the docstrings of the public names run, on the bundle and the server of the small dataset."""

import doctest
from pathlib import Path
from typing import Any

import pytest

import tessera
from tests.integration.world import World


def examples_of(value: Any, name: str, names: dict[str, Any]) -> list[doctest.DocTest]:
    found = doctest.DocTestFinder(exclude_empty=True).find(value, name, module=False, globs=names)
    return [test for test in found if test.examples]


@pytest.fixture
def names(world: World, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the examples may use: the public names, a server's address, a client of it, and files where they expect."""
    (tmp_path / "out" / "publish").mkdir(parents=True)
    (tmp_path / "out" / "publish" / "bundle").symlink_to(world.bundle.directory)
    (tmp_path / "data").symlink_to(world.dataset.directory)
    monkeypatch.chdir(tmp_path)
    public = {name: getattr(tessera, name) for name in tessera.__all__}
    return public | {"tessera": tessera, "url": url, "client": tessera.Client(url)}


@pytest.mark.parametrize("name", ["Bundle", "Client", "check", "load_bundle", "load_dataset", "run"])
def test_the_examples_of_a_public_name_run(name: str, names: dict[str, Any]) -> None:
    tests = examples_of(getattr(tessera, name), name, names)
    assert tests
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    told: list[str] = []
    for test in tests:
        runner.run(test, out=told.append)
    names["client"].close()
    assert runner.summarize(verbose=False).failed == 0, "".join(told)


def test_the_example_of_the_package_runs(names: dict[str, Any]) -> None:
    (test,) = [test for test in examples_of(tessera, "tessera", names) if test.name == "tessera"]
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    runner.run(test, out=lambda told: None)
    names["client"].close()
    assert runner.summarize(verbose=False).failed == 0
