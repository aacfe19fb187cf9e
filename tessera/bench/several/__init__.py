"""Benchmarks of what runs in several processes."""
