"""Load of a server: whether it drains, and how many requests and bodies it has in hand."""


class State:
    """Whether a server takes new work, which `/readyz` says, and how much it has in hand."""

    def __init__(self) -> None:
        self.draining = False
        self.in_flight = 0
        self.receiving = 0
