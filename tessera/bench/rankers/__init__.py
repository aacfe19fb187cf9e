"""Benchmarks of networks over the table."""
