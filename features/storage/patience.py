"""Limits of the clients of object stores, so that a store that does not answer is named within a minute."""

import time
from collections.abc import Collection
from functools import cache
from typing import Any

# Clients of stores wait for many minutes by default. With these times and tries s3fs gives up within a minute.
_CONNECT_S, _ANSWER_S = 5, 10
# gcsfs has six tries that cannot be set, so its session ends them after this time without any answer.
_SILENT_S = 20.0

TRIES = 3
"""Largest number of tries of a client whose tries can be set."""


def patience(protocol: str, given: Collection[str]) -> dict[str, Any]:
    """Returns options of a protocol's client.

    Args:
        protocol: Protocol of an address, such as `s3`.
        given: Names of options that the user's configuration of fsspec sets. They are left out.
    """
    found: dict[str, Any] = {}
    if protocol in ("s3", "s3a"):
        limits = {"connect_timeout": _CONNECT_S, "read_timeout": _ANSWER_S, "retries": {"total_max_attempts": 1}}
        found = {"config_kwargs": limits}
    elif protocol in ("gs", "gcs"):
        from aiohttp import ClientTimeout

        # A number would limit the whole request, and so the bytes of an upload.
        timeout = ClientTimeout(sock_connect=_CONNECT_S, sock_read=_ANSWER_S)
        found = {"requests_timeout": timeout, "session_kwargs": {"trace_configs": [_silence()]}}
    return {name: value for name, value in found.items() if name not in given}


@cache
def _silence() -> Any:
    """Returns the one trace of all sessions: fsspec keeps a client for each set of options."""
    from aiohttp import TraceConfig

    trace, silence = TraceConfig(), _Silence()
    trace.on_request_end.append(silence.answered)
    trace.on_request_exception.append(silence.failed)
    return trace


class _Silence:
    """Ends the tries of a client when a store has answered nothing for some time.

    The client tries again after a timeout of aiohttp. It raises a timeout of Python.
    """

    def __init__(self) -> None:
        self._since: float | None = None

    async def answered(self, session: Any, context: Any, request: Any) -> None:
        """Notes that the store has answered a request."""
        self._since = None

    async def failed(self, session: Any, context: Any, request: Any) -> None:
        """Notes that a request has failed.

        Raises:
            TimeoutError: Requests have timed out for `_SILENT_S`, and the store has answered none meanwhile.
        """
        if not isinstance(request.exception, TimeoutError):
            return
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        if now - self._since >= _SILENT_S:
            self._since = None
            raise TimeoutError(f"timed out: no answer to {request.method} {request.url.host}, tried several times")
