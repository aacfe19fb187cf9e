"""Ranking: the service of a bundle, its rows from the store or the mirror, and users' histories."""
