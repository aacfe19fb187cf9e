"""The demo: the whole path on one machine over a synthetic dataset."""
