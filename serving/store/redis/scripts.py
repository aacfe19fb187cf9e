"""The Lua scripts that run inside the Redis server, and batches of their calls."""

import hashlib
from importlib import resources
from typing import Any

import redis

from serving.store.page import Call


class Script:
    """Script of the folder `lua/`. A server knows a loaded script by its hash.

    Attributes:
        text: Source of the script.
        sha: SHA-1 of the source, as Redis computes it.

    Args:
        name: Name of the file without its ending.
    """

    def __init__(self, name: str) -> None:
        self.text = resources.files("serving.store.redis").joinpath("lua", f"{name}.lua").read_bytes()
        self.sha = hashlib.sha1(self.text, usedforsecurity=False).hexdigest()


def run_batch(client: redis.Redis, script: Script, calls: list[Call]) -> list[Any]:
    """Returns the replies to calls of a script, in one round trip. Loads the script if the server has lost it.

    Args:
        client: Client of the server.
        script: The script.
        calls: Keys and arguments of each call.
    """
    replies: list[Any] = [redis.exceptions.NoScriptError()] * len(calls)
    for _ in range(3):  # another client may flush the scripts before each try
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
