"""Forgetting users: the tombstone in the log, the removal from the stream's state, and the rewrite of old messages."""
