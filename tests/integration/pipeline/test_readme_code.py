"""The README's lines of Python run, and return what their comments say."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from tests.integration.world import World

README = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")


def test_the_readmes_lines_of_python_run(world: World) -> None:
    code = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[0]
    # The run of the world is finished: the README's run goes on from its stages and makes the same bundle.
    for named, place in (("shop.toml", world.dataset.source), ("out/publish", world.directory / "publish")):
        assert f'"{named}' in code
        code = code.replace(f'"{named}', f'"{place}')
    assert '"out"' in code
    found: dict[str, Any] = {}
    exec(compile(code.replace('"out"', repr(str(world.directory))), "README.md", "exec"), found)
    assert found["result"].executed == {}
    assert found["result"].bundle.id == found["bundle"].id == world.bundle.id
    assert found["vectors"].shape[0] == 2
    assert found["vectors"].dtype == found["scores"].dtype == np.float32
    assert found["codes"].shape == (1, world.bundle.codebook.levels if world.bundle.codebook else 0)
    assert found["scores"].shape == (2,)
    assert ((found["scores"] > 0) & (found["scores"] < 1)).all()
