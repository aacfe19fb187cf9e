"""Confidence intervals of the population stability indices that a report shows, each as of one look."""

import scipy


def harmonic(served: float, trained: float) -> float:
    """Returns the size of a comparison of two samples, of their effective numbers of observations. 0: unknown."""
    return 1 / (1 / served + 1 / trained) if served > 0 and trained > 0 else 0.0


def psi_interval(index: float, cells: int, units: float, *, alpha: float = 0.05) -> tuple[float | None, float | None]:
    """Returns the interval of the population stability index of two distributions, from that of two samples.

    The samples' index times their size is about noncentral chi-square (see `serving.skew.evidence`), with the true
    index times the size as noncentrality. The interval holds each true index of which the samples' is no extreme, so it
    is right where the true index is 0, too.

    Args:
        index: Index of the samples.
        cells: Number of cells.
        units: Size of the comparison. 0: unknown, and the interval is, too.
        alpha: Chance that the interval does not hold the true index.
    """
    if units <= 0:
        return None, None
    statistic, free = index * units, max(cells - 1, 1)

    def noncentrality(level: float) -> float:
        # Without noncentrality the statistic may be below the quantile already.
        if scipy.special.chndtr(statistic, free, 0.0) <= level:
            return 0.0
        return float(scipy.special.chndtrinc(statistic, free, level))

    low, high = noncentrality(1 - alpha / 2), noncentrality(alpha / 2)
    return round(low / units, 6), round(high / units, 6)
