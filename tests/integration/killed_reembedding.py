"""A re-embedding that is killed with SIGKILL, for tests that resume it."""

KILLED = """
import os, signal, sys
from pathlib import Path
import features.jobs.encode as jobs
from tessera.encoders import reembed

left, encode = [2], jobs.encode_shard

def counted(shard, **given):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(shard, **given)

reembed.SHARD_ITEMS, jobs.encode_shard = 50, counted
reembed.reembed(Path(sys.argv[1]), sys.argv[2])
"""
"""Script that encodes two shards of 50 items and dies. Arguments: the run's directory, and the map's name."""
