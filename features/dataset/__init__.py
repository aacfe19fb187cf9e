"""A dataset: its descriptor, its files as tables of known columns, its profile and its split."""
