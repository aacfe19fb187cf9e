"""Aggregates by user, item and their columns: one law for the frame, the stream and the server."""
