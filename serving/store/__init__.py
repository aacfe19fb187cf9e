"""The online store: protocol, pages, Redis and memory, and the writer that folds deltas into it."""
