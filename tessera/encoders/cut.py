"""`tessera encoder cut`: writes a view of fewer dimensions, on the principal axes of the run's catalogue.

    OUT/views/NAME/            the view, see `features.content.chain.View`
    OUT/views/NAME/cut.json    its dimensions and the share of the variance that they keep

The run's stages are only read. `tessera publish` then puts the view into the bundle.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from features.content.chain import BASE, View, load_view
from features.content.kinds import load_encoder
from features.durable import recover_directory, replace_directory
from features.errors import DatasetError
from features.lock import locked
from models.encoder.axes import smaller
from models.semantic_id.vectors import read_vectors
from tessera.encoders.tune import view_directory
from tessera.pipeline.artifact import write_json
from tessera.pipeline.stage import finished_key

REPORT = "cut.json"


@dataclass(frozen=True)
class CutView:
    """Result of a cut.

    Attributes:
        directory: Directory of the view.
        view: The view: the steps of the view that was cut, if any, then centre, rotate and cut.
        width: D, the dimensions before.
        kept: Share of the centred vectors' squared length that the kept dimensions hold, 0 to 1.
    """

    directory: Path
    view: View
    width: int
    kept: float


def cut_view(run: Path, name: str, dims: int, *, of: str = BASE) -> CutView:
    """Fits the view on the run's vectors and writes it into the run's directory.

    Args:
        run: Directory of a run with the stage `encode`.
        name: Name of the new view.
        dims: Dimensions to keep, 1 to the width.
        of: Name of the view to cut; the base by default.

    Raises:
        TesseraError: The stage or the view is missing, the view reads another encoder, the name or the number of
            dimensions does not fit, or another command holds the view.
    """
    finished_key(run / "encode")
    directory = view_directory(run, name)
    with locked(directory, wait_s=0):
        recover_directory(directory)
        encoder = load_encoder(run / "encode" / "encoder").id
        before = View(BASE, encoder) if of == BASE else load_view(view_directory(run, of))
        if before.source != encoder:
            raise DatasetError(f"view {of!r} reads vectors of {before.source}, not of {encoder}; fit it again")
        vectors = before.of(read_vectors(run / "encode" / "vectors").vectors)
        steps = smaller(vectors, dims)
        centred = steps[0](vectors[vectors.any(axis=1)])
        kept = float(np.square(steps[1](centred)[:, :dims]).sum() / max(np.square(centred).sum(), 1e-12))
        found = CutView(directory, View(name, encoder, (*before.steps, *steps)), vectors.shape[1], kept)
        _write(found, of)
    return found


def _write(found: CutView, of: str) -> None:
    made = found.directory.with_name(f".{found.directory.name}.made")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    found.view.save(made)
    write_json(made / REPORT, {"of": of, "width": found.width, "dims": found.view.steps[-1].dim, "kept": found.kept})
    replace_directory(made, found.directory)
