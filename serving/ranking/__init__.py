"""Ranking: one bundle's service, its rows from the store or the mirror, its histories."""
