"""Scheduling of the tests on parallel workers: which tests stay together.

A file stays on one worker, since its tests share fixtures that take long to make. `APART` names files whose tests share
nothing, and `TOGETHER` folders that share servers. The files of `SERVERS` run a trainer of the shared bundle on the
real Kafka and Redis, where the trainer has one name, so one worker runs them.
"""

from pathlib import PurePosixPath

from xdist.scheduler import LoadScopeScheduling

APART = {"test_cli.py", "test_fuzz.py", "test_guides.py", "test_publish.py", "test_run.py"}
TOGETHER = {"rehearsal", "chaos", "browser"}
SERVERS = {"test_exactly_once.py", "test_operation.py", "test_refill.py", "test_space_flip.py", "test_stream.py",
           "test_stream_edges.py", "test_stream_service.py"}  # fmt: skip


def group_of(nodeid: str) -> str:
    """Returns the group of a test; the tests of a group run on one worker, one after another."""
    path = PurePosixPath(nodeid.partition("::")[0])
    if path.parent.name in TOGETHER:
        return path.parent.name
    if path.name in APART:
        return nodeid
    return "servers" if path.name in SERVERS else str(path)


class GroupScheduling(LoadScopeScheduling):
    """Scheduler of pytest-xdist that hands out groups in the order of their first test."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)
