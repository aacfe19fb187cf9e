"""TorchRec and fbgemm, or the plain twins where the packages are not installed: decided in one place, and said once.

Only a package that is missing is replaced. A package that is there and does not load is an error which names it: the
twins give the same numbers, but a dense gradient of (R, D) a step makes them many times slower.
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
    """Imports a module that stands on TorchRec.

    Returns:
        None where `torchrec` or `fbgemm_gpu` is not installed.

    Raises:
        TesseraError: the packages are installed, but do not load.
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
        # Of a library for another release of torch, an undefined symbol or a missing operator is all that is said.
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
