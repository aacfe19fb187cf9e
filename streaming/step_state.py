"""Copies the state of a step into a snapshot, and brings a step back to a snapshot."""

import msgspec
import numpy as np
import torch

from features.history import EventColumns
from models.bundle import record
from streaming.log.protocol import Positions
from streaming.snapshot import Memory, Snapshot
from streaming.step import Step


def snapshot_of(step: Step, *, deltas: int, inputs: Positions) -> Snapshot:
    """Returns a copy of a step's state.

    Args:
        step: The step, between two batches.
        deltas: Position in the deltas' topic. All deltas before it are in the state.
        inputs: Positions in the inputs. All messages before them are in the state.
    """
    table, catalogue, visits = step.ranker.table, step.catalogue, step.history.state()
    arrays = {
        "weight": table.weight.numpy().copy(),
        "accumulator": table.accumulator.numpy().copy(),
        "seqs": step.seqs.copy(),
        "visit_users": visits.user.copy(),
        "visit_items": visits.item.copy(),
        "visit_times": visits.time.copy(),
        "visitors": np.array(sorted(step.visitors), dtype=np.int64),
    } | catalogue.admission.state()
    memory = Memory(
        users=catalogue.user_ids[step.published_users :],
        items=catalogue.item_ids[step.published_items :],
        item_records=dict(step.item_records),
        item_versions=dict(step.item_versions),
        arrivals=step.fresh.arrivals,
        recent=msgspec.to_builtins(step.fresh.recent.state()),
    )
    return Snapshot(step.bundle.id, step.seq, deltas, dict(inputs), arrays, memory)


def restore_step(step: Step, snapshot: Snapshot) -> None:
    """Brings a step that is at its bundle to the state of a snapshot."""
    arrays, memory, catalogue = snapshot.arrays, snapshot.memory, step.catalogue
    table = step.ranker.table
    table.weight.copy_(torch.from_numpy(arrays["weight"]))
    table.accumulator.copy_(torch.from_numpy(arrays["accumulator"]))
    step.seqs = arrays["seqs"].copy()
    catalogue.admission.restore(arrays)
    catalogue.number_users(memory.users)
    catalogue.number_items(memory.items)
    written = {name: data for name, data in memory.item_records.items() if data != record.TOMBSTONE}
    catalogue.put_items({name: record.decode_item(data) for name, data in written.items()})
    catalogue.remove_items([name for name in memory.item_records if name not in written])
    step.history = type(step.history)(step.history.length)
    users, items, times = (arrays[f"visit_{name}"] for name in ("users", "items", "times"))
    step.history.advance(EventColumns(users, items, times, np.ones(len(users), dtype=np.bool_)))
    step.visitors = set(arrays["visitors"].tolist())
    step.fresh.recent.restore(memory.recent)
    step.item_records, step.item_versions = dict(memory.item_records), dict(memory.item_versions)
    step.fresh.arrivals, step.seq = memory.arrivals, snapshot.seq
