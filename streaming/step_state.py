"""Copies the state of a step into a snapshot, and restores a step from a snapshot."""

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from features.aggregate.stored import aggregate_arrays, restore_aggregates
from features.history import EventColumns, History
from features.shown.consumed import ConsumedItems
from models.bundle import record
from streaming.log.protocol import Offsets, Positions
from streaming.ranks.seat import Seat
from streaming.snapshot import ForgottenUser, Memory, Snapshot
from streaming.step import Step


def snapshot_of(step: Step, *, deltas: Offsets, inputs: Positions) -> Snapshot:
    """Returns a copy of a step's state. The table has the rows of the step's process alone.

    Args:
        step: The step, between two batches.
        deltas: Positions in the deltas' topic. The state contains all deltas before these positions.
        inputs: Positions in the inputs. The state contains all messages before these positions.
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
    }
    if step.labelled is not None:
        labelled = step.labelled.state()
        arrays |= {"labelled_users": labelled.user, "labelled_items": labelled.item, "labelled_times": labelled.time}
    if step.consumed is not None:
        arrays |= step.consumed.arrays()
    arrays |= catalogue.admission.state() | aggregate_arrays(step.aggregates.state) | step.aggregates.past.arrays()
    memory = Memory(
        users=catalogue.user_ids[step.published_users :],
        items=catalogue.item_ids[step.published_items :],
        item_records=dict(step.items.records),
        item_versions=dict(step.items.versions),
        item_texts=dict(step.items.texts),
        arrivals=step.fresh.arrivals,
        recent=msgspec.to_builtins(step.fresh.recent.state()),
        forgotten=[
            ForgottenUser(request, step.removals.seqs[request.user, request.salt]) for request in step.removals.users
        ],
        dead=sorted(step.removals.dead),
        removed=dict(step.removals.aggregates),
    )
    return Snapshot(step.bundle.id, step.seq, deltas, dict(inputs), arrays, memory)


def gathered(arrays: Mapping[str, NDArray[Any]], seat: Seat) -> dict[str, NDArray[Any]]:
    """Returns the rows of the table of all processes in the leader, and no rows in the others.

    Args:
        arrays: Arrays of a snapshot of this process.
        seat: Place of this process. Every process calls this function.
    """
    if seat.deal.processes == 1:
        return {}
    found = {}
    for name in ("weight", "accumulator", "seqs"):
        own = arrays[name]
        parts = [own if rank == 0 else own[:0] for rank in range(seat.deal.processes)]
        found[name] = np.concatenate(seat.peers.swap(parts))
    return found


def restore_step(step: Step, snapshot: Snapshot) -> None:
    """Changes the state of a step to the state of a snapshot.

    Args:
        step: A new step, which has applied no batch.
        snapshot: Snapshot of the same bundle, with all rows of the table or with those of the step's process.
    """
    arrays, memory, catalogue = snapshot.arrays, snapshot.memory, step.catalogue
    table, own = step.ranker.table, slice(None)
    if len(arrays["seqs"]) > len(step.rows):
        own = slice(step.rows.low, step.rows.high)
    table.weight.copy_(torch.from_numpy(arrays["weight"][own]))
    table.accumulator.copy_(torch.from_numpy(arrays["accumulator"][own]))
    step.seqs = arrays["seqs"][own].copy()
    catalogue.admission.restore(arrays)
    # The published id of a removed user may be the id of a new user.
    catalogue.forget_users([catalogue.user_ids[number] for number in memory.dead if number < step.published_users])
    catalogue.number_users(memory.users)
    catalogue.forget_users([catalogue.user_ids[number] for number in memory.dead if number >= step.published_users])
    catalogue.number_items(memory.items)
    kept = {item_id: data for item_id, data in memory.item_records.items() if data != record.TOMBSTONE}
    catalogue.put_items({item_id: record.decode_item(data) for item_id, data in kept.items()})
    catalogue.remove_items([item_id for item_id in memory.item_records if item_id not in kept])
    step.history = _history(step.history, arrays, "visit")
    if step.labelled is not None:
        step.labelled = _history(step.labelled, arrays, "labelled")
    if step.consumed is not None and "consumed_users" in arrays:
        step.consumed = ConsumedItems.restored(arrays)
    restore_aggregates(step.aggregates.state, arrays)
    step.aggregates.past.restore(arrays)
    removals = step.removals
    for forgotten in memory.forgotten:
        removals.users.add(forgotten.request)
        removals.seqs[forgotten.request.user, forgotten.request.salt] = forgotten.seq
    removals.aggregates, removals.dead = dict(memory.removed), set(memory.dead)
    step.visitors = set(arrays["visitors"].tolist())
    step.fresh.recent.restore(memory.recent)
    step.items.records, step.items.versions = dict(memory.item_records), dict(memory.item_versions)
    step.items.texts = dict(memory.item_texts)
    step.fresh.arrivals, step.seq = memory.arrivals, snapshot.seq


def _history(like: History, arrays: Mapping[str, NDArray[Any]], name: str) -> History:
    """Returns the history of a snapshot's arrays, of the same length and lag as another."""
    history = History(like.length, lag=like.lag)
    users, items, times = (arrays[f"{name}_{column}"] for column in ("users", "items", "times"))
    history.advance(EventColumns(users, items, times, np.ones(len(users), dtype=np.bool_)))
    return history
