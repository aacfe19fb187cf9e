"""Measures of a coding: health, drift, hits, changes between two codings, and the tree of IDs."""
