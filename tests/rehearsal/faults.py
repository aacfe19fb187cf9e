"""Networks that break while they serve: a server of the rehearsal asks, at each ranking, how its bundle is broken."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from features.errors import EventError
from models.bundle.bundle import Bundle

VARIABLE = "TESSERA_REHEARSAL_FAULTS"
KINDS = ("raises", "no numbers", "hangs", "lost column")


def install(path: str) -> None:
    """Has bundles of this process give networks that break as the file says: kinds by bundle, as JSON."""
    network = Bundle.network

    def breaking(bundle: Bundle) -> Any:
        sound: Callable[..., torch.Tensor] = network(bundle)

        def call(pooled: torch.Tensor, batch: Any) -> torch.Tensor:
            kind = json.loads(Path(path).read_text()).get(bundle.id)
            if kind == "raises":
                raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
            if kind == "hangs":
                time.sleep(3_600)
            if kind == "lost column":
                raise EventError("context: unknown column 'hour'; the dataset's event columns are: none")
            found = sound(pooled, batch)
            return found * float("nan") if kind == "no numbers" else found

        return call

    Bundle.network = breaking  # type: ignore[method-assign]
