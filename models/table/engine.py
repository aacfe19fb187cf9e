"""Chooses the engine: TorchRec and fbgemm, or the plain twins if the packages are missing. A warning says so once.

Only a missing package is replaced. A package that is installed and does not load is an error that names it: the twins
give the same numbers, but their dense gradient of (R, D) per step makes them many times slower.
"""

import logging
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Literal

from features.errors import TesseraError

Engine = Literal["torchrec", "plain"]
PACKAGES = ("torchrec", "fbgemm_gpu")
_INSTALL = "pip install torchrec==1.9.2 fbgemm-gpu-cpu==1.8.0 (they go with torch 2.13.0)"
_LOGGER = logging.getLogger(__name__)


@cache
def fused(module: str) -> ModuleType | None:
    """Imports a module that depends on TorchRec.

    Returns:
        None if `torchrec` or `fbgemm_gpu` is not installed.

    Raises:
        TesseraError: The packages are installed, but do not load.
    """
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        _say_once(" and ".join(missing))
        return None
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise TesseraError(f"TorchRec needs {error.name}, which is not installed; {_INSTALL}") from error
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        # If a library was built for another release of torch, the error names only a symbol or operator.
        said = " ".join(str(error).split())[:300]
        raise TesseraError(
            f"TorchRec and fbgemm are installed but do not load: {type(error).__name__}: {said}; {_INSTALL}"
        ) from error


def engine() -> Engine:
    """Returns the engine of the tables that this process trains."""
    return "torchrec" if fused("models.table.unified") else "plain"


@cache
def _say_once(packages: str) -> None:
    _LOGGER.warning(
        "not installed: %s; the plain table and network take their place, with equal numbers but dense gradients, many "
        "times slower; %s",
        packages,
        _INSTALL,
    )
