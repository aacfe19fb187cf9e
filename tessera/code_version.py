"""Version of the code behind a result: a result that is kept on a disk is used again by equal code alone.

The version is a hash of the sources that a module can reach by imports, and of the releases of Python and of the
libraries that decide bits. An edit of the console therefore leaves the stages of a run in place.
"""

import ast
import hashlib
import platform
from collections.abc import Iterator
from functools import lru_cache
from importlib import metadata
from pathlib import Path

_ROOT = Path(__file__).parents[1]
PACKAGES = ("features", "models", "serving", "streaming", "tessera")
LIBRARIES = (
    "apache-beam",
    "faiss-cpu",
    "fbgemm-gpu-cpu",
    "numpy",
    "polars",
    "scikit-learn",
    "scipy",
    "sentence-transformers",
    "sentencepiece",
    "tokenizers",
    "torch",
    "torchrec",
    "transformers",
)
"""Distributions whose release can change a bit of what a stage or a benchmark leaves."""


@lru_cache
def code_version(module: str, *, root: Path = _ROOT) -> str:
    """Hashes the code behind a module's results.

    Args:
        module: full name, `tessera.pipeline.run` for example.
        root: directory that holds the packages.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for path in sorted(_reached(module, root)):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(repr((platform.python_version(), _libraries())).encode())
    return digest.hexdigest()[:16]


def _libraries() -> list[tuple[str, str]]:
    found = []
    for name in LIBRARIES:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            # Without the library another code path decides the bits.
            found.append((name, ""))
    return found


def _reached(module: str, root: Path) -> set[Path]:
    """The source files that a module imports, itself included, and the data files beside them."""
    start = _source(module, root)
    if start is None:
        raise ModuleNotFoundError(f"module {module}: {root} has no such source file")
    found, waiting = {start}, [start]
    while waiting:
        path = waiting.pop()
        sources = {_source(name, root) for name in _imported(path, root)}
        new = {source for source in sources if source is not None} - found
        found |= new
        waiting += new
    beside = {data for place in {path.parent for path in found} for data in place.iterdir() if data.is_file()}
    return found | {path for path in beside if path.suffix not in (".py", ".pyc")}


def _imported(path: Path, root: Path) -> Iterator[str]:
    """Names that may be modules of ours: of `from a import b` both `a` and `a.b`."""
    package = ".".join(path.relative_to(root).parent.parts)
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            name = ".".join(filter(None, (above, node.module)))
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)


def _source(name: str, root: Path) -> Path | None:
    if name.partition(".")[0] not in PACKAGES:
        return None
    place = root.joinpath(*name.split("."))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)
