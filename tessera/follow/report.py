"""Findings of `tessera doctor` about the stream that follows the releases."""

import contextlib
import time

from streaming.shared.ledger import FollowEntry, newest_entry
from tessera.follow.release import ReleaseWatch
from tessera.settings import Settings

_START = "start `tessera stream --follow` again"


def what_is_followed(settings: Settings) -> list[tuple[str, str, str]]:
    """Returns level (ok, warning or fault), state and remedy of each finding. Empty if no stream follows releases.

    Raises:
        TesseraError: Log or registry do not answer.
    """
    with contextlib.closing(settings.open_log()) as log:
        entry = newest_entry(log, settings.topics)
    if entry is None:
        return []
    if not entry.alive(time.time()):
        age_s = time.time() - entry.at
        done = "has ended" if entry.ended else "does not answer"
        return [("warning", f"the follower {entry.process} {done}; its last entry is {age_s:,.0f} s old", _START)]
    findings = [_finding(entry, number) for number in range(len(entry.bundles)) if entry.bundles[number].roles]
    if entry.registry:
        findings.append(("warning", f"the follower cannot read the registry: {entry.registry}", "see the registry"))
    return findings + _missing(settings, entry)


def _finding(entry: FollowEntry, number: int) -> tuple[str, str, str]:
    one = entry.bundles[number]
    state = f"{one.bundle} ({', '.join(one.roles)}): {one.state}, batch {one.seq:,}, lag {one.lag:,}"
    if one.state == "paused":
        return "fault", f"{state}: {one.why}", f"fix what it names, then {_START}, or take the alias from the version"
    if one.why:
        return "warning", f"{state}: {one.why}", "publish the bundle again, or name another version"
    return "ok", state, ""


def _missing(settings: Settings, entry: FollowEntry) -> list[tuple[str, str, str]]:
    """Returns a finding for each released bundle that the follower does not train."""
    if not settings.has_registry:
        return []
    wanted = ReleaseWatch(settings.open_registry(create=False), settings.bundles, entry.model).changed() or {}
    known = {one.bundle for one in entry.bundles if one.roles}
    return [
        ("warning", f"{bundle} ({', '.join(one.roles)}) is not trained yet", f"if this stays, {_START}")
        for bundle, one in wanted.items()
        if bundle not in known
    ]
