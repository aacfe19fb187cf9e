"""Steps that erase a concept from vectors, for vectors that must not tell it. Each fit returns an `Erase` step.

Erasing is not blocking. A probe forgets the concept, but items with the concept still lie near each other by all else
that they share. A query that must avoid a concept uses `steer`; an answer that must not hold it uses a filter.

Shape letters: N vectors, D dim, R rank.
"""

import numpy as np
from numpy.typing import NDArray

from features.content.step import Erase, Floats
from features.errors import DatasetError
from models.encoder.meaning.concepts import Probe

CLUSTERS = 4
_SMALLEST = 1e-7  # variance of a direction, as a share of the largest, below which the vectors do not span it


def leace(vectors: NDArray[np.floating], carries: NDArray[np.bool_], *, name: str) -> Erase:
    """Fits the smallest change of vectors after which no linear probe finds the concept.

    Belrose et al., "LEACE: Perfect linear concept erasure in closed form" (NeurIPS 2023), theorem 4.3.

    Args:
        vectors: (N, D) unit vectors.
        carries: (N,) True for each vector with the concept.
        name: Name of the concept, for errors.

    Raises:
        DatasetError: No vector carries the concept, or every vector does.
    """
    _refuse_empty(carries, name)
    rows = np.asarray(vectors, dtype=np.float64)
    mean = rows.mean(axis=0)
    centred = rows - mean
    variances, axes = np.linalg.eigh(centred.T @ centred / len(rows))
    spanned = variances > _SMALLEST * variances[-1]
    axes, deviations = axes[:, spanned], np.sqrt(variances[spanned])
    covariance = centred.T @ (carries - carries.mean()) / len(rows)
    whitened = (axes / deviations) @ (axes.T @ covariance)
    length = np.linalg.norm(whitened)
    if length < 1e-9:
        raise DatasetError(f"concept {name!r}: the vectors hold nothing of it, so there is nothing to erase")
    direction = whitened / length
    left = (axes / deviations) @ (axes.T @ direction)
    right = (axes * deviations) @ (axes.T @ direction)
    return _step(mean, left[:, None], right[None], None)


def cluster_means(
    vectors: NDArray[np.floating],
    carries: NDArray[np.bool_],
    gate: Probe | None,
    *,
    name: str,
    clusters: int = CLUSTERS,
    seed: int = 0,
) -> Erase:
    """Fits a step that removes the span of the carriers' cluster means.

    A concept has several kinds of carriers, so one mean does not span it. The gate limits the change to vectors that
    have the concept: Yoon et al., "SAFREE" (ICLR 2025).

    Args:
        vectors: (N, D) unit vectors.
        carries: (N,) True for each vector with the concept.
        gate: Probe of the concept; None changes every vector.
        name: Name of the concept, for errors.
        clusters: R, number of clusters.
        seed: Seed of the clustering.

    Raises:
        DatasetError: Fewer vectors carry the concept than there are clusters, or every vector does.
    """
    from sklearn.cluster import KMeans

    _refuse_empty(carries, name, least=clusters)
    rows = np.asarray(vectors, dtype=np.float64)
    means = KMeans(clusters, n_init=3, random_state=seed).fit(rows[carries]).cluster_centers_
    return _span(rows.mean(axis=0), means, gate)


def phrases(vectors: NDArray[np.floating], named: NDArray[np.floating], gate: Probe | None, *, name: str) -> Erase:
    """Fits a step that removes the span of phrases that name the concept, for a concept without carriers.

    "DECOR" (2025); the gate as in `cluster_means`.

    Args:
        vectors: (N, D) unit vectors.
        named: (R, D) vectors of the phrases; zero rows are left out.
        gate: Probe of the concept; None changes every vector.
        name: Name of the concept, for errors.

    Raises:
        DatasetError: No phrase holds a known term.
    """
    known = np.asarray(named, dtype=np.float64)[np.any(named, axis=1)]
    if not len(known):
        raise DatasetError(f"concept {name!r} is empty: no phrase holds a term that the encoder knows; name others")
    return _span(np.asarray(vectors, dtype=np.float64).mean(axis=0), known, gate)


def random_subspace(vectors: NDArray[np.floating], rank: int, *, seed: int = 0) -> Erase:
    """Returns the control of an erasure: a step that removes `rank` random directions."""
    rows = np.asarray(vectors, dtype=np.float64)
    drawn = np.random.default_rng(seed).normal(size=(rank, rows.shape[1]))
    mean = rows.mean(axis=0)
    return _span(mean, mean + drawn, None)


def _span(mean: Floats, points: Floats, gate: Probe | None) -> Erase:
    basis, lengths, _ = np.linalg.svd((points - mean).T, full_matrices=False)
    basis = basis[:, lengths > 1e-6 * lengths[0]]
    return _step(mean, basis, basis.T, gate)


def _step(mean: Floats, left: Floats, right: Floats, gate: Probe | None) -> Erase:
    probe = np.zeros(len(mean)) if gate is None else gate.weight
    bias = np.ones(1) if gate is None else np.array([gate.bias])
    return Erase(mean=mean, left=left, right=right, probe=probe, bias=bias)


def _refuse_empty(carries: NDArray[np.bool_], name: str, least: int = 1) -> None:
    count = int(carries.sum())
    if count < least or count == len(carries):
        empty = "" if count else " is empty"
        raise DatasetError(
            f"concept {name!r}{empty}: {count} of {len(carries)} items carry it, expected {least} at least and not "
            "all; name another concept"
        )
