"""Benchmarks of two versions side by side."""
