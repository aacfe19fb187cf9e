"""The set-up script compiles modules that exist; it goes on when an import fails."""

import re
from importlib.util import find_spec
from pathlib import Path

SCRIPT = (Path(__file__).parents[3] / "infra" / "setup.sh").read_text(encoding="utf-8")


def missing(script: str) -> list[str]:
    """Modules of the script's import statement that Python does not find."""
    (names,) = re.findall(r"'import ([\w., ]+)'", script)
    return [name for name in names.split(", ") if find_spec(name) is None]


def test_every_module_that_set_up_imports_exists() -> None:
    assert missing(SCRIPT) == []
    assert missing(SCRIPT.replace("tessera.stream_service", "tessera.no_such_module")) == ["tessera.no_such_module"]
