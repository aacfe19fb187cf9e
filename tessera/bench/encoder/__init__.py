"""Benchmarks of encoders, their views, maps and codes, and of what a vector means."""
