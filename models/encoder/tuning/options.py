"""Options of a fit by pairs, and their values by name."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar, get_origin, get_type_hints

import msgspec

from features.config import nearest
from features.errors import TesseraError
from models.encoder.losses import LossOptions

Head = Literal["linear", "low-rank"]
Chosen = TypeVar("Chosen")
_LOSS = "loss"


@dataclass(frozen=True)
class TuneOptions:
    """Choices of a fit.

    Attributes:
        head: `linear` is a matrix (D, D), `low-rank` the identity and a correction of `rank`.
        rank: K.
        pull: Weight of the squared distance from the identity, divided by D; 0 is off.
        loss: Choices of the loss, but for its temperature.
        temperatures: Temperatures of the loss that are tried; the temperature by which most held-out items are found is
            kept.
        batch: B, at least 2.
        rate: Learning rate of Adam.
        rounds: Most rounds; a round visits each row that has a pair four times.
        patience: Rounds without a better one after which the first phase ends.
        prefixes: Widths at which the first values alone are trained too; none by default. A tuned head then keeps more
            in its prefix than a rotation of it would.
            Kusupati et al., "Matryoshka Representation Learning" (2022).
        seed: Seed of the batches, the held-out items and the first weights.

    Raises:
        TesseraError: A value is out of its range.
    """

    head: Head = "linear"
    rank: int = 32
    pull: float = 0.02
    loss: LossOptions = field(default_factory=LossOptions)
    temperatures: tuple[float, ...] = (0.07, 0.12)
    batch: int = 512
    rate: float = 6e-3
    rounds: int = 40
    patience: int = 5
    prefixes: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.head not in ("linear", "low-rank"):
            raise TesseraError(f"head: expected linear or low-rank, got {self.head!r}")
        for name, least in (("rank", 1), ("batch", 2), ("rounds", 1), ("patience", 1), ("pull", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise TesseraError(f"{name}: expected {least} or more, got {getattr(self, name)}")
        if not self.temperatures or not all(value > 0 for value in self.temperatures):
            given = ", ".join(map(str, self.temperatures)) or "none"
            raise TesseraError(f"temperatures: expected numbers above 0, got {given}")
        if any(width < 1 for width in self.prefixes):
            raise TesseraError(f"prefixes: expected widths of 1 or more, got {', '.join(map(str, self.prefixes))}")


def chosen(kind: type[Chosen], given: Sequence[str], **fixed: Any) -> Chosen:
    """Returns the options of a fit in which some values are replaced.

    Args:
        kind: Dataclass of the fit's options; the fields of its `loss` have names of their own.
        given: `NAME=VALUE` each; the values of a list are separated by commas, and the last of a name counts.
        fixed: Options by name that are not named in `given`.

    Raises:
        TesseraError: A name is unknown, or a value is of another type or out of its range; names the value.
    """
    own, of_loss = _kinds(kind), _kinds(LossOptions)
    known = {name: value for name, value in (of_loss | own).items() if name != _LOSS and name not in fixed}
    if "temperatures" in own:
        known.pop("temperature")
    values: dict[str, Any] = {}
    for pair in given:
        name, equals, text = (part.strip() for part in pair.partition("="))
        if not equals:
            raise TesseraError(f"--set {pair}: expected NAME=VALUE, rounds=10 for example")
        if name not in known:
            there = ", ".join(known)
            raise TesseraError(f"--set {pair}: unknown name; the nearest is {nearest(name, known)!r} (valid: {there})")
        value = [part.strip() for part in text.split(",") if part.strip()] if get_origin(known[name]) is tuple else text
        try:
            values[name] = msgspec.convert(value, known[name], strict=False)
        except msgspec.ValidationError as error:
            raise TesseraError(f"--set {pair}: {error}") from error
    built: Any = kind
    loss = LossOptions(**{name: value for name, value in values.items() if name not in own})
    made: Chosen = built(**{name: value for name, value in values.items() if name in own}, **fixed, loss=loss)
    return made


def _kinds(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {choice.name: hints[choice.name] for choice in fields(kind)}
