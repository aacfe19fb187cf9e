"""Impressions and outcomes on the log: the joiner and the export."""
