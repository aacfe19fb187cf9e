"""Benchmark of retrieval: the two towers beside methods that retrieve a user's next item."""
