"""The names of the platform's topics."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Topics:
    """The platform's topics on one log; a prefix keeps several platforms on one broker apart.

    Attributes:
        prefix: put before each name as it is.
    """

    prefix: str = ""

    @property
    def items(self) -> str:
        """Rows of the items' table, as JSON."""
        return f"{self.prefix}items"

    @property
    def events(self) -> str:
        """Rows of the events' table, as JSON."""
        return f"{self.prefix}events"

    @property
    def deltas(self) -> str:
        """What the trainer changed; `models.bundle.delta` says in which bytes."""
        return f"{self.prefix}deltas"

    @property
    def dead_letters(self) -> str:
        """Messages that could not be used, with the reason."""
        return f"{self.prefix}deadletters"

    @property
    def impressions(self) -> str:
        """What was shown to whom, by which bundle."""
        return f"{self.prefix}impressions"

    @property
    def outcomes(self) -> str:
        """What users did with what was shown."""
        return f"{self.prefix}outcomes"

    def partitions(self, inputs: int = 1) -> dict[str, int]:
        """How many partitions each topic gets; deltas stay in one, since their order is the table's history."""
        return {
            self.items: inputs,
            self.events: inputs,
            self.deltas: 1,
            self.dead_letters: 1,
            self.impressions: inputs,
            self.outcomes: inputs,
        }
