"""Embedding methods for a budget of bytes, compared behind one protocol."""
