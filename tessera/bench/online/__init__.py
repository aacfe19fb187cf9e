"""Benchmarks of stream, store, server and rollout."""
