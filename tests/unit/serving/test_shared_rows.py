"""Rows that processes share: a dead process loses nothing, the last one frees the memory."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from features.aggregate.plan import NOTHING
from features.errors import StoreError
from serving.ranking.mirror import Mirror
from serving.ranking.rows import MirrorRows, StoreRows
from serving.ranking.shared_rows import SharedRows
from serving.store.memory import MemoryStore

ROWS, DIM = 1_000, 8
SOME = np.array([3, 700, 12])


@pytest.fixture
def store() -> MemoryStore:
    found = MemoryStore()
    found.create_table("b", rows=ROWS, dim=DIM)
    found.load_rows("b", np.arange(ROWS * DIM, dtype=np.float32).reshape(ROWS, DIM), seq=0)
    return found


@pytest.fixture
def opened(store: MemoryStore, tmp_path: Path) -> Iterator[Callable[..., SharedRows]]:
    with contextlib.ExitStack() as stack:
        yield lambda position=(0,): stack.enter_context(contextlib.closing(SharedRows(tmp_path, store, "b", position)))


def in_a_process(body: Callable[[], None]) -> int:
    """Runs a function in a forked process; returns its status as `os.waitpid` does."""
    pid = os.fork()
    if not pid:
        try:
            body()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def vectors(value: float) -> np.ndarray:
    return np.full((len(SOME), DIM), value, dtype=np.float32)


def test_what_one_process_folds_another_reads(
    opened: Callable[..., SharedRows], store: MemoryStore, tmp_path: Path
) -> None:
    rows = opened(position=(5, 2))

    def other() -> None:
        own = SharedRows(tmp_path, store, "b", (9, 9))
        # The table was read at position 5, and nothing was folded since.
        assert own.position == (5, 2)
        assert own.fold(SOME, vectors(1.5), 4) == 3
        own.moved((4, 3))

    assert in_a_process(other) == 0
    np.testing.assert_array_equal(rows.take(SOME), vectors(1.5))
    assert rows.fold(SOME, vectors(9), 4) == 0, "the other process has folded this number"
    assert rows.position == (5, 3), "each partition keeps the larger offset"
    rows.moved((6,))
    assert rows.position == (6, 3)


def test_a_process_that_dies_in_a_fold_leaves_no_torn_row_to_read(
    opened: Callable[..., SharedRows], store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = opened()

    def dies() -> None:
        own = SharedRows(tmp_path, store, "b", (0,))

        class Half(np.ndarray):
            def __setitem__(self, key: object, value: object) -> None:
                super().__setitem__(key[:1], value[:1])  # type: ignore[index]
                os.kill(os.getpid(), signal.SIGKILL)

        own._vectors = own._vectors.view(Half)
        own.fold(SOME, vectors(2.5), 1)

    assert os.WTERMSIG(in_a_process(dies)) == signal.SIGKILL
    with pytest.raises(StoreError, match="wait for the log"):
        rows.take(SOME)
    mirror = Mirror(store, "b", NOTHING, rows)
    mirror.caught_up()
    read = MirrorRows(mirror, StoreRows(store, "b")).read_rows(SOME)
    np.testing.assert_array_equal(read, store.read_rows("b", SOME))
    # Another delta does not end the unfinished one, not even a part of the same number.
    rows.fold(np.array([500]), np.zeros((1, DIM), dtype=np.float32), 1)
    with pytest.raises(StoreError, match="wait for the log"):
        rows.take(SOME)
    assert rows.fold(SOME, vectors(2.5), 1) == 3
    np.testing.assert_array_equal(rows.take(SOME), vectors(2.5))


def test_a_process_that_dies_while_it_reads_the_table_leaves_it_to_the_next(store: MemoryStore, tmp_path: Path) -> None:
    class Dies(MemoryStore):
        def read_table(self, bundle: str) -> tuple[np.ndarray, np.ndarray]:
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

    def dies() -> None:
        broken = Dies()
        broken.create_table("b", rows=ROWS, dim=DIM)
        SharedRows(tmp_path, broken, "b", (0,))

    assert os.WTERMSIG(in_a_process(dies)) == signal.SIGKILL
    with contextlib.closing(SharedRows(tmp_path, store, "b", (3,))) as rows:
        np.testing.assert_array_equal(rows.take(np.arange(ROWS)), store.read_rows("b", np.arange(ROWS)))
        assert rows.position == (3,)


def test_the_last_process_frees_the_memory(store: MemoryStore, tmp_path: Path) -> None:
    first, second = (SharedRows(tmp_path, store, "b", (0,)) for _ in range(2))
    first.close()
    assert (tmp_path / "b.rows").exists()
    np.testing.assert_array_equal(second.take(SOME), store.read_rows("b", SOME))
    second.close()
    second.close()
    assert not (tmp_path / "b.rows").exists()
    again = SharedRows(tmp_path, store, "b", (8,))
    assert again.position == (8,)
    again.close()


def test_the_table_is_in_memory_once(opened: Callable[..., SharedRows], store: MemoryStore, tmp_path: Path) -> None:
    store.create_table("large", rows=1_000_000, dim=DIM)
    size = 1_000_000 * (4 * DIM + 8)
    with contextlib.closing(SharedRows(tmp_path, store, "large", (0,))) as rows:
        rows.take(np.arange(1_000_000))
        before = anonymous_bytes()
        with contextlib.closing(SharedRows(tmp_path, store, "large", (0,))) as others:
            others.take(np.arange(0, 1_000_000, 7))
            assert anonymous_bytes() - before < size / 4
        assert (tmp_path / "large.rows").stat().st_blocks * 512 >= size


def anonymous_bytes() -> int:
    """Returns the bytes of memory that this process shares with no file."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1_024
    raise AssertionError


def test_a_directory_without_room_is_named(store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StoreError, match=r"shared mirror needs [\d,]+ bytes.*serve without --mirror"):
        SharedRows(tmp_path, store, "b", (0,))
    assert not list(tmp_path.glob("*.rows"))
