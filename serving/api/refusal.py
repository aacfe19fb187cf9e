"""Answers of requests that no route handles: problem documents of refused requests."""

from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import msgspec

PROBLEM = "application/problem+json"
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class Refusal:
    """Refusal of a request.

    Attributes:
        status: HTTP status.
        why: Word by which refusals are counted.
        detail: Sentence for the caller.
        retry_s: Seconds until another try makes sense; 0 gives no advice.
        challenge: True if the answer asks for a key.
        close: True if the connection is closed, since the rest of the body is not wanted.
    """

    status: int
    why: str
    detail: str
    retry_s: int = 0
    challenge: bool = False
    close: bool = False

    async def send(self, send: Send) -> None:
        """Sends the answer."""
        title = {
            401: "Unauthorized", 403: "Forbidden", 408: "Too slow", 413: "Too large", 421: "Unknown host",
            429: "Too many requests",
        }  # fmt: skip
        body = {
            "type": "about:blank",
            "title": title.get(self.status, "Refused" if self.status < 500 else "Overloaded"),
            "status": self.status,
            "detail": self.detail,
        }
        data = msgspec.json.encode(body)
        headers = [(b"content-type", PROBLEM.encode()), (b"content-length", str(len(data)).encode())]
        if self.retry_s:
            headers.append((b"retry-after", str(self.retry_s).encode()))
        if self.challenge:
            # Basic is offered too: a browser then asks for the key, and can show /docs.
            headers += [(b"www-authenticate", b"Bearer"), (b"www-authenticate", b'Basic realm="tessera"')]
        if self.close or self.status in (408, 413):
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": data})
