"""Judges spaces of vectors by tasks whose queries are the same for every space, so that two spaces can be paired."""
