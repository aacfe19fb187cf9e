"""Alarms of drift: the tolerances, and the evidence of all measures of a profile against them.

Shape letters: M measures, C cells, U users.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from features.errors import TesseraError
from models.profile.profile import ProfileMeasure
from serving.skew.evidence import Capital, ball_of, interval_of


@dataclass(frozen=True)
class DriftLimits:
    """Tolerances of the alarms.

    Attributes:
        alpha: Probability of a false alarm in a window, over all measures and looks.
        psi: Largest population stability index that is no alarm.
        share: Largest difference of a share of missing or unseen values that is no alarm.

    Raises:
        TesseraError: A value is out of range.
    """

    alpha: float = 0.01
    psi: float = 0.1
    share: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1 or not 0 < self.psi < math.inf or not 0 < self.share < 1:
            raise TesseraError(
                f"drift: alpha {self.alpha:g}, psi {self.psi:g}, share {self.share:g}: expected psi above 0, and alpha "
                "and share between 0 and 1"
            )


class DriftAlarms:
    """Tolerated distributions of each measure, and the evidence against them.

    Attributes:
        enough: Natural logarithm of the evidence of an alarm.
        tolerated: Set of tolerated distributions of each measure.

    Args:
        measures: M measures of a profile.
        limits: Tolerances.
    """

    def __init__(self, measures: Sequence[ProfileMeasure], limits: DriftLimits) -> None:
        # Half of α is for the sample that the profile is, half for the evidence.
        alpha = limits.alpha / 2 / max(len(measures), 1)
        self.enough = -math.log(alpha)
        self.tolerated = [
            interval_of(limits.share, one.shares[1], one.units, alpha)
            if one.is_share
            else ball_of(limits.psi, np.array(one.shares), one.units, alpha)
            for one in measures
        ]
        trained = [np.array(one.shares) for one in measures]
        self._capitals = [Capital(*pair) for pair in zip(self.tolerated, trained, strict=True)]

    def add(self, number: int, shares: NDArray[np.float64]) -> None:
        """Counts users of a measure in the order of their requests, given as their shares (U, C)."""
        self._capitals[number].add(shares)

    def evidence(self) -> NDArray[np.float64]:
        """Returns the natural logarithm of the largest evidence (M,) so far, against all tolerated distributions."""
        return np.array([capital.evidence for capital in self._capitals])
