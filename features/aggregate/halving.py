"""Exponential decay in whole numbers, so that every order of additions and every machine gives the same bits.

An event at time t weighs 2^((t - s) / h) against the start s of its epoch; an epoch is 16 half-lives long. The sum of
an epoch moves to the next by a shift of 16 bits, and the sum as of time t is divided by the weight of t (forward decay:
Cormode, Shkapenyuk, Srivastava & Xu, ICDE 2009). Weights are fixed-point numbers with 20 binary places, read from a
table of 4,096 steps a half-life: a weight is at most 0.017 % too small.

Shape letter: N events.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

_STEP_BITS: Final = 12
_STEPS: Final = 1 << _STEP_BITS
_ONE: Final = 1 << 20
HALF_LIVES: Final = 16
"""Half-lives of an epoch."""
MOST_US: Final = 1_000 * 86_400_000_000
"""Longest half-life in microseconds; a longer one would overflow."""

_TABLE: Final = np.array([round(_ONE * 2 ** (step / _STEPS)) for step in range(_STEPS)], dtype=np.int64)
_MOST_SHIFT: Final = 62


def epoch(times: NDArray[np.int64], half_life_us: int) -> NDArray[np.int64]:
    """Returns the epoch (N,) of times (N,) in microseconds."""
    return times // (HALF_LIVES * half_life_us)


def weights(times: NDArray[np.int64], half_life_us: int) -> NDArray[np.int64]:
    """Returns the weight (N,) of times (N,) within their epochs: 2^20 at the start, below 2^36 at the end."""
    into = times - epoch(times, half_life_us) * (HALF_LIVES * half_life_us)
    steps = into * _STEPS // half_life_us
    found: NDArray[np.int64] = _TABLE[steps & (_STEPS - 1)] << (steps >> _STEP_BITS)
    return found


def moved(sums: NDArray[np.int64], epochs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Moves sums (N, C) on by so many epochs (N,) ≥ 0; what falls below the last place is lost."""
    shift = np.minimum(HALF_LIVES * epochs, _MOST_SHIFT)
    found: NDArray[np.int64] = sums >> shift[:, None]
    return found
