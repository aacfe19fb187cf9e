"""A lock excludes other processes and threads, and ends with its holder."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from features.errors import TesseraError
from features.lock import locked

HOLD = """
import sys, time
from pathlib import Path
from features.lock import locked
with locked(Path(sys.argv[1]), wait_s=0):
    print("held", flush=True)
    time.sleep(60)
"""


def test_another_process_is_excluded_until_it_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(TesseraError, match=rf"keys\.json: in use by another process \(pid {holder.pid}\)"):
            with locked(path, wait_s=0):
                pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with locked(path, wait_s=5):
        pass


def test_threads_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "count"
    path.write_text("0")

    def add() -> None:
        for _ in range(20):
            with locked(path, wait_s=30):
                count = int(path.read_text())
                time.sleep(0.0005)
                path.write_text(str(count + 1))

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() == "80"


def test_a_missing_directory_is_made(tmp_path: Path) -> None:
    with locked(tmp_path / "new" / "home", wait_s=0):
        assert (tmp_path / "new" / ".home.lock").exists()
