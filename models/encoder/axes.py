"""Principal axes of a catalogue: the rotation after which the first dimensions keep most of the task.

The axes come from the vectors alone. No training is needed, and a prefix of the rotated vector is the best linear
prefix in squared error. Pearson (1901); Jolliffe, "Principal component analysis" (2002), chapter 2.

Shape letters: N vectors, D dim, E kept dims.
"""

import numpy as np
from numpy.typing import NDArray

from features.content.step import Centre, Cut, Floats, Rotate, VectorStep
from features.errors import DatasetError
from features.threads import one_thread


def principal_axes(vectors: NDArray[np.float32], dim: int) -> tuple[Floats, Floats]:
    """Returns the mean (D,) and the first E = `dim` principal axes (D, E) of vectors (N, D), largest variance first.

    The sign of an axis is that of its largest weight, so that the same catalogue gives the same axes.
    """
    mean: Floats = vectors.mean(axis=0, dtype=np.float64)
    centred = vectors - mean
    with one_thread():
        axes = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :dim]
    heaviest = axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])]
    return mean, axes * np.where(heaviest < 0, -1.0, 1.0)


def rotation(vectors: NDArray[np.float32]) -> tuple[Centre, Rotate]:
    """Fits the steps that turn a catalogue's vectors (N, D) onto their principal axes, with all D dimensions.

    Raises:
        DatasetError: Fewer than two vectors have content.
    """
    filled = vectors[vectors.any(axis=1)]
    if len(filled) < 2:
        raise DatasetError(f"rotate: {len(filled)} vectors with content, expected 2 or more; encode a catalogue first")
    mean, axes = principal_axes(filled, vectors.shape[1])
    return Centre(mean=mean), Rotate(matrix=axes)


def smaller(vectors: NDArray[np.float32], dim: int) -> tuple[VectorStep, ...]:
    """Fits the steps to E = `dim` dimensions: centre, rotate, cut.

    Raises:
        DatasetError: `dim` is not between 1 and D.
    """
    cut = Cut.to(dim, width=vectors.shape[1])
    return *rotation(vectors), cut
