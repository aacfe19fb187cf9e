"""One process of the stream under test: `tessera stream --role`, which dies by itself inside transactions when asked.

Arguments: role, the bundle's directory, then any of
    die=RATE      at each failpoint, kill -9 with this chance, after what was produced has left for the broker
    seed=N        of that chance
    full          no file may grow beyond 64 KiB: what a full disk does to a snapshot
"""

import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

from features.errors import FencedError
from models.bundle.bundle import load_bundle
from streaming.trainer import TrainerOptions
from tessera.settings import Settings
from tessera.stream_service import StreamConnections, StreamService, until_stopped
from tessera.terminal import one_thread

FENCED = 3


def main() -> None:
    role, bundle, *more = sys.argv[1:]
    options = dict(part.partition("=")[::2] for part in more)
    chance, rate = random.Random(int(options.get("seed", 0))), float(options.get("die", 0))
    if "full" in options:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, 64 << 10))

    def failpoint(place: str) -> None:
        if chance.random() < rate:
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)

    stop = until_stopped()
    one_thread()
    trainer = TrainerOptions(batch=64, wait_s=0.05, most_bad=0.9, snapshot_every_s=1.5)
    connections = StreamConnections.of(Settings.from_environment())
    service = StreamService(load_bundle(Path(bundle)), connections, trainer, roles=(role,), failpoint=failpoint)
    try:
        service.run(stop)
    except FencedError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(FENCED)


if __name__ == "__main__":
    main()
