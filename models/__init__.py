"""Codebook, unified table, ranker, training and evaluation, bundle and registry."""
