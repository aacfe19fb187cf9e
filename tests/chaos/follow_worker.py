"""The process under test: a stream that follows the releases, and dies by itself inside transactions when asked.

Arguments: any of
    die=RATE      at each failpoint, kill -9 with this chance, after what was produced has left for the broker
    seed=N        of that chance
"""

import os
import random
import signal
import sys
import time

from features.errors import FencedError
from tessera.follow.release import ReleaseWatch
from tessera.follow.service import FollowService
from tessera.settings import Settings
from tessera.stream_service import StreamConnections, until_stopped
from tessera.terminal import one_thread
from tests.chaos.worker import FENCED
from tests.integration.streaming.following import OPTIONS


def main() -> None:
    options = dict(part.partition("=")[::2] for part in sys.argv[1:])
    chance, rate = random.Random(int(options.get("seed", 0))), float(options.get("die", 0))

    def failpoint(place: str) -> None:
        if chance.random() < rate:
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)

    stop = until_stopped()
    one_thread()
    settings = Settings.from_environment()
    watch = ReleaseWatch(settings.open_registry(create=False), settings.bundles, None)
    service = FollowService(watch, StreamConnections.of(settings), OPTIONS, failpoint=failpoint)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    try:
        service.run(stop)
    except FencedError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(FENCED)


if __name__ == "__main__":
    main()
