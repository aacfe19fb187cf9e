"""Proves what was served: a sampled log of the servers' inputs, and its comparison with snapshot, log and batch."""
