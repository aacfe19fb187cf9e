"""Starts and ends experiments of a model in the registry. Servers and judges follow the registry."""

import time
from collections.abc import Sequence

import msgspec

from features.errors import TesseraError
from models.registry.registry import Registry
from models.registry.release import CHAMPION, Release
from serving.rollout.experiment import Experiment, RampStep, room

# Largest length of a reason that is stored with the experiment. The challenger's version has the whole reason.
_MOST_WHY = 400


class PastExperiment(msgspec.Struct, frozen=True):
    """Experiment that ended.

    Attributes:
        experiment: The experiment.
        ended: Time of the end, Unix seconds.
        why: Reason of the end.
    """

    experiment: Experiment
    ended: int
    why: str


def past(registry: Registry, model: str) -> list[PastExperiment]:
    """Returns the last ended experiments of a model, oldest first."""
    return registry.documents.ended(model, PastExperiment)


def running(registry: Registry, model: str) -> list[Experiment]:
    """Returns the running experiments of a model."""
    return registry.documents.running(model, Experiment)


def start(
    registry: Registry,
    model: str | None,
    challenger: str,
    ramp: Sequence[RampStep],
    *,
    name: str | None = None,
    layer: str = "models",
    shadow: bool = False,
) -> Experiment:
    """Starts an experiment of a release against the champion.

    Args:
        registry: Registry of the model.
        model: Name of the model. None: the registry holds one model.
        challenger: Alias, version, or id of a bundle.
        ramp: Shares by time.
        name: Name of the experiment. Default: the model's name and the version.
        layer: Name of the layer.
        shadow: True if the challenger's rankings are never shown.

    Raises:
        TesseraError: The release does not exist, is the champion, or the layer has no room.
    """
    with registry.changing():
        return _start(registry, model, challenger, ramp, name, layer, shadow)


def _start(
    registry: Registry,
    model: str | None,
    challenger: str,
    ramp: Sequence[RampStep],
    name: str | None,
    layer: str,
    shadow: bool,
) -> Experiment:
    champion = registry.resolve(model, CHAMPION)
    release = registry.release(champion.model, challenger)
    if release.bundle == champion.bundle:
        raise TesseraError(f"{challenger}: this is the champion, which already serves; name another version")
    experiments = running(registry, champion.model)
    unique = name or f"{champion.model}-{release.version}"
    before = [other.experiment.started for other in past(registry, champion.model) if other.experiment.name == unique]
    experiment = Experiment(
        name=unique,
        challenger=release.bundle,
        control=champion.bundle,
        layer=layer,
        start=0.0,
        ramp=list(ramp),
        # An experiment with the name of an ended experiment gets a later start, so that their ids differ.
        started=max([int(time.time()), *(second + 1 for second in before)]),
        shadow=shadow,
    )
    experiment.check()
    if any(other.name == experiment.name for other in experiments):
        raise TesseraError(
            f"rollout {experiment.name!r} runs already; end it by `tessera rollout stop`, or choose a --name"
        )
    experiment = msgspec.structs.replace(experiment, start=room(layer, experiment.reserved, experiments))
    registry.documents.set_running(champion.model, [*_changed(experiments, {layer}), experiment])
    return experiment


def stop(registry: Registry, model: str | None, name: str, *, why: str) -> Release:
    """Ends an experiment. Its users get the champion, and the reason is stored with the challenger.

    Returns:
        The release of the challenger.
    """
    with registry.changing():
        return _stop(registry, model, name, why)


def _stop(registry: Registry, model: str | None, name: str, why: str) -> Release:
    champion = registry.resolve(model, CHAMPION)
    experiments = running(registry, champion.model)
    ended = next((experiment for experiment in experiments if experiment.name == name), None)
    if ended is None:
        known = ", ".join(experiment.name for experiment in experiments) or "none"
        raise TesseraError(f"no rollout named {name!r}; running: {known}")
    _end(registry, champion.model, experiments, [ended], why)
    release = registry.release(champion.model, ended.challenger)
    # The reason is stored only if no other experiment has the challenger. A shadow challenger remains the challenger.
    if not ended.shadow and not any(
        experiment.challenger == ended.challenger for experiment in experiments if experiment.name != name
    ):
        registry.end_challenge(release, why=why)
    return registry.release(champion.model, release.version)


def promoted(registry: Registry, release: Release) -> Release:
    """Makes a release the champion, and ends the experiments against the previous champion."""
    with registry.changing():
        now = registry.promote(release)
        experiments = running(registry, release.model)
        over = [experiment for experiment in experiments if experiment.control != now.bundle]
        if over:
            _end(registry, release.model, experiments, over, f"{now.bundle} was promoted")
        return now


def parse_ramp(text: str | None, share: float) -> list[RampStep]:
    """Parses a text like `0:.01,3600:.1` as steps of seconds and shares. Without a text, `share` applies at once.

    Raises:
        TesseraError: The text has another form.
    """
    if text is None:
        return [RampStep(0.0, share)]
    try:
        pairs = [pair.split(":") for pair in text.split(",")]
        return [RampStep(float(after), float(value)) for after, value in pairs]
    except ValueError as error:
        raise TesseraError(f"--ramp {text}: expected SECONDS:SHARE,…, like 0:.01,3600:.1") from error


def _changed(experiments: Sequence[Experiment], layers: set[str]) -> list[Experiment]:
    """Returns the experiments whose layer gains or loses an experiment, with a new control from now on."""
    now = int(time.time())
    return [
        msgspec.structs.replace(experiment, changed=max(now, experiment.epoch(now) + 1), changes=experiment.changes + 1)
        if experiment.layer in layers
        else experiment
        for experiment in experiments
    ]


def _end(
    registry: Registry, model: str, experiments: Sequence[Experiment], ended: Sequence[Experiment], why: str
) -> None:
    """Ends experiments. They are removed from the running experiments first, and then recorded as ended."""
    kept_on = [experiment for experiment in experiments if experiment not in ended]
    registry.documents.set_running(model, _changed(kept_on, {experiment.layer for experiment in ended}))
    moment = int(time.time())
    over = [PastExperiment(experiment, moment, why[:_MOST_WHY]) for experiment in ended]
    registry.documents.set_ended(model, [*past(registry, model), *over])
