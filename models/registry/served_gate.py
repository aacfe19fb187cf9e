"""Gates on what the champion serves: its newest report of `tessera skew --keep` decides.

A challenger learns from what servers logged. Where they read other values than the log and the batch say, or values far
from training's, the challenger would learn from them. The functions are pure.
"""

from collections.abc import Mapping
from typing import Any

from models.registry.gate import Check


def served_checks(limits: Mapping[str, float], document: Mapping[str, Any] | None) -> list[Check]:
    """Compares measures of what was served with limits.

    Args:
        limits: Largest allowed value by measure, names of `SKEW_MEASURES`.
        document: The champion's kept report. None: there is none, and the checks cannot tell.
    """
    requests = 0 if document is None else int(document["requests"])
    measured = _measures(document) if document is not None and requests else {}
    return [_check(name, measured.get(name), limit, requests) for name, limit in limits.items()]


def _check(name: str, value: float | None, limit: float, requests: int) -> Check:
    passed = value is None or value <= limit
    return Check(f"skew.{name}", value, None, limit, passed, told=value is not None, rows=requests)


def _measures(document: Mapping[str, Any]) -> dict[str, float]:
    found = {"different": float(document["different"])}
    drift = document["drift"]
    if not drift or drift["note"] or not drift["users"]:
        return found
    lows = [one["psi_low"] for one in drift["measures"] if one["psi_low"] is not None]
    return found | {"alarms": float(len(drift["alarms"])), "psi": max(lows, default=0.0)}
