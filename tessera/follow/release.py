"""Bundles that a stream which follows the releases trains, as the registry names them."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from features.errors import BundleError
from models.bundle.bundle import Bundle
from models.registry.registry import Registry
from models.registry.release import CHAMPION, Release
from serving.rollout.lifecycle import running

EXPERIMENT = "experiment"
"""Role of a bundle that a running experiment compares."""
_SETTLED_NS = 2_000_000_000
_ASK_EVERY_S = 0.25


@dataclass(frozen=True)
class Wanted:
    """Bundle to train.

    Attributes:
        release: Version of the bundle.
        roles: Aliases of the version, and `EXPERIMENT`. Sorted.
    """

    release: Release
    roles: tuple[str, ...]

    @property
    def is_champion(self) -> bool:
        """True if the bundle serves."""
        return CHAMPION in self.roles


class ReleaseWatch:
    """Watches the aliases and experiments of a model.

    Args:
        registry: Registry of the releases.
        bundles: Directory of fetched bundles.
        model: Name of the model. None: the registry holds one model.

    Raises:
        BundleError: The registry has no such model, or the model has no champion.
    """

    def __init__(self, registry: Registry, bundles: Path, model: str | None) -> None:
        self._registry = registry
        self._bundles = bundles
        self.model = registry.resolve(model, CHAMPION).model
        self._pulse: Any = None
        self._ask_at = 0.0
        self._stamp: tuple[int, ...] | None = None
        # Releases that were wanted last, by version. All of a release but its aliases stays, and the pulse has those.
        self._releases: dict[str, Release] = {}

    def changed(self) -> dict[str, Wanted] | None:
        """Returns the bundles to train by id, the champion first. None: nothing changed since the last call.

        A registry in a local file is asked when the file has changed, and a server four times a second at most.
        """
        # A request costs 20 ms, and the age of a file costs nothing. A recent write may hide another one.
        stamp = self._registry.stamp()
        if stamp is not None and stamp == self._stamp and time.time_ns() - stamp[0] > _SETTLED_NS:
            return None
        if stamp is None:
            if time.monotonic() < self._ask_at:
                return None
            self._ask_at = time.monotonic() + _ASK_EVERY_S
        # Stamp and pulse are read first. The next call follows a change that comes after them.
        pulse = self._registry.pulse(self.model)
        found = None if pulse == self._pulse else self._wanted(dict(pulse[0]))
        self._pulse, self._stamp = pulse, stamp
        return found

    def _wanted(self, aliases: dict[str, Any]) -> dict[str, Wanted]:
        found: dict[str, Wanted] = {}
        versions = dict.fromkeys(str(aliases[name]) for name in sorted(aliases, key=lambda name: name != CHAMPION))
        for version in versions:
            release = self._release(version)
            # The aliases of the pulse, since those of the registry may have changed meanwhile.
            names = sorted(name for name, number in aliases.items() if str(number) == version)
            found[release.bundle] = Wanted(release, tuple(names))
        for experiment in running(self._registry, self.model):
            for bundle in (experiment.control, experiment.challenger):
                known = found.get(bundle) or Wanted(self._release(bundle), ())
                found[bundle] = replace(known, roles=tuple(sorted({*known.roles, EXPERIMENT})))
        self._releases = {one.release.version: one.release for one in found.values()}
        return found

    def _release(self, version: str) -> Release:
        """Returns the release of a version, or of a bundle."""
        return self._releases.get(version) or self._registry.release(self.model, version)

    def open(self, release: Release) -> Bundle:
        """Returns the bundle of a release, fetched if it is not on this machine.

        Raises:
            BundleError: The bundle cannot be fetched, or is altered.
        """
        bundle = self._registry.open(release, self._bundles)
        if bundle.id != release.bundle:
            raise BundleError(f"bundle {bundle.id} is not what {release.model} version {release.version} names")
        return bundle
