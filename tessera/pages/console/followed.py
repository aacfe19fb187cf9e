"""Content of the console's section on the stream that follows the releases."""

from typing import Any

from streaming.shared.ledger import FollowedBundle, FollowEntry


def followed(entry: FollowEntry | None, now: float) -> dict[str, Any] | None:
    """Returns what the stream follows, and how far; None if no stream has followed the releases.

    Args:
        entry: Newest entry of the ledger.
        now: Present time, Unix seconds.
    """
    if entry is None:
        return None
    return {
        "process": entry.process,
        "alive": entry.alive(now),
        "ended": entry.ended,
        "age_s": max(0.0, now - entry.at),
        "registry": entry.registry,
        "bundles": [_row(one) for one in entry.bundles],
    }


def _row(one: FollowedBundle) -> dict[str, Any]:
    fresh = "–" if one.freshness_ms is None else "{:,.0f}, {:,.0f} ms".format(*one.freshness_ms)
    return {
        "bundle": one.bundle,
        "roles": ", ".join(one.roles) or "none",
        "state": one.state,
        "why": one.why,
        "seq": one.seq,
        "positions": ", ".join(f"{topic}-{part} {at:,}" for topic, part, at in one.positions),
        "lag": one.lag,
        "fresh": fresh,
        "events": one.counts.get("events", 0),
        "bad": one.counts.get("bad", 0),
        "loss": "–" if one.log_loss is None else f"{one.log_loss:.4f}",
    }
