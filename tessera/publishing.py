"""The last step of the offline job: a bundle into the registry, past the gates, with where it came from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from features.dataset import Dataset
from features.error import BundleError
from features.frame import Frame
from features.profile import profile
from models.bundle import Bundle
from models.gate import Gates, Verdict
from models.registry import CHALLENGER, CHAMPION, Lineage, Registry, Release
from tessera.judging import verdict

_OTHER_DATA = "The champion was trained on other data than these: it may have seen some of the test."


@dataclass(frozen=True)
class Origin:
    """Where a bundle comes from.

    Attributes:
        data_key: hash of the descriptor and of every file's bytes.
        split: how the test part was chosen.
        options: of the run, nested.
        parent: id of the bundle that it was warm-started from, or None.
        code: version of the code that made it.
        engine: of the table in training.
    """

    dataset: Dataset
    data_key: str
    split: str
    options: dict[str, Any]
    parent: str | None
    code: str
    engine: str


class Publisher:
    """Registers bundles.

    Args:
        champions: where the champion is fetched to.
    """

    def __init__(self, registry: Registry, console: Console, champions: Path) -> None:
        self._registry = registry
        self._console = console
        self._champions = champions

    def publish(
        self, bundle: Bundle, origin: Origin, frame: Callable[[], Frame], gates: Gates
    ) -> tuple[Release, Verdict | None]:
        """Registers a bundle; it becomes the challenger where the gates let it.

        Args:
            frame: of the run, whose test part both are measured on.

        Returns:
            The release, and the verdict; none of the first bundle, nor of one that has its alias already.
        """
        with self._console.status("publish: registering in MLflow"):
            release = self._registry.publish(
                bundle,
                params={"split": origin.split} | flat(origin.options),
                metrics=_test_metrics(bundle),
                lineage=Lineage(
                    dataset=origin.data_key,
                    encoder=bundle.manifest.encoder,
                    codebook=bundle.manifest.codebook,
                    parent=origin.parent,
                    code=origin.code,
                    engine=origin.engine,
                    profile=profile(origin.dataset).to_json(),
                ),
            )
        if {CHAMPION, CHALLENGER} & set(release.aliases):
            return release, None
        before = self._registry.resolve(release.model)
        with self._console.status("publish: the champion on the same test set"):
            try:
                champion = self._registry.open(before, self._champions)
            except BundleError as error:
                said = (
                    f"publish: the champion cannot be compared with: {error}; the bundle has no alias, "
                    f"`tessera rollout promote {release.version}` makes it the champion"
                )
                self._console.print(Text(said, "yellow"))
                return release, None
            note = "" if self._registry.lineage(before).dataset == origin.data_key else _OTHER_DATA
            judged = verdict(champion, bundle, frame(), gates, note=note)
        if judged.passed:
            return self._registry.challenge(release, verdict=judged.to_json()), judged
        self._registry.record(release, "gates.json", judged.to_json())
        return release, judged


def flat(options: dict[str, Any]) -> dict[str, str]:
    """Nested options by dotted name, as short as MLflow takes them."""
    found: dict[str, str] = {}
    pending: list[tuple[str, Any]] = [("", options)]
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict):
            pending += [(f"{name}.{key}".lstrip("."), below) for key, below in value.items()]
        else:
            found[name] = str(value)[:500]
    return found


def _test_metrics(bundle: Bundle) -> dict[str, float]:
    quality = bundle.manifest.metrics["quality"]["ranker"]
    return {
        f"{part}.{name}": value
        for part, measured in quality.items()
        for name, value in measured.items()
        if value is not None
    }
