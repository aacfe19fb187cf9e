"""Load of a server: whether it drains, and its requests and bodies in hand."""


class State:
    """Load of a server: it says whether new requests are accepted (`/readyz`), and counts the requests in hand."""

    def __init__(self) -> None:
        self.draining = False
        self.in_flight = 0
        self.receiving = 0
