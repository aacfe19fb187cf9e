"""Names a registered version of a model and the roles that a version may have."""

from dataclasses import dataclass

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
"""Aliases: the version that serves, the version that may replace it, and the version to which a rollback returns."""
BUNDLE_TAG = "tessera.bundle"
"""Tag of a version: id of its bundle."""
ENDED_TAG = "tessera.rollout"
"""Tag of a version: reason why it is no longer the challenger."""


@dataclass(frozen=True)
class Release:
    """One registered version of a model.

    Attributes:
        model: Name of the model.
        version: Number of the version, as text.
        bundle: Id of the bundle.
        aliases: Aliases of the version when the release was read, sorted.
    """

    model: str
    version: str
    bundle: str
    aliases: tuple[str, ...]
