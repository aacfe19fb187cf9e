"""Assigns users to arms by a salted hash of their id, so all servers agree and no assignment is stored.

A layer is a line from 0 to 1. Every user has one place on it, by

    u = splitmix64(xxh3_64(user) XOR xxh3_64("rollout" US layer)) / 2**64

Experiments of one layer hold segments of it that do not overlap, so a user is in at most one of them. Another layer is
another hash, so its assignment is independent of this one. An experiment's challenger takes the first `share` of its
segment. A ramp widens that share and moves only the users between the old end and the new. The control consists of the
users that no segment holds.

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
    """Step of a ramp.

    Attributes:
        after_s: Time after the start from which the step applies, seconds.
        share: Share of the layer that the challenger gets.
    """

    after_s: float
    share: float


class Experiment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Experiment that compares one challenger with the champion.

    Attributes:
        name: Name, unique among a model's experiments.
        challenger: Id of the challenger's bundle.
        control: Id of the champion's bundle at the start.
        layer: Experiments of one layer share its users, without overlap.
        start: Start of the experiment's segment on the layer.
        ramp: Shares by time, ascending in both. The last share is reserved from the start on.
        started: Start of the experiment, Unix seconds.
        shadow: True if the challenger ranks but its rankings are never shown.
        changed: Time of the last start or end of another experiment of the layer, Unix seconds. The control changes at
            this time.
        changes: Number of such times.
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
        """Id in impressions. A later experiment may have the same name, but not the same id."""
        return f"{self.name}@{self.started}"

    @property
    def reserved(self) -> float:
        """Largest share of the layer that the experiment will take."""
        return self.ramp[-1].share

    def share(self, now: float) -> float:
        """Returns the challenger's share of the layer at a time, Unix seconds."""
        step = self._step(now)
        return self.ramp[step].share if step >= 0 else 0.0

    def epoch(self, now: float) -> int:
        """Returns the start of the epoch at a time, Unix seconds. Servers with different clocks get the same start."""
        step = self._step(now)
        return max(self.started + int(self.ramp[max(step, 0)].after_s), self.changed)

    def part(self) -> float:
        """Returns the share of α that an epoch may use. The shares of all epochs sum to at most 1."""
        return 0.5 ** (self.changes + 1) / len(self.ramp)

    def _step(self, now: float) -> int:
        """Returns the index of the step at a time, -1 before the first step. A step at 0 seconds always applies."""
        # A server's clock may be behind the clock that started the experiment.
        return sum(step.after_s == 0 or self.started + step.after_s <= now for step in self.ramp) - 1

    def check(self) -> None:
        """Raises TesseraError if the shares are impossible."""
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
    """Returns the places of users (N,) on a layer, (N,) in [0, 1)."""
    (salt,) = fingerprint([f"rollout\x1f{layer}"])
    with np.errstate(over="ignore"):
        mixed = splitmix64(fingerprint(users) ^ salt)
    # 53 bits, which a float64 holds exactly, so that no place rounds up to 1.
    return (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53


def arms(users: Sequence[str], experiment: Experiment, others: Sequence[Experiment], now: float) -> NDArray[np.int8]:
    """Returns the arms of users (N,): 1 for the challenger, 0 for the control, -1 for neither.

    Args:
        users: Ids of the users.
        experiment: The experiment.
        others: All experiments. Experiments of the same layer take users from the control.
        now: The time, Unix seconds.
    """
    position = places(users, experiment.layer)
    end = experiment.start + experiment.share(now)
    assigned = np.zeros(len(users), dtype=np.int8)
    for other in others:
        if other.layer == experiment.layer:
            assigned[(position >= other.start) & (position < other.start + other.reserved)] = -1
    # Users reserved for later steps of the ramp are in no arm yet, since they would change their arm later.
    assigned[(position >= experiment.start) & (position < experiment.start + experiment.reserved)] = -1
    assigned[(position >= experiment.start) & (position < end)] = 1
    return assigned


def arm(user: str, experiment: Experiment, others: Sequence[Experiment], now: float) -> str | None:
    """Returns the arm of one user, None for neither; see `arms`."""
    number = int(arms([user], experiment, others, now)[0])
    return {1: CHALLENGER, 0: CONTROL}.get(number)


def room(layer: str, share: float, experiments: Sequence[Experiment]) -> float:
    """Returns the place on a layer where a new segment of a width can begin: the first gap that is wide enough.

    Raises:
        TesseraError: The layer has no room.
    """
    segments = sorted((other.start, other.start + other.reserved) for other in experiments if other.layer == layer)
    free = 0.0
    for start, end in segments:
        if start - free >= share - _EPS:
            return free
        free = max(free, end)
    if 1.0 - free >= share - _EPS:
        return free
    reserved = sum(end - start for start, end in segments)
    raise TesseraError(
        f"layer {layer!r}: {reserved:.0%} of it is taken, and no {share:.0%} is free in one piece; give a smaller "
        "share, another --layer, or end an experiment"
    )


def expected_shares(experiment: Experiment, experiments: Sequence[Experiment], now: float) -> tuple[float, float]:
    """Returns the shares of the layer that control and challenger should hold at a time."""
    reserved = sum(other.reserved for other in experiments if other.layer == experiment.layer)
    return 1.0 - reserved, experiment.share(now)
