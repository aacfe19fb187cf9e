"""Runs one process of a training in several: `python -m models.sharded.rank DESCRIPTION PARENT RANK PROCESSES`.

The process ends when its parent ends, so no process of a killed training writes a checkpoint beside the next training.
The parent is watched before torch is loaded, which takes seconds.
"""

import os
import sys
import threading
import time
from pathlib import Path

_POLL_S = 0.5


def main(path: Path, parent: int, rank: int, processes: int) -> int:
    """Trains this process's share of the training that a file describes, while the parent lives."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    from models.sharded.work import work

    return work(path, rank, processes)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(int, sys.argv[2:])))
