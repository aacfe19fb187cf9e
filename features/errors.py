"""The errors Tessera raises on purpose.

Every message names the argument, file or field at fault, what was expected, what came, and what to do.
Anything else that escapes is a defect.
"""


class TesseraError(Exception):
    """Root of the errors that a user can mend; the command line prints it without a traceback."""


class DatasetError(TesseraError):
    """The dataset descriptor, or a table it points at, cannot be used."""


class EventError(TesseraError):
    """A message is not a valid event or item.

    Args:
        cause: one word for the kind of fault, by which set-aside messages are counted.
    """

    def __init__(self, message: str, *, cause: str = "invalid") -> None:
        super().__init__(message)
        self.cause = cause


class StreamError(TesseraError):
    """The stream must stop: going on would do harm."""


class BundleError(TesseraError):
    """A bundle is incomplete, altered, or made for another contract."""


class TrainingError(TesseraError):
    """Training cannot go on."""


class LogError(TesseraError):
    """The event log cannot do what was asked."""


class FencedError(LogError):
    """Another writer with the same transactional id has taken over; this one must stop."""


class StoreError(TesseraError):
    """The online store cannot do what was asked."""


class AnswerError(TesseraError):
    """A bundle made no ranking: its scores are no numbers, it did not answer in time, or too many wait for it."""


class OversizedError(LogError):
    """A message is larger than the log, or its topic, takes; sending it again cannot succeed."""


def is_fault(error: BaseException) -> bool:
    """Returns whether an error is a fault of code or data, not a request to end or a lack of memory.

    A panic of a Rust library is a fault, although its class derives from BaseException and not from Exception.
    """
    if isinstance(error, MemoryError):
        return False
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
