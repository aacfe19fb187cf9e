"""Environments of the peers that cannot or need not live in Tessera's own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from features.errors import TesseraError

PEER_FOLDER = Path(__file__).parents[1] / "peers"
# Where `make setup` puts uv on a machine that has none.
_OWN_UV = Path(__file__).parents[3] / ".uv" / "bin" / "uv"


def peer_python(directory: Path, pins: Path, console: Console) -> Path:
    """Builds an environment of pinned packages where there is none and returns its interpreter.

    Raises:
        TesseraError: it cannot be built.
    """
    python, ready = directory / "bin" / "python", directory / "ready"
    if ready.exists() and ready.read_text() == pins.read_text():
        return python
    console.print(f"installing the peers of {pins.name}")
    uv = shutil.which("uv") or str(_OWN_UV)
    # A build that was interrupted leaves no mark, and starts again.
    (directory / "ready").unlink(missing_ok=True)
    install = [uv, "pip", "install", "--quiet", "--python", str(python), "-r", str(pins)]
    if backend := os.environ.get("TORCH_BACKEND"):
        install += ["--torch-backend", backend]
    try:
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(directory)], check=True)
        subprocess.run(install, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise TesseraError(
            f"the peers' environment {directory} could not be built ({error}); install uv, and give it a package index "
            f"that has what {pins.name} pins"
        ) from error
    ready.write_text(pins.read_text())
    return python
