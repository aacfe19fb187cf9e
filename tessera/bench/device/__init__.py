"""Benchmarks of training and of the codebook on a GPU."""
