"""Vectors that a team brings, as columns of a table."""
