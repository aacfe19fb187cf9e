"""Who sees which arm: a salted hash of the user, the same in every process, with no store and nothing to remember.

A layer is a line from 0 to 1 on which every user has one place, by

    u = splitmix64(xxh3_64(user) XOR xxh3_64("rollout" US layer)) / 2**64

Experiments of one layer hold segments of it that do not overlap, so a user is in one of them at most; another layer is
another hash, so what a user sees there says nothing about here. An experiment's challenger takes the first `share` of
its segment. A ramp widens that share, and widening it moves only the users it must: those between the old end and the
new. Its control are the users that no segment holds.

Shape letter: N users.
"""

import re
from collections.abc import Sequence
from itertools import pairwise

import msgspec
import numpy as np
from numpy.typing import NDArray

from features.errors import TesseraError
from features.hashing import fingerprint, splitmix64

CONTROL, CHALLENGER = "control", "challenger"
_NAME = re.compile(r"\w[\w .-]{0,79}")
_EPS = 1e-9


class RampStep(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From `after_s` seconds after the start on, the challenger gets `share` of the layer."""

    after_s: float
    share: float


class Experiment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One challenger against the champion.

    Attributes:
        name: unique among a model's experiments.
        challenger, control: bundle ids; the control is the champion of the start.
        layer: experiments of one layer share its users, without overlap.
        start: where its segment begins on the layer.
        ramp: shares by time, ascending in both; the last is what it ends at, and what is reserved.
        started: seconds since 1970.
        shadow: the challenger ranks and nobody sees it.
        changed: when another experiment of the layer last started or ended, in seconds since 1970: the control is
            another one since. changes: how often that happened.
    """

    name: str
    challenger: str
    control: str
    layer: str
    start: float
    ramp: list[RampStep]
    started: int
    shadow: bool = False
    changed: int = 0
    changes: int = 0

    @property
    def id(self) -> str:
        """What impressions call it: a name may be used again, later."""
        return f"{self.name}@{self.started}"

    @property
    def reserved(self) -> float:
        """The most of the layer that it will take."""
        return self.ramp[-1].share

    def share(self, now: float) -> float:
        """What the challenger gets of the layer at a moment, in seconds since 1970."""
        step = self._step(now)
        return self.ramp[step].share if step >= 0 else 0.0

    def epoch(self, now: float) -> int:
        """Since when the arms are what they are, in seconds since 1970: alike on all servers, whatever their clocks."""
        step = self._step(now)
        return max(self.started + int(self.ramp[max(step, 0)].after_s), self.changed)

    def part(self) -> float:
        """What one epoch may use of the chance of a false alarm: all epochs together never use more than all of it."""
        return 0.5 ** (self.changes + 1) / len(self.ramp)

    def _step(self, now: float) -> int:
        """Returns the step of the ramp that holds; -1 before the first, which a first step at once never is."""
        # A server's clock may be behind that of whoever started it.
        return sum(step.after_s == 0 or self.started + step.after_s <= now for step in self.ramp) - 1

    def check(self) -> None:
        """Raises TesseraError where the shares cannot be."""
        if not _NAME.fullmatch(self.name):
            raise TesseraError(
                f"rollout {self.name!r}: expected a name of 1 to 80 letters, digits, spaces and . _ -, first a "
                "letter or a digit"
            )
        if not self.ramp:
            raise TesseraError(f"rollout {self.name!r}: give a share")
        for step in self.ramp:
            if not 0 < step.share <= 1 or step.after_s < 0:
                raise TesseraError(
                    f"rollout {self.name!r}: share {step.share:g} after {step.after_s:g} s: expected a share above 0 "
                    "and up to 1, at 0 seconds or later"
                )
        for before, after in pairwise(self.ramp):
            if not (before.after_s < after.after_s and before.share < after.share):
                raise TesseraError(f"rollout {self.name!r}: a ramp goes up in time and share; {after} follows {before}")


def places(users: Sequence[str], layer: str) -> NDArray[np.float64]:
    """Where users (N,) stand on a layer, (N,) in [0, 1)."""
    (salt,) = fingerprint([f"rollout\x1f{layer}"])
    with np.errstate(over="ignore"):
        mixed = splitmix64(fingerprint(users) ^ salt)
    # 53 bits: what a float64 holds exactly, so that no place rounds up to 1.
    return (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53


def arms(users: Sequence[str], experiment: Experiment, others: Sequence[Experiment], now: float) -> NDArray[np.int8]:
    """Returns the arms of users (N,): 1 the challenger's, 0 the control's, -1 in neither.

    Args:
        others: all experiments; those of the same layer take users away from the control.
    """
    place = places(users, experiment.layer)
    end = experiment.start + experiment.share(now)
    found = np.zeros(len(users), dtype=np.int8)
    for other in others:
        if other.layer == experiment.layer:
            found[(place >= other.start) & (place < other.start + other.reserved)] = -1
    # What is reserved for later steps of the ramp is in neither arm yet: they would change sides.
    found[(place >= experiment.start) & (place < experiment.start + experiment.reserved)] = -1
    found[(place >= experiment.start) & (place < end)] = 1
    return found


def arm(user: str, experiment: Experiment, others: Sequence[Experiment], now: float) -> str | None:
    """Returns the arm of one user, None in neither; see `arms`."""
    found = int(arms([user], experiment, others, now)[0])
    return {1: CHALLENGER, 0: CONTROL}.get(found)


def room(layer: str, share: float, experiments: Sequence[Experiment]) -> float:
    """Where on a layer a new segment of a width can begin: the first gap that is wide enough.

    Raises:
        TesseraError: the layer has no room.
    """
    held = sorted((one.start, one.start + one.reserved) for one in experiments if one.layer == layer)
    at = 0.0
    for start, end in held:
        if start - at >= share - _EPS:
            return at
        at = max(at, end)
    if 1.0 - at >= share - _EPS:
        return at
    taken = sum(end - start for start, end in held)
    raise TesseraError(
        f"layer {layer!r}: {taken:.0%} of it are taken, and no {share:.0%} are free in one piece; give a smaller "
        "share, another --layer, or end an experiment"
    )


def expected_shares(experiment: Experiment, experiments: Sequence[Experiment], now: float) -> tuple[float, float]:
    """What control and challenger should hold of the layer at a moment."""
    taken = sum(one.reserved for one in experiments if one.layer == experiment.layer)
    return 1.0 - taken, experiment.share(now)
