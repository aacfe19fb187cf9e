"""The experiments of a model in the registry: started and ended. Servers and judges follow what stands there."""

import time
from collections.abc import Sequence

import msgspec

from features.errors import BundleError, TesseraError
from models.registry.registry import CHAMPION, Registry, Release
from serving.rollout.experiment import Experiment, RampStep, room

# A tag of the registry holds so many characters on every database that MLflow may stand on.
_MOST_TEXT = 5_000
# Of a reason, what stands with the experiment; all of it stands with the challenger's version.
_MOST_WHY = 400


class PastExperiment(msgspec.Struct, frozen=True):
    """An experiment that ended: when, in seconds since 1970, and why."""

    experiment: Experiment
    ended: int
    why: str


def past(registry: Registry, model: str) -> list[PastExperiment]:
    """Returns the last experiments that ended on a model, oldest first."""
    text = registry.ended_rollouts(model)
    return msgspec.json.decode(text, type=list[PastExperiment]) if text else []


def running(registry: Registry, model: str) -> list[Experiment]:
    """Returns the experiments that run on a model."""
    text = registry.rollouts(model)
    try:
        return msgspec.json.decode(text, type=list[Experiment]) if text else []
    except msgspec.DecodeError as error:
        raise BundleError(f"model {model!r}: the rollouts in the registry cannot be read: {error}") from error


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
        challenger: an alias, a version, or a bundle's id.
        ramp: shares by time.

    Raises:
        TesseraError: no such release, it is the champion, or the layer has no room.
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
    held = running(registry, champion.model)
    called = name or f"{champion.model}-{release.version}"
    before = [one.experiment.started for one in past(registry, champion.model) if one.experiment.name == called]
    made = Experiment(
        name=called,
        challenger=release.bundle,
        control=champion.bundle,
        layer=layer,
        start=0.0,
        ramp=list(ramp),
        # A name that was used gets another id: impressions tell the two apart by it.
        started=max([int(time.time()), *(second + 1 for second in before)]),
        shadow=shadow,
    )
    made.check()
    if any(one.name == made.name for one in held):
        raise TesseraError(f"rollout {made.name!r} runs already; end it by `tessera rollout stop`, or choose a --name")
    made = msgspec.structs.replace(made, start=room(layer, made.reserved, held))
    _set(registry, champion.model, [*_changed(held, {layer}), made])
    return made


def stop(registry: Registry, model: str | None, name: str, *, why: str) -> Release:
    """Ends an experiment: its users get the champion, and the reason stands with the challenger."""
    with registry.changing():
        return _stop(registry, model, name, why)


def _stop(registry: Registry, model: str | None, name: str, why: str) -> Release:
    champion = registry.resolve(model, CHAMPION)
    held = running(registry, champion.model)
    ended = next((one for one in held if one.name == name), None)
    if ended is None:
        known = ", ".join(one.name for one in held) or "none"
        raise TesseraError(f"rollout {name!r}: there is no such; there are: {known}")
    _end(registry, champion.model, held, [ended], why)
    release = registry.release(champion.model, ended.challenger)
    # The reason stands with a challenger that no other experiment still tries; one in the shadow stays a challenger.
    if not ended.shadow and not any(one.challenger == ended.challenger for one in held if one.name != name):
        registry.end_challenge(release, why=why)
    return registry.release(champion.model, release.version)


def promoted(registry: Registry, release: Release) -> Release:
    """Makes a release the champion, and ends the experiments that this decides: those against the champion before."""
    with registry.changing():
        now = registry.promote(release)
        held = running(registry, release.model)
        over = [one for one in held if one.control != now.bundle]
        if over:
            _end(registry, release.model, held, over, f"{now.bundle} was promoted")
        return now


def parse_ramp(text: str | None, share: float) -> list[RampStep]:
    """`0:.01,3600:.1` as steps of seconds and shares; without a text one share from the start.

    Raises:
        TesseraError: it is not of that form.
    """
    if text is None:
        return [RampStep(0.0, share)]
    try:
        pairs = [pair.split(":") for pair in text.split(",")]
        return [RampStep(float(after), float(value)) for after, value in pairs]
    except ValueError as error:
        raise TesseraError(f"--ramp {text}: expected SECONDS:SHARE,…, like 0:.01,3600:.1") from error


def _changed(experiments: Sequence[Experiment], layers: set[str]) -> list[Experiment]:
    """Experiments whose layer gains or loses another: from now on their control is another one."""
    now = int(time.time())
    return [
        msgspec.structs.replace(one, changed=max(now, one.epoch(now) + 1), changes=one.changes + 1)
        if one.layer in layers
        else one
        for one in experiments
    ]


def _end(registry: Registry, model: str, held: Sequence[Experiment], ended: Sequence[Experiment], why: str) -> None:
    """Servers stop first; what ended is noted after."""
    kept_on = [one for one in held if one not in ended]
    _set(registry, model, _changed(kept_on, {one.layer for one in ended}))
    moment = int(time.time())
    kept = [*past(registry, model), *(PastExperiment(one, moment, why[:_MOST_WHY]) for one in ended)]
    while len(text := msgspec.json.encode(kept).decode()) > _MOST_TEXT:
        del kept[0]
    registry.set_ended_rollouts(model, text)


def _set(registry: Registry, model: str, experiments: Sequence[Experiment]) -> None:
    text = msgspec.json.encode(list(experiments)).decode()
    if len(text) > _MOST_TEXT:
        raise TesseraError(
            f"model {model!r}: {len(experiments)} rollouts are more than the registry can hold; end one, or give them "
            "shorter ramps and names"
        )
    registry.set_rollouts(model, text)
