"""The errors Tessera raises on purpose.

Every message names the argument, file or field at fault, what was expected, what came, and what to do.
Anything else that escapes is a defect.
"""


class TesseraError(Exception):
    """Root of the errors that a user can fix; the command line prints them without a traceback."""


class DatasetError(TesseraError):
    """Error of the dataset descriptor, or of a table it points at."""


class EventError(TesseraError):
    """Error of a message that is not a valid event or item.

    Args:
        cause: One word for the kind of fault; dead letters are counted by it.
    """

    def __init__(self, message: str, *, cause: str = "invalid") -> None:
        super().__init__(message)
        self.cause = cause


class StreamError(TesseraError):
    """Error after which the stream must stop, since continuing would do harm."""


class BundleError(TesseraError):
    """Error of a bundle that is incomplete, altered, or made for another contract."""


class TrainingError(TesseraError):
    """Error that ends training."""


class LogError(TesseraError):
    """Error of the event log: it cannot do what was asked."""


class RegistryError(LogError):
    """Error of the schema registry: it does not answer, or refused what was asked."""


class FencedError(LogError):
    """Error of a writer whose transactional id another writer has taken over; this writer must stop."""


class StorageError(TesseraError, OSError):
    """Error of an object store: it does not answer, or refused what was asked."""


class StoreError(TesseraError):
    """Error of the online store: it cannot do what was asked."""


class AnswerError(TesseraError):
    """Error of a ranking: its scores are not numbers, it was not ready in time, or too many requests wait."""


class OversizedError(LogError):
    """Error of a message that is larger than the log, or its topic, accepts; sending it again cannot succeed."""


def is_fault(error: BaseException) -> bool:
    """Returns whether an error is a fault of code or data, not a request to end or a lack of memory.

    A panic of a Rust library is a fault, although its class derives from BaseException and not from Exception.
    """
    if isinstance(error, MemoryError):
        return False
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
