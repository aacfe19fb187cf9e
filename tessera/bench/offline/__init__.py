"""Benchmarks of the offline job: features, Semantic IDs, table, training."""
