"""Benchmarks of encoders, their views, maps and codes."""
