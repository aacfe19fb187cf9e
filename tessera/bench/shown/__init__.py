"""Benchmark of learning from what was shown: clicks are simulated, and the examination of each position is known."""
