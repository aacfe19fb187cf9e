"""Shape and training of the two towers."""

from dataclasses import dataclass

from features.errors import TrainingError


@dataclass(frozen=True)
class TowerConfig:
    """Choices of the two towers and of their training.

    Attributes:
        width: W, width of the vectors; a multiple of the table's `dim` and of `heads`. An id reads `width / dim` rows.
        blocks: Blocks of self-attention over the visits.
        heads: Heads of a block.
        dropout: Share of hidden units that a training step drops.
        id_dropout: Share of items whose id a training step hides, so that their content and columns carry them.
        user_dropout: Share of users whose id a training step hides.
        batch: Sequences of a training step.
        targets: Targets of a training step at most, drawn from the batch's visits.
        negatives: Items of the denominator: all up to this number, else the batch's targets and as many drawn ones.
        budget: Bytes of the towers' rows, beside those of the ranker; None for one row for each lookup of a value.
        max_epochs: Largest number of rounds through the sequences.
        patience: Rounds without a higher validation recall before training stops.
        rate: Learning rate of Adam.
        averaging: Share of the mean of the epochs' weights that stays when an epoch ends; the epoch's own weights have
            the rest. 0 keeps an epoch's own weights, 1 the mean of all epochs. Training goes on from the epoch's own.
        content_weight: Weight of content's list where it is fused with that of the towers; None to choose the weight on
            the validation part, see `chosen_weight`. Of trained towers, the weight that was chosen; None of towers of
            earlier releases, whose lists weigh the same.
    """

    width: int = 64
    blocks: int = 2
    heads: int = 2
    dropout: float = 0.2
    id_dropout: float = 0.1
    user_dropout: float = 0.5
    batch: int = 32
    targets: int = 1_024
    negatives: int = 16_384
    budget: int | None = None
    max_epochs: int = 40
    patience: int = 4
    rate: float = 2e-3
    averaging: float = 0.7
    content_weight: float | None = None

    def check(self, dim: int) -> None:
        """Raises TrainingError if the width does not fit the table or the heads."""
        for name, part in (("table.dim", dim), ("towers.heads", self.heads)):
            if self.width % part:
                raise TrainingError(f"towers.width: expected a multiple of {name} = {part}, got {self.width}")
