"""Starts and ends experiments of a model in the registry. Servers and judges follow the registry."""

import time
from collections.abc import Sequence

import msgspec

from features.errors import TesseraError
from models.registry.registry import Registry
from models.registry.release import CHAMPION, Release
from serving.rollout.experiment import Experiment, RampStep, room

# Part of a reason that is stored with the experiment; all of it is stored with the challenger's version.
_MOST_WHY = 400


class PastExperiment(msgspec.Struct, frozen=True):
    """Experiment that ended: time, in seconds since 1970, and reason."""

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
        challenger: Alias, version, or id of a bundle.
        ramp: Shares by time.

    Raises:
        TesseraError: There is no such release, it is the champion, or the layer has no room.
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
        # A name that was used before gets another id, by which impressions tell the two apart.
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
    """Ends an experiment: its users get the champion, and the reason is stored with the challenger."""
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
    # The reason is stored with a challenger that no other experiment tries; one in the shadow stays a challenger.
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
    """Parses `0:.01,3600:.1` as steps of seconds and shares; without a text, one share from the start.

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
    """Ends experiments: servers stop first; the ended experiments are recorded after."""
    kept_on = [experiment for experiment in experiments if experiment not in ended]
    registry.documents.set_running(model, _changed(kept_on, {experiment.layer for experiment in ended}))
    moment = int(time.time())
    over = [PastExperiment(experiment, moment, why[:_MOST_WHY]) for experiment in ended]
    registry.documents.set_ended(model, [*past(registry, model), *over])
