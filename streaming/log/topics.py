"""The names of the platform's topics."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Topics:
    """Topics of the platform on one log; a prefix separates several platforms on one broker.

    Attributes:
        prefix: Text put before each name, unchanged.
        parts: Number of partitions of the inputs and of row ranges of the table. It counts when the topics are created.
    """

    prefix: str = ""
    parts: int = 1

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
        """Changes by the trainer, encoded by `models.bundle.delta`."""
        return f"{self.prefix}deltas"

    @property
    def steps(self) -> str:
        """Inputs of each step of a stream of several partitions; see `streaming.ranks.pins`. One partition."""
        return f"{self.prefix}steps"

    @property
    def dead_letters(self) -> str:
        """Messages that could not be used, with the reason."""
        return f"{self.prefix}deadletters"

    @property
    def impressions(self) -> str:
        """Impressions: shown items, user and bundle."""
        return f"{self.prefix}impressions"

    @property
    def outcomes(self) -> str:
        """Outcomes: actions of users on shown items."""
        return f"{self.prefix}outcomes"

    @property
    def skew(self) -> str:
        """Sampled records of what servers read for an answer, encoded by `serving.skew.record`."""
        return f"{self.prefix}skew"

    @property
    def joins(self) -> str:
        """Progress of the joiner: see `streaming.shown.joiner`. One partition, made by the joiner."""
        return f"{self.prefix}joins"

    @property
    def followed(self) -> str:
        """Entries of the stream that follows the releases; see `streaming.shared.ledger`. One partition."""
        return f"{self.prefix}followed"

    @property
    def forgotten(self) -> str:
        """Requests to forget users, and the audit of removals, as JSON; see `streaming.forget.message`."""
        return f"{self.prefix}forgotten"

    def partitions(self, inputs: int = 1) -> dict[str, int]:
        """Returns the number of partitions of each topic.

        Deltas have one partition for each row range, since the order of a range's deltas is the range's history.
        """
        inputs = max(inputs, self.parts)
        pins = {self.steps: 1} if self.parts > 1 else {}
        return pins | {
            self.items: inputs,
            self.events: inputs,
            self.deltas: self.parts,
            self.dead_letters: 1,
            self.forgotten: 1,
            self.impressions: inputs,
            self.outcomes: inputs,
            self.skew: inputs,
        }
