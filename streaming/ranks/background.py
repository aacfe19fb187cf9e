"""Runs the transaction of a micro-batch in a thread, while the trainer does the step of the next micro-batch."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundCommit:
    """Runs one commit at a time, in the order in which they were started. One thread calls all methods.

    A step needs the processor, and a transaction mostly waits for the log, so both together take as long as the longer
    of them.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._running: Future[None] | None = None

    def start(self, commit: Callable[[], None]) -> None:
        """Starts a commit after the last one has ended. Raises the error of the last one, and then starts none."""
        self.wait()
        self._running = self._pool.submit(commit)

    def wait(self) -> None:
        """Returns when the last commit has ended. Raises its error once."""
        if self._running is not None:
            running, self._running = self._running, None
            running.result()

    def close(self) -> None:
        """Ends the thread after its commit. An error of that commit is dropped: the next start reads the log."""
        self._running = None
        self._pool.shutdown()
