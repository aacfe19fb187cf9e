"""Alarms of drift: the tolerances, and the evidence of all measures of a profile against them.

Shape letters: M measures, C cells.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from features.errors import TesseraError
from models.profile.profile import ProfileMeasure
from serving.skew.evidence import ball_evidence, ball_of, interval_evidence, interval_of


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
        tolerated: For each measure the largest 8 H² and 0, or the ends of the interval of a share.

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
            else (ball_of(limits.psi, len(one.shares), one.units, alpha), 0.0)
            for one in measures
        ]
        self._shares = [np.array(one.shares) for one in measures]
        self._groups: dict[tuple[bool, int], list[int]] = defaultdict(list)
        for number, one in enumerate(measures):
            self._groups[one.is_share, len(one.shares)].append(number)

    def evidence(self, sums: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        """Returns the natural logarithm of the evidence (M,) against all tolerated distributions.

        Args:
            sums: For each measure the sums (C,) of the users' shares.
        """
        found = np.zeros(len(sums))
        for (is_share, _), numbers in self._groups.items():
            counts = np.stack([sums[number] for number in numbers])
            shares = np.stack([self._shares[number] for number in numbers])
            first, second = np.array([self.tolerated[number] for number in numbers]).T
            if is_share:
                found[numbers] = interval_evidence(counts, shares, first, second)
            else:
                found[numbers] = ball_evidence(counts, shares, first)
        return found
