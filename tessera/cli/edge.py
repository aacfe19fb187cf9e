"""The edge of the command line: every error becomes one line and an exit status, and none becomes a traceback."""

import contextlib
import sys
import traceback
from typing import TextIO, cast

from rich.text import Text

from features.errors import TesseraError
from features.fault import explain
from tessera.install import missing
from tessera.terminal import err_console

_USER, _DEFECT = 2, 1


def tell(error: BaseException, *, verbose: bool) -> int:
    """Prints an error on standard error and returns the exit status.

    Args:
        error: Error that ended the command. The panic of a library written in Rust is not an Exception, but comes here
            too.
        verbose: True prints the traceback first.

    Returns:
        2 if the user can fix it, 1 if the program is at fault.
    """
    if verbose:
        traceback.print_exception(error)
    if isinstance(error, TesseraError):
        return _say(str(error), _USER)
    if isinstance(error, ModuleNotFoundError) and (needed := missing(error)):
        return _say(needed, _USER)
    fault = explain(error)
    if fault is not None:
        return _say(fault, _USER)
    message = " ".join(str(error).split())[:500]
    hint = "" if verbose else "; run again as `tessera --verbose …` for the traceback, and report it"
    return _say(f"unexpected {type(error).__name__}: {message}{hint}", _DEFECT)


def print_anything() -> None:
    """Makes standard output and error accept any text: characters they cannot encode are printed as escapes."""
    for stream in (sys.stdout, sys.stderr):
        # A stream that cannot be reconfigured, such as a socket's, is left unchanged.
        with contextlib.suppress(AttributeError, OSError):
            cast("TextIO", stream).reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]


def _say(message: str, status: int) -> int:
    err_console.print(Text.assemble(("error:", "red"), f" {message}"), soft_wrap=True)
    return status
