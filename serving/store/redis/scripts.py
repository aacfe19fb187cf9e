"""The scripts that run inside the Redis server, and calls of them, many in one round trip."""

import hashlib
from importlib import resources
from typing import Any

import redis

from serving.store.page import Call


class Script:
    """One of `lua/`, known to a server by its hash."""

    def __init__(self, name: str) -> None:
        self.text = resources.files("serving.store.redis").joinpath("lua", f"{name}.lua").read_bytes()
        self.sha = hashlib.sha1(self.text, usedforsecurity=False).hexdigest()


def run_batch(client: redis.Redis, script: Script, calls: list[Call]) -> list[Any]:
    """The replies to calls of a script, which is loaded where the server has forgotten it."""
    replies: list[Any] = [redis.exceptions.NoScriptError()] * len(calls)
    for _ in range(3):  # each time, another client may flush the scripts once more
        pipeline = client.pipeline(transaction=False)
        unanswered = [i for i, reply in enumerate(replies) if isinstance(reply, redis.exceptions.NoScriptError)]
        for i in unanswered:
            keys, arguments = calls[i]
            pipeline.execute_command("EVALSHA", script.sha, len(keys), *keys, *arguments)
        for i, reply in zip(unanswered, pipeline.execute(raise_on_error=False), strict=True):
            replies[i] = reply
        failed = [reply for reply in replies if isinstance(reply, Exception)]
        if not failed:
            return replies
        if not all(isinstance(reply, redis.exceptions.NoScriptError) for reply in failed):
            break
        client.script_load(script.text)
    raise next(reply for reply in failed if isinstance(reply, redis.RedisError))
