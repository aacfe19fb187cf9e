"""Vectors that a team brings, as a base of a chain."""
